"""What users do to a pipeline, before and after it is quantized: the picture is right, or one line says what to do.

A column of the matrix is one function:

    @column(call={...}, refused={"after": "..."})
    def what_it_does(pipe): ...; return pipe

It gets a pipeline of the tiny models, changes it, and returns the one to run (None: the same). It is tried on a
full-precision pipeline, which gives the truth, before quantizing, and after it. `call` are arguments of the pipeline's
call, `on` the pipelines it is for, `refused` which order ends in a DQError and what that says, `within` the relative
error of the latents that is right.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from peft import LoraConfig
from torch import nn

import dq
from dq.errors import DQError
from dq.layers import packed_layers
from tests import adapters
from tests.adapters import error

DTYPE = torch.float32
RECIPE = "int8"
STEPS, SIDE = 2, 64


@dataclass(frozen=True)
class Column:
    change: Callable
    call: dict = field(default_factory=dict)
    on: tuple[str, ...] = ("tiny-sd", "tiny-pixart")
    refused: dict[str, str] = field(default_factory=dict)
    within: float = 0.06


COLUMNS: dict[str, Column] = {}


def column(**facts) -> Callable:
    def add(change: Callable) -> Callable:
        COLUMNS[change.__name__] = Column(change, **facts)
        return change

    return add


def denoiser(pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


@column()
def nothing(pipe):
    pass


@column(on=("tiny-sd",))
def lora(pipe):
    torch.manual_seed(1)
    targets = ["to_q", "to_v", "proj_in", "ff.net.2"]
    denoiser(pipe).add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_alpha=8), "a")


@column(on=("tiny-sd",))
def lora_switched_off(pipe):
    lora(pipe)
    denoiser(pipe).disable_adapters()


@column(on=("tiny-sd",), refused={"before": r"has adapters fused into its weights .* call unfuse_lora\(\)"})
def lora_fused(pipe):
    lora(pipe)
    denoiser(pipe).fuse_lora()


@column(on=("tiny-sd",))
def lora_fused_and_unloaded(pipe):
    lora_fused(pipe)
    denoiser(pipe).unload_lora()


@column(on=("tiny-sd",))
def dora(pipe):
    torch.manual_seed(1)
    options = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False, "use_dora": True}
    denoiser(pipe).add_adapter(LoraConfig(r=4, **options), "a")


IMAGES = torch.randn(2, 1, adapters.IMAGE, generator=torch.Generator().manual_seed(4))


@column(on=("tiny-sd",), call={"ip_adapter_image_embeds": [IMAGES]})
def ip_adapter(pipe):
    state = adapters.ip_adapter(pipe.unet)
    pipe.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(1.5)


@column(on=("tiny-sd",))
def ip_adapter_unloaded(pipe):
    ip_adapter(pipe)
    pipe.unload_ip_adapter()


@functools.cache
def control_net() -> nn.Module:
    torch.manual_seed(2)
    made = ControlNetModel.from_unet(adapters.tiny().unet, conditioning_embedding_out_channels=(16, 32, 96))
    for name, parameter in made.named_parameters():
        if name.startswith("controlnet_"):  # zeros, so that training starts from nothing
            parameter.data.normal_(std=0.05)
    return made


PICTURE = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))


@column(on=("tiny-sd",), call={"image": PICTURE})
def control_net_beside(pipe):
    return StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control_net(), dtype=DTYPE)


@column(on=("tiny-sd",), refused={"after": "ControlNetModel.from_unet copies weights, .* dq.dequantize first"})
def control_net_of_its_own(pipe):
    ControlNetModel.from_unet(denoiser(pipe))


@column(refused={"after": r"fuse_qkv_projections: \w+ is quantized .*; fuse first, then quantize"})
def fused_projections(pipe):
    denoiser(pipe).fuse_qkv_projections()


@column()
def cast_to_own_dtype(pipe):
    return pipe.to("cpu", DTYPE)


@column()
def pipeline_from_pipe(pipe):
    return type(pipe).from_pipe(pipe, dtype=DTYPE)


@column(refused={"after": "is quantized for torch.float32 and cannot be cast to torch.bfloat16; pass torch.float32"})
def cast_to_another_dtype(pipe):
    return pipe.to(torch.bfloat16)


@column(on=("tiny-sd",))
def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@column(on=("tiny-sd",))
def processors_of_their_own(pipe):
    pipe.unet.set_attn_processor(PlainAttention())


class PlainAttention:
    """Attention written out, at half its temperature."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        mixed = torch.softmax(0.5 * attn.scale * q @ k.transpose(1, 2), -1) @ v
        return attn.to_out[0](attn.batch_to_head_dim(mixed))


@column()
def hook_on_a_layer(pipe):
    layer = next(module for name, module in denoiser(pipe).named_modules() if name.endswith("attn2.to_v"))
    layer.register_forward_hook(lambda module, args, y: -y)


@functools.cache
def kept(name: str, quantized: bool) -> nn.Module:
    model = denoiser(adapters.tiny(name, DTYPE))
    if quantized:
        dq.quantize(model, RECIPE, progress=False)
    return model


def fresh(name: str, quantized: bool = False) -> DiffusionPipeline:
    pipe = adapters.tiny(name, DTYPE)
    setattr(pipe, "unet" if name == "tiny-sd" else "transformer", copy.deepcopy(kept(name, quantized)))
    return pipe


def changed(pipe: DiffusionPipeline, what: Column) -> DiffusionPipeline:
    return what.change(pipe) or pipe


@torch.no_grad()
def latents(pipe: DiffusionPipeline, what: Column) -> torch.Tensor:
    options = {} if hasattr(pipe, "unet") else {"use_resolution_binning": False}
    start = torch.Generator().manual_seed(0)
    options |= {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "generator": start} | what.call
    return pipe("a red circle", output_type="latent", **options).images.float()


@functools.cache
def truth(name: str, column: str) -> torch.Tensor:
    return latents(changed(fresh(name), COLUMNS[column]), COLUMNS[column])


def quantize(pipe: DiffusionPipeline) -> DiffusionPipeline:
    dq.quantize(pipe, RECIPE, progress=False)
    return pipe


CELLS = [
    (name, column, order) for column, what in COLUMNS.items() for name in what.on for order in ("before", "after")
]


@pytest.mark.parametrize(("name", "column", "order"), CELLS)
def test_the_picture_is_right_or_one_line_says_what_to_do(name, column, order):
    what = COLUMNS[column]
    make = {
        "before": lambda: quantize(changed(fresh(name), what)),  # what the user did, before quantizing
        "after": lambda: changed(fresh(name, quantized=True), what),
    }[order]
    if order in what.refused:
        with pytest.raises(DQError) as refusal:
            make()
        assert re.search(what.refused[order], str(refusal.value)) and "\n" not in str(refusal.value)
        return
    pipe = make()
    assert packed_layers(denoiser(pipe))
    assert error(latents(pipe, what), truth(name, column)) < what.within


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "nothing"])
def test_every_column_that_changes_pictures_is_told_from_none(column):
    """A column without effect would pass whatever dq does to it."""
    without = {"lora_switched_off", "ip_adapter_unloaded", "control_net_of_its_own", "fused_projections"}
    without |= {"cast_to_own_dtype", "pipeline_from_pipe", "cast_to_another_dtype"}
    far = error(truth("tiny-sd", column), truth("tiny-sd", "nothing"))
    assert (far < 1e-3 or column == "cast_to_another_dtype") if column in without else far > 2 * COLUMNS[column].within
