"""Offloading, device maps and layerwise casting: a quantized model moves like any other and computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from diffusers import AutoModel
from diffusers.hooks import apply_group_offloading
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import dq
from dq.errors import DQError
from dq.host.transformers import DQTransformersQuantizer
from dq.layers import packed_layers, parameter_bytes
from tests import zoo
from tests.models import FLUX, PIXART, UNET, WAN, output, saved, stepped

CPU = torch.device("cpu")


def quantized(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = zoo.build(name, dtype=dtype)
    dq.quantize(model, "int8", progress=False)
    return model


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {
        f"{name}.{key}": value.dtype
        for name, layer in packed_layers(model).items()
        for key, value in layer.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", [FLUX, UNET, WAN])
def test_group_offload_gives_the_same_output(name, level):
    model = quantized(name)
    before = output(model)
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **blocks)
    assert torch.equal(output(model), before)
    assert torch.equal(output(model), before)


def test_group_offload_to_disk_keeps_every_byte(tmp_path):
    model = quantized(FLUX)
    before = output(model)
    apply_group_offloading(
        model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    assert torch.equal(output(model), before)


def test_group_offload_follows_step_tables():
    model = zoo.build(FLUX)
    stepped(model, (0.3, 0.6))
    steps = [torch.full((2,), step) for step in (0.1, 0.5, 0.9)]
    before = [output(model, timestep=step) for step in steps]
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert all(torch.equal(output(model, timestep=step), y) for step, y in zip(steps, before, strict=True))


@pytest.mark.parametrize("name", [FLUX, UNET, PIXART])
def test_sequential_offload_gives_the_same_output(name):
    model = quantized(name)
    before = output(model)
    cpu_offload(model, execution_device=CPU)
    assert all(value.is_meta for layer in packed_layers(model).values() for value in layer.parameters())
    assert torch.equal(output(model), before)


def test_saving_an_offloaded_model_is_refused(tmp_path):
    model = quantized(FLUX)
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(DQError, match="is offloaded"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_moving_to_another_device_and_back_keeps_every_byte():
    model = quantized(FLUX)
    before, kinds = {name: value.clone() for name, value in model.state_dict().items()}, dtypes(model)
    model.to("cpu")
    for layer in packed_layers(model).values():
        layer.to(torch.bfloat16).half().double()
    assert dtypes(model) == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_casting_a_quantized_model_is_refused_by_the_host():
    with pytest.raises(ValueError, match="quantized"):
        quantized(FLUX).to(torch.bfloat16)


@pytest.mark.parametrize("name", [FLUX, UNET])
def test_layerwise_casting_leaves_packed_tensors_alone(name):
    model = quantized(name, torch.bfloat16)
    kinds, packed = dtypes(model), {path: layer.scale.clone() for path, layer in packed_layers(model).items()}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.isfinite(output(model)).all()
    assert dtypes(model) == kinds
    assert all(torch.equal(layer.scale, packed[path]) for path, layer in packed_layers(model).items())


@pytest.mark.parametrize("name", [FLUX, UNET])
def test_layerwise_casting_that_loses_nothing_gives_the_same_output(name):
    model = quantized(name, torch.bfloat16)
    before = output(model)
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.bfloat16)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("place", ["auto", "cpu", {"": "cpu"}])
def test_device_map_gives_the_same_model(tmp_path, place):
    base = saved(tmp_path, FLUX)
    plain = AutoModel.from_pretrained(base, quantization_config=dq.DQConfig("int8"))
    during = AutoModel.from_pretrained(base, quantization_config=dq.DQConfig("int8"), device_map=place)
    plain.save_pretrained(tmp_path / "q")
    again = AutoModel.from_pretrained(str(tmp_path / "q"), device_map=place)
    assert torch.equal(output(during), output(plain))
    assert torch.equal(output(again), output(plain))


def disk_map(model: nn.Module) -> dict[str, str]:
    places = {name: "cpu" for name, _ in model.named_children()}
    return {**places, "transformer_blocks": "disk"}


def test_saved_model_with_blocks_on_disk_gives_the_same_output(tmp_path):
    model = quantized(FLUX)
    model.save_pretrained(tmp_path / "q")
    options = {"device_map": disk_map(model), "offload_folder": str(tmp_path / "offload")}
    again = AutoModel.from_pretrained(str(tmp_path / "q"), **options)
    assert torch.equal(output(again), output(model))


def test_blocks_on_disk_that_would_round_scales_are_refused(tmp_path):
    model = quantized(FLUX, torch.bfloat16)
    model.save_pretrained(tmp_path / "q")
    options = {"device_map": disk_map(model), "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(DQError, match="would round scales to 16 bits"):
        AutoModel.from_pretrained(str(tmp_path / "q"), **options)


@pytest.mark.parametrize("recipe", ["int8", "int4-weight", "nvfp4-weight"])
@pytest.mark.parametrize("name", [FLUX, UNET])
def test_device_maps_are_made_of_packed_bytes_and_give_the_same_output(tmp_path, name, recipe):
    model = zoo.build(name)
    dq.quantize(model, recipe, progress=False)
    before, sizes = output(model), compute_module_sizes(model)
    assert sizes[""] == parameter_bytes(model) + sum(value.nbytes for value in model.buffers())
    assert all(sizes[path] == parameter_bytes(layer) for path, layer in packed_layers(model).items())
    places = infer_auto_device_map(model, max_memory={"cpu": int(0.5 * sizes[""])})
    assert set(places.values()) == {"cpu", "disk"}
    on_cpu = sum(sizes[path] for path, place in places.items() if place == "cpu")
    assert 0 < on_cpu <= 0.5 * sizes[""]
    dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True)
    assert torch.equal(output(model), before) and torch.equal(output(model), before)


def test_a_text_encoder_is_given_room_by_its_packed_bytes(tmp_path):
    """transformers plans a device map before a weight is read: it counts what a layer becomes, scales included."""
    config = CLIPTextConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = CLIPTextModel(CLIPTextConfig(**config.to_dict() | {"num_attention_heads": 4}))
    made = DQTransformersQuantizer(dq.DQConfig("int4-weight"), pre_quantized=False)
    made.settle(torch.float32)
    made.prepare(model)
    room = sum(made.param_element_size(model, name, value) * value.numel() for name, value in model.named_parameters())
    assert made.plan.layers and room < 0.5 * parameter_bytes(model)
    dq.quantize(model, "int4-weight", progress=False)
    assert round(room) == parameter_bytes(model)


def test_deep_copy_is_independent():
    model = quantized(FLUX)
    before, copied = output(model), copy.deepcopy(model)
    for layer in packed_layers(copied).values():
        layer.scale.data.mul_(2)
    assert torch.equal(output(model), before)
    assert not torch.equal(output(copied), before)
