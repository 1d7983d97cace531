"""The dtype that a quantized model and its layers tell is the one they had: hosts cast their inputs to it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from diffusers import AnyFlowFARTransformer3DModel
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn

import dq
from dq.layers import packed_layers
from tests import zoo
from tests.models import FLUX, UNET

CLASSES = (FLUX, UNET, "ConsisIDTransformer3DModel", "T5FilmDecoder", "StableCascadeUNet", "UVit2DModel")
CLASSES += ("WuerstchenDiffNeXt",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_a_quantized_model_tells_the_dtype_it_had(name, dtype):
    model = zoo.build(name, dtype=dtype)
    before = (model.dtype, next(model.parameters()).dtype, get_parameter_dtype(model))
    dq.quantize(model, "int8-weight", progress=False)
    assert (model.dtype, next(model.parameters()).dtype, get_parameter_dtype(model)) == before == (dtype,) * 3
    assert {layer.weight.dtype for layer in packed_layers(model).values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_of_a_layer_tells_the_compute_dtype_and_holds_its_bytes(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    dq.quantize(model, "int8-weight", progress=False)
    layer = model[1]
    for copied in (layer, copy.deepcopy(layer), torch.load(_dumped(layer), weights_only=False)):
        weight = copied.weight
        assert weight.dtype == dtype and weight.is_floating_point() and weight.shape == (64, 64)
        assert weight.data.dtype == copied.state_dict()["weight"].dtype == torch.int8
        assert torch.equal(weight.data, layer.stored) and weight.data_ptr() == copied.stored.data_ptr()


def _dumped(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
QWEN = {"depth": 2, "num_heads": 4, "patch_size": 8}
ENCODERS = {
    "clip": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SMALL, **IMAGE, projection_dim=32)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SMALL, **IMAGE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL, **IMAGE)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)),
    "qwen2-vl": lambda: _qwen(hf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel),
}


def _qwen(kind: type) -> nn.Module:
    return kind(hf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(**QWEN, embed_dim=32, hidden_size=32))


def _seen(name: str, model: nn.Module) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    if name == "qwen2-vl":
        patches = torch.randn(16, 3 * 2 * 8 * 8, generator=dice)
        return model(patches, grid_thw=torch.tensor([[1, 4, 4]])).last_hidden_state
    return model(torch.randn(1, 3, 32, 32, generator=dice)).last_hidden_state


PAIRS = [(name, offloaded) for name in ENCODERS for offloaded in (False, True)]
PAIRS.remove(("siglip", True))  # its pooler is torch's attention, which accelerate cannot offload


@pytest.mark.parametrize(("name", "offloaded"), PAIRS)
@torch.no_grad()
def test_encoders_of_pictures_stay_close_to_full_precision(name, offloaded):
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    before = _seen(name, model)
    dq.quantize(model, "int8-weight", progress=False)
    assert packed_layers(model)
    if offloaded:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert (_seen(name, model) - before).norm() < 0.03 * before.norm()


def test_a_gate_is_not_cast_to_bytes():
    """AnyFlow's causal model casts its gate of 0.25 to the dtype of a layer's weight: 21 dB where that was int8."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    sizes |= {"ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, "full_chunk_limit": 3, "gate_value": 0.25}
    torch.manual_seed(0)
    model = AnyFlowFARTransformer3DModel(**sizes, compressed_patch_size=(1, 4, 4), deltatime_type="r").eval()
    given = {"hidden_states": torch.randn(1, 4, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 12, 16)}
    given |= {"timestep": torch.full((1, 4), 500.0), "r_timestep": torch.full((1, 4), 250.0)}
    with torch.no_grad():
        expected = model(**given, chunk_partition=[2, 2], return_dict=False)[0]
        dq.quantize(model, "int8", progress=False)
        y = model(**given, chunk_partition=[2, 2], return_dict=False)[0]
    assert 10 * torch.log10(expected.square().sum() / (y - expected).square().sum()) > 40
