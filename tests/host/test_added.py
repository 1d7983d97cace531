"""What users put on a model after it was made: it keeps working, and what is saved loads again."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import dq
from dq.errors import DQError
from dq.host import mark
from dq.layers import packed_layers
from tests import adapters
from tests.adapters import error, noise


@pytest.fixture
def unet():
    return adapters.tiny().unet


def test_an_ip_adapter_works_as_before_and_its_layers_are_quantized(unet):
    adapters.add_ip_adapter(unet)
    given = adapters.image_prompt()
    before = noise(unet, **given)
    dq.quantize(unet, "int8-weight", progress=False)
    assert error(noise(unet, **given), before) < 0.02
    assert unet.config.encoder_hid_dim_type == "ip_image_proj"
    assert any("to_v_ip" in name for name in packed_layers(unet))
    dq.dequantize(unet)
    assert unet.config.encoder_hid_dim_type == "ip_image_proj"
    assert error(noise(unet, **given), before) < 0.02


def test_any_setting_written_on_a_config_survives_quantizing_and_undoing_it(unet):
    unet.config.sample_size, unet.config.mine = 7, "kept"
    for change in (lambda: dq.quantize(unet, "int8", progress=False), lambda: dq.dequantize(unet)):
        change()
        assert unet.config.sample_size == 7 and unet.config.mine == "kept"
    assert "quantization_config" not in unet.config and not hasattr(unet.config, "quantization_config")


def test_an_ip_adapter_loads_into_a_quantized_unet_in_its_dtype():
    unet = adapters.tiny(dtype=torch.bfloat16).unet
    dense = adapters.tiny(dtype=torch.bfloat16).unet
    dq.quantize(unet, "int8", progress=False)
    for model in (unet, dense):
        adapters.add_ip_adapter(model)
    given = adapters.image_prompt(torch.bfloat16)
    own = {value.dtype for value in unet.encoder_hid_proj.parameters()}
    assert own == {torch.bfloat16}
    assert error(noise(unet, torch.bfloat16, **given), noise(dense, torch.bfloat16, **given)) < 0.05


@pytest.mark.parametrize("recipe", ["int8", "int4-weight"])
def test_explain_and_save_know_what_was_unloaded(unet, tmp_path, recipe):
    pipe = adapters.tiny()
    adapters.add_ip_adapter(pipe.unet)
    dq.quantize(pipe, recipe, keep=[r".*to_v_ip"], progress=False)
    names = [row.name for row in dq.explain(pipe).layers]
    assert any("to_v_ip" in name for name in names) and any("to_v_ip" in name for name in names)
    pipe.unload_ip_adapter()
    assert not any("_ip" in row.name for row in dq.explain(pipe).layers)
    assert not any("_ip" in name for name in mark.plan_of(pipe.unet).layers)
    pipe.unet.save_pretrained(tmp_path)
    assert torch.equal(noise(UNet2DConditionModel.from_pretrained(tmp_path)), noise(pipe.unet))


def fuse(unet: nn.Module) -> None:
    unet.fuse_qkv_projections()


@pytest.mark.parametrize("add", [adapters.add_ip_adapter, fuse], ids=["ip-adapter", "fused"])
@pytest.mark.parametrize("recipe", ["int8", "int4-weight"])
def test_a_model_with_layers_its_config_knows_nothing_of_loads_without_them(unet, tmp_path, add, recipe):
    plain = adapters.tiny().unet
    dq.quantize(plain, recipe, progress=False)
    add(unet)
    dq.quantize(unet, recipe, progress=False)
    before = set(mark.plan_of(unet).layers)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(noise(again), noise(plain))
    assert set(mark.plan_of(again).layers) == set(mark.plan_of(plain).layers)
    assert set(mark.plan_of(unet).layers) == before, "saving changed the model"


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: setattr(unet, "conv_in", nn.Conv2d(9, 64, 3, padding=1)),
        lambda unet: delattr(unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_k"),
    ],
    ids=["wider", "missing"],
)
def test_a_model_that_no_fresh_one_can_take_over_is_not_saved(unet, tmp_path, change):
    change(unet)
    dq.quantize(unet, "int8", progress=False)
    with pytest.raises(DQError, match=r"was changed after it was made: .*before saving"):
        unet.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
