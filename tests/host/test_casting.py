"""Casts of quantized models and pipelines: to the dtype they have, or refused before anything changed."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from peft import LoraConfig

import dq
from dq.errors import DQError
from tests import adapters
from tests.adapters import noise
from tests.models import same_state

OWN, OTHER = torch.bfloat16, torch.float32


@pytest.fixture(scope="module", params=["tiny-sd", "tiny-pixart"])  # no test here changes it
def pipe(request):
    pipe = adapters.tiny(request.param, OWN)
    components = {"text_encoder": "int8-weight"} if request.param == "tiny-sd" else {}
    dq.quantize(pipe, "int8", components=components, progress=False)
    return pipe


def dtypes(pipe) -> dict:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": value.dtype for part, model in parts.items() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    "cast",
    [
        lambda pipe: pipe.to("cpu", OWN),
        lambda pipe: pipe.to(OWN),
        lambda pipe: pipe.to(dtype=OWN),
        lambda pipe: pipe.to("cpu"),
        lambda pipe: denoiser(pipe).to(dtype=OWN, device="cpu"),
        lambda pipe: denoiser(pipe).to(torch.zeros(1, dtype=OWN)),
        lambda pipe: denoiser(pipe).to(dtype=None),
        lambda pipe: denoiser(pipe).bfloat16(),
        lambda pipe: pipe.text_encoder.to(OWN),
    ],
)
def test_a_cast_to_the_own_dtype_changes_nothing(pipe, cast):
    before = dtypes(pipe)
    values = {name: value.clone() for name, value in denoiser(pipe).state_dict().items()}
    cast(pipe)
    assert dtypes(pipe) == before
    assert all(torch.equal(value, values[name]) for name, value in denoiser(pipe).state_dict().items())


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize(
    "cast",
    [
        lambda pipe: pipe.to(OTHER),
        lambda pipe: pipe.to("cpu", torch.float16),
        lambda pipe: type(pipe).from_pipe(pipe),
        lambda pipe: denoiser(pipe).to("cpu", OTHER),
        lambda pipe: denoiser(pipe).half(),
        lambda pipe: denoiser(pipe).float(),
        lambda pipe: denoiser(pipe).double(),
    ],
)
def test_another_dtype_is_refused_before_anything_changed(pipe, cast):
    before = dtypes(pipe)
    with pytest.raises(
        DQError, match=r"is quantized for torch.bfloat16 and cannot be cast to torch\.\w+; pass"
    ) as found:
        cast(pipe)
    assert "\n" not in str(found.value)
    assert dtypes(pipe) == before


def test_a_quantized_text_encoder_is_not_cast():
    pipe = adapters.tiny(dtype=OWN)
    dq.quantize(pipe.text_encoder, "int8-weight", progress=False)
    before = dtypes(pipe)
    for cast in (pipe.to, pipe.text_encoder.to, lambda dtype: pipe.text_encoder.float()):
        with pytest.raises(DQError, match=r"quantized for torch\.bfloat16"):
            cast(OTHER)
    assert dtypes(pipe) == before


def test_a_pipeline_is_made_from_another_and_shares_its_parts(pipe):
    if not hasattr(pipe, "unet"):
        pytest.skip("PixArt has no other pipeline")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=OWN)
    assert other.unet is pipe.unet and other.unet.is_quantized


def test_an_adapter_can_be_saved_and_loaded_again(tmp_path):
    unet = adapters.tiny().unet
    dq.quantize(unet, "int8", progress=False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    adapted = noise(unet)
    unet.save_lora_adapter(tmp_path, "mine")
    again = adapters.tiny().unet
    dq.quantize(again, "int8", progress=False)
    again.load_lora_adapter(
        str(tmp_path), prefix=None, adapter_name="mine", weight_name="pytorch_lora_weights.safetensors"
    )
    assert torch.equal(noise(again), adapted) and same_state(again, unet)


def test_what_the_class_keeps_in_fp32_stays_so():
    unet = adapters.tiny(dtype=OWN).unet
    unet._keep_in_fp32_modules = ["conv_norm_out"]
    unet.conv_norm_out.weight.data = unet.conv_norm_out.weight.data.float()
    unet.time_embedding.extra = torch.nn.Linear(4, 4)  # came later, in fp32
    dq.quantize(unet, "int8", progress=False)
    unet._keep_in_fp32_modules = ["conv_norm_out", *unet._keep_in_fp32_modules]
    unet.to(OWN)
    assert unet.conv_norm_out.weight.dtype == OTHER and unet.time_embedding.extra.weight.dtype == OWN
