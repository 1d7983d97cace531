"""Models made out of a quantized one: what reads weights is refused in one line, what reads a config works."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    QwenImageControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)

import dq
from dq.errors import DQError
from tests import zoo
from tests.models import FLUX, UNET, output

QWEN = "QwenImageTransformer2DModel"
ONE_LINE = r"\w+\.from_\w+ copies weights, and \w+ is quantized; make the new model from the full-precision one"


def quantized(name: str, recipe: str = "int8-weight"):
    model = zoo.build(name)
    dq.quantize(model, recipe, progress=False)
    return model


def control(kind: type, model, **options):
    heads = {key: model.config[key] for key in ("attention_head_dim", "num_attention_heads")}
    return kind.from_transformer(model, num_layers=1, **heads, **options)


def qwen_control(model, **options):
    return control(QwenImageControlNetModel, model, **options)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (UNET, ControlNetModel.from_unet),
        (UNET, ControlNetUnionModel.from_unet),
        (UNET, UNetMotionModel.from_unet2d),
        (FLUX, lambda model: control(FluxControlNetModel, model, num_single_layers=1)),
        (QWEN, qwen_control),  # copies with strict=False: int8 codes would be taken for weights
    ],
)
def test_copying_the_weights_of_packed_layers_is_refused(name, make):
    model = quantized(name)
    before = output(model)
    with pytest.raises(DQError, match=ONE_LINE):
        make(model)
    assert len(model.state_dict()) and torch.equal(output(model), before)  # its own state can be read again
    plain = copy.deepcopy(model)
    dq.dequantize(plain)
    assert any(parameter.is_floating_point() for parameter in make(plain).parameters())


def test_what_reads_only_the_config_works_and_is_not_taken_for_quantized(tmp_path):
    unet, qwen = quantized(UNET), quantized(QWEN)
    for made in (
        ControlNetModel.from_unet(unet, load_weights_from_unet=False),
        ControlNetXSAdapter.from_unet(unet, size_ratio=0.5),
        qwen_control(qwen, load_weights_from_transformer=False),
    ):
        assert "quantization_config" not in made.config and not getattr(made, "is_quantized", False)
    twin = UNet2DConditionModel.from_config(unet.config)  # with the config goes the entry of the other model
    twin.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(output(again), output(twin)) and not getattr(again, "is_quantized", False)


def test_a_model_that_shares_layers_with_a_quantized_one_is_not_saved(tmp_path):
    unet, other = quantized(UNET), zoo.build(UNET)
    other.time_embedding = unet.time_embedding
    with pytest.raises(DQError, match=r"shares layer 'time_embedding\.linear_2' with a quantized model"):
        other.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [UNET, FLUX])
def test_projections_are_fused_before_quantizing_and_never_after(name):
    model, fused = quantized(name), zoo.build(name)
    before = output(model)
    with pytest.raises(DQError, match=r"fuse_qkv_projections: .* is quantized .*; fuse first, then quantize"):
        model.fuse_qkv_projections()
    assert torch.equal(output(model), before)
    truth = output(fused)
    fused.fuse_qkv_projections()
    dq.quantize(fused, "int8-weight", progress=False)
    assert float((output(fused) - truth).norm() / truth.norm()) < 0.1
    fused.unfuse_qkv_projections()
    assert float((output(fused) - truth).norm() / truth.norm()) < 0.1
    assert dq.explain(fused).layers
