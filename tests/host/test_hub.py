"""Registration, the config, quantizing while loading, saving and reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import modeling_utils
from diffusers.quantizers import auto as diffusers_auto
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import auto as transformers_auto

import dq
from dq import cookbook, planning
from dq.errors import DQError
from dq.host import mark, peft, register
from dq.layers import packed_layers
from dq.model import pack_one
from tests import zoo
from tests.models import FLUX, PIXART, UNET, WAN, WEIGHTS, load, output, same_state, saved, stepped

# registration


def test_registering_again_changes_nothing():
    register.register()
    for home in (diffusers_auto, transformers_auto):
        assert home.AUTO_QUANTIZATION_CONFIG_MAPPING["dq"] is dq.DQConfig


def test_registration_refuses_to_overwrite_a_foreign_entry(monkeypatch):
    monkeypatch.setitem(diffusers_auto.AUTO_QUANTIZER_MAPPING, "dq", object)
    with pytest.raises(DQError, match="another package registered 'dq'"):
        register.register()


# the config


def test_unknown_keyword_of_the_config_names_the_nearest():
    with pytest.raises(DQError, match=r"unknown keyword 'linaer'.*Did you mean 'linear'"):
        dq.DQConfig("int8", linaer=("int8", None))


def test_unknown_recipe_of_the_config_names_the_nearest():
    with pytest.raises(DQError, match=r"'int8-wieght' is unknown.*Did you mean 'int8-weight'"):
        dq.DQConfig("int8-wieght")


def test_unknown_compute_dtype_is_refused():
    with pytest.raises(DQError, match="compute_dtype is 'bf16'"):
        dq.DQConfig("int8", compute_dtype="bf16")


def test_config_survives_its_json_form(quantized):
    data = json.loads(Path(quantized, "config.json").read_text())["quantization_config"]
    assert data["quant_method"] == "dq"
    assert dq.DQConfig.from_dict(data).to_dict() == data


def test_plan_of_a_newer_version_is_refused(quantized):
    data = json.loads(Path(quantized, "config.json").read_text())["quantization_config"]
    data["plan"]["version"] = 99
    with pytest.raises(DQError, match="plan version: got 99"):
        dq.DQConfig.from_dict(data)


def test_config_overrides_reach_the_plan(base):
    model = load(base, quantization_config=dq.DQConfig("int8", linear=("int4/group:32", None)))
    formats = {layer.plan.weight.format for layer in packed_layers(model).values() if layer.plan.act is None}
    assert "int4" in formats


def test_keep_patterns_of_the_config_reach_the_plan(base):
    model = load(base, quantization_config=dq.DQConfig("int8", keep=["transformer_blocks"]))
    assert type(model.transformer_blocks[0].attn.to_q) is nn.Linear


def test_keep_pattern_that_matches_nothing_is_refused_at_load_time(base):
    with pytest.raises(DQError, match="'nothing_like_this' matches no layer"):
        load(base, quantization_config=dq.DQConfig("int8", keep=["nothing_like_this"]))


def test_one_config_object_serves_several_models(tmp_path, base):
    config = dq.DQConfig("int8-weight")
    first = load(base, quantization_config=config)
    second = load(saved(tmp_path, PIXART), quantization_config=config)
    assert config.plan is None
    assert mark.plan_of(first).layers.keys() != mark.plan_of(second).layers.keys()


# quantizing while loading


@pytest.mark.parametrize("name", [FLUX, UNET, WAN, PIXART])
def test_quantizing_while_loading_equals_quantizing_after(tmp_path, name):
    folder = saved(tmp_path, name)
    during = load(folder, quantization_config=dq.DQConfig("int8"))
    after = load(folder)
    dq.quantize(after, "int8", progress=False)
    assert same_state(during, after)
    assert torch.equal(output(during), output(after))
    assert mark.plan_of(during).to_dict() == mark.plan_of(after).to_dict()


def test_at_most_one_full_precision_layer_exists_while_loading(base, monkeypatch):
    alive = []
    original = pack_one

    def watched(model, name, *args):
        plan = (
            planning.make_plan(FluxTransformer2DModel.from_config(base), cookbook.get("int8")) if not alive else None
        )
        names = plan.layers if plan else alive[0]
        alive.append(names)
        dense = [other for other in names if type(model.get_submodule(other)) is nn.Linear]
        assert all(model.get_submodule(other).weight.is_meta for other in dense)
        return original(model, name, *args)

    monkeypatch.setattr("dq.host.diffusers.pack_one", watched)
    load(base, quantization_config=dq.DQConfig("int8"))
    assert len(alive) > 10


@pytest.mark.parametrize("bias_file", ["first", "last"])
def test_a_bias_may_come_from_another_shard_than_its_weight(tmp_path, base, bias_file):
    state = load_file(Path(base, WEIGHTS))
    biases = {name: value for name, value in state.items() if name.endswith(".bias")}
    rest = {name: value for name, value in state.items() if name not in biases}
    shards = [biases, rest] if bias_file == "first" else [rest, biases]
    names = [WEIGHTS.replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, tmp_path / name, metadata={"format": "pt"})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text(Path(base, "config.json").read_text())
    config = dq.DQConfig("int8")
    assert same_state(load(tmp_path, quantization_config=config), load(base, quantization_config=config))


def test_layers_on_disk_are_refused_while_quantizing(base, tmp_path):
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    with pytest.raises(DQError, match="on disk while quantizing"):
        load(base, quantization_config=dq.DQConfig("int8"), **options)


def test_nan_weights_are_refused_while_loading(tmp_path, base):
    state = load_file(Path(base, WEIGHTS))
    state["transformer_blocks.0.attn.to_q.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(Path(base, "config.json").read_text())
    with pytest.raises(DQError, match=r"transformer_blocks\.0\.attn\.to_q"):
        load(tmp_path, quantization_config=dq.DQConfig("int8"))


def test_full_precision_checkpoint_that_lacks_a_planned_weight_is_refused(tmp_path, base):
    state = load_file(Path(base, WEIGHTS))
    del state["transformer_blocks.0.attn.to_q.weight"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(Path(base, "config.json").read_text())
    with pytest.raises(DQError, match=r"lacks tensor 'transformer_blocks\.0\.attn\.to_q\.weight'"):
        load(tmp_path, quantization_config=dq.DQConfig("int8"))


def test_shards_are_quantized_in_turn_also_where_loading_is_parallel(tmp_path, base, monkeypatch):
    def parallel(*args, **kwargs):
        raise AssertionError("layers are replaced while another thread reads the model")

    load(base).save_pretrained(tmp_path, max_shard_size="50KB")
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    monkeypatch.setattr(modeling_utils, "_load_shard_files_with_threadpool", parallel)
    config = dq.DQConfig("int8")
    assert same_state(load(tmp_path, quantization_config=config), load(base, quantization_config=config))


def test_tensors_are_aligned_whatever_file_they_come_from(tmp_path, base, quantized):
    odd = {"x": torch.zeros(1)}
    for extra in range(3):  # a longer header moves the tensors in the file
        state = load_file(Path(base, WEIGHTS))
        save_file(state | odd, tmp_path / WEIGHTS, metadata={"format": "pt", "pad": "." * 8 * extra})
        (tmp_path / "config.json").write_text(Path(base, "config.json").read_text())
        after = load(tmp_path)
        dq.quantize(after, "int8", progress=False)
        for model in (after, load(tmp_path, quantization_config=dq.DQConfig("int8")), load(quantized)):
            assert all(value.data_ptr() % 64 == 0 for value in model.parameters())


def test_single_file_quantizes_while_loading(base):
    model = FluxTransformer2DModel.from_single_file(
        str(Path(base, WEIGHTS)), config=base, quantization_config=dq.DQConfig("int8"), local_files_only=True
    )
    assert same_state(model, load(base, quantization_config=dq.DQConfig("int8")))
    assert mark.plan_of(model) is not None


# saving and reloading


@pytest.mark.parametrize("recipe", ["int8", "int4-weight", "nvfp4-weight", "mxfp4-weight", "fp8"])
def test_reload_is_bit_exact_for_every_recipe(tmp_path, base, recipe):
    model = load(base, quantization_config=dq.DQConfig(recipe))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(model, again)
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize("how", ["one file", "shards", "shards in parallel", "variant", "device_map", "own class"])
def test_reload_is_bit_exact_however_it_is_stored(tmp_path, base, monkeypatch, how):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    shards = {"max_shard_size": "20KB"} if "shards" in how else {}
    variant = {"variant": "fp16"} if how == "variant" else {}
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", "parallel" in how)
    model.save_pretrained(tmp_path, **shards, **variant)
    options = {"device_map": "auto"} if how == "device_map" else {}
    loader = FluxTransformer2DModel.from_pretrained if how == "own class" else load
    again = loader(tmp_path, **variant, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5 or "shards" not in how
    assert same_state(model, again)
    assert torch.equal(output(model), output(again))


def test_model_quantized_after_loading_saves_and_reloads(tmp_path):
    model = zoo.build(UNET)
    dq.quantize(model, "int8", progress=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_state(model, again)
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize("when", ["while loading", "after loading"])
@pytest.mark.parametrize("name", [FLUX, WAN])  # Wan keeps some layers in fp32 when it is loaded in 16 bits
def test_reload_without_a_dtype_gives_every_tensor_its_saved_dtype(tmp_path, name, when):
    if when == "while loading":
        model = load(saved(tmp_path, name), quantization_config=dq.DQConfig("int8"), dtype=torch.bfloat16)
    else:
        model = zoo.build(name)
        for value in model.parameters():  # also those the host would keep in fp32
            value.data = value.data.to(torch.bfloat16)
        dq.quantize(model, "int8", progress=False)
    model.save_pretrained(tmp_path / "q")
    again = load(tmp_path / "q")
    assert again.dtype == torch.bfloat16
    assert same_state(model, again)
    assert torch.equal(output(model), output(again))


def test_compute_dtype_of_the_config_is_used_when_no_dtype_is_given(base):
    model = load(base, quantization_config=dq.DQConfig("int8", compute_dtype=torch.bfloat16))
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [FLUX, WAN, PIXART, UNET, "UVit2DModel", "StableCascadeUNet", "T5FilmDecoder"])
def test_quantized_model_reports_its_compute_dtype(name):
    model = zoo.build(name, dtype=torch.bfloat16)
    dq.quantize(model, "int8", progress=False)
    assert model.dtype == torch.bfloat16


def test_reload_in_another_dtype_leaves_packed_tensors_alone(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    wide = load(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    for name, layer in packed_layers(model).items():
        other = wide.get_submodule(name)
        assert other.compute_dtype == torch.float32
        assert torch.equal(layer.weight, other.weight)
        assert layer.scale.dtype == other.scale.dtype == torch.float32
        assert torch.equal(layer.scale, other.scale)
    wide.save_pretrained(tmp_path / "wide")
    assert load(tmp_path / "wide").dtype == torch.float32


def test_step_tables_are_saved_and_followed_after_reload(tmp_path):
    model = zoo.build(FLUX)
    stepped(model, (0.3, 0.6))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    ticking = next(layer.clock for layer in packed_layers(again).values() if layer.plan.steps > 1)
    for bucket, step in enumerate((0.1, 0.5, 0.9)):
        timestep = torch.full((2,), step)
        assert torch.equal(output(model, timestep=timestep), output(again, timestep=timestep))
        assert ticking.index.item() == bucket


def test_dequantized_model_saves_as_an_ordinary_one(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    before = output(model)
    model.dequantize()
    assert not packed_layers(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert type(again.transformer_blocks[0].attn.to_q) is nn.Linear
    assert (output(again) - before).norm() / before.norm() < 0.05


def test_saving_over_an_older_save_removes_its_shards(tmp_path, base):
    load(base).save_pretrained(tmp_path, max_shard_size="50KB")
    model = load(base, quantization_config=dq.DQConfig("int8"))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert same_state(model, load(tmp_path))


def test_saving_again_after_a_change_of_the_plan_writes_the_new_plan(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    model.save_pretrained(tmp_path)
    layer = model.transformer_blocks[0].attn.to_q
    peft.widen(layer, torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).transformer_blocks[0].attn.to_q.plan.rank == 2


def test_the_same_model_saves_to_the_same_bytes(tmp_path):
    model = zoo.build(PIXART)
    dq.quantize(model, "int8", progress=False)
    saves = [tmp_path / str(number) for number in range(6)]
    for folder in saves:
        model.save_pretrained(folder)
    assert len({(folder / WEIGHTS).read_bytes() for folder in saves}) == 1
