"""Loading, saving and registration through diffusers and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from diffusers.models import modeling_utils
from diffusers.quantizers import auto as diffusers_auto
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.quantizers import auto as transformers_auto

import dq
from dq import hub, layers, loading, recipes
from dq.layers import packed_layers
from dq.plan import DQError
from tests import zoo
from tests.models import FLUX, PIXART, UNET, WAN, output, saved, stepped

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small FLUX transformer, full precision, fp32, on disk."""
    return saved(tmp_path_factory.mktemp("base"), FLUX)


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory):
    """The same, int8, saved."""
    folder = str(tmp_path_factory.mktemp("quantized") / "model")
    load(base, quantization_config=dq.DQConfig("int8")).save_pretrained(folder)
    return folder


def load(folder, **options):
    return AutoModel.from_pretrained(str(folder), **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# registration


def test_registering_again_changes_nothing():
    hub.register()
    for home in (diffusers_auto, transformers_auto):
        assert home.AUTO_QUANTIZATION_CONFIG_MAPPING["dq"] is dq.DQConfig


def test_registration_refuses_to_overwrite_a_foreign_entry(monkeypatch):
    monkeypatch.setitem(diffusers_auto.AUTO_QUANTIZER_MAPPING, "dq", object)
    with pytest.raises(DQError, match="another package registered 'dq'"):
        hub.register()


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
    assert hub.plan_of(first).layers.keys() != hub.plan_of(second).layers.keys()


# quantizing while loading


@pytest.mark.parametrize("name", [FLUX, UNET, WAN, PIXART])
def test_quantizing_while_loading_equals_quantizing_after(tmp_path, name):
    folder = saved(tmp_path, name)
    during = load(folder, quantization_config=dq.DQConfig("int8"))
    after = load(folder)
    dq.quantize(after, "int8", progress=False)
    assert same_state(during, after)
    assert torch.equal(output(during), output(after))
    assert hub.plan_of(during).to_dict() == hub.plan_of(after).to_dict()


def test_at_most_one_full_precision_layer_exists_while_loading(base, monkeypatch):
    alive = []
    original = loading.pack_one

    def watched(model, name, *args):
        plan = recipes.make_plan(FluxTransformer2DModel.from_config(base), recipes.get("int8")) if not alive else None
        names = plan.layers if plan else alive[0]
        alive.append(names)
        dense = [other for other in names if type(model.get_submodule(other)) is nn.Linear]
        assert all(model.get_submodule(other).weight.is_meta for other in dense)
        return original(model, name, *args)

    monkeypatch.setattr(loading, "pack_one", watched)
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
    assert hub.plan_of(model) is not None


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
    dq.adapters.widen(layer, torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    model.save_pretrained(tmp_path)
    assert load(tmp_path).transformer_blocks[0].attn.to_q.plan.rank == 2


# what must be refused


def damaged(quantized: str, folder: Path, change) -> Path:
    """A copy of a saved model whose state dict went through `change(state)`."""
    path = Path(quantized, WEIGHTS)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, folder / WEIGHTS, metadata=metadata)
    (folder / "config.json").write_text(Path(quantized, "config.json").read_text())
    return folder


LAYER = "transformer_blocks.0.attn.to_q"


def drop(state):
    del state[f"{LAYER}.scale"]


def reshape(state):
    state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"][:-1].contiguous()


def retype(state):
    state[f"{LAYER}.scale"] = state[f"{LAYER}.scale"].to(torch.bfloat16)


def flip(state):
    state[f"{LAYER}.weight"][0, 0] += 1


def zero(state):
    state[f"{LAYER}.scale"][0] = 0


def poison(state):
    state[f"{LAYER}.scale"][0] = torch.inf


def drop_kept(state):
    del state["x_embedder.weight"]


DAMAGES = [
    (drop, rf"lacks tensor '{LAYER}.scale'"),
    (reshape, rf"tensor '{LAYER}.weight': got shape .* expected"),
    (retype, rf"tensor '{LAYER}.scale': got torch.bfloat16, expected torch.float32"),
    (flip, rf"tensor '{LAYER}.weight': its bytes are not those that were saved"),
    (zero, rf"tensor '{LAYER}.scale': holds values of zero or below"),
    (poison, rf"tensor '{LAYER}.scale': holds NaN or Inf"),
    (drop_kept, "lacks tensor 'x_embedder.weight'"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES, ids=[change.__name__ for change, _ in DAMAGES])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, quantized, change, message):
    with pytest.raises(DQError, match=message):
        load(damaged(quantized, tmp_path, change))


def test_truncated_checkpoint_is_refused(tmp_path, quantized):
    damaged(quantized, tmp_path, lambda state: None)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate((tmp_path / WEIGHTS).stat().st_size - 100)
    with pytest.raises(OSError, match=f"Unable to load weights from checkpoint file.*{WEIGHTS}"):  # diffusers' own
        load(tmp_path)


def test_truncated_shard_is_refused(tmp_path, base):
    load(base, quantization_config=dq.DQConfig("int8")).save_pretrained(tmp_path, max_shard_size="50KB")
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(DQError, match=rf"{last.name}' is missing or damaged"):
        load(tmp_path)


def test_plan_for_another_model_is_refused_naming_the_first_layer(tmp_path, quantized):
    damaged(quantized, tmp_path, lambda state: None)
    data = json.loads((tmp_path / "config.json").read_text())
    rows = data["quantization_config"]["plan"]["layers"]
    rows[LAYER]["shape"] = [8, 8]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DQError, match=rf"layer '{LAYER}': the plan is for linear \(8, 8\)"):
        load(tmp_path)
    rows["no.such.layer"] = rows.pop(LAYER)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DQError, match=r"layer 'no\.such\.layer' of the plan is not in FluxTransformer2DModel"):
        load(tmp_path)


def test_a_plan_that_does_not_fit_leaves_the_model_as_it_was(base):
    model = load(base)
    plan = recipes.make_plan(model, recipes.get("int8"))
    plan.layers["no.such.layer"] = next(iter(plan.layers.values()))
    with pytest.raises(DQError, match=r"no\.such\.layer"):
        hub.swap(model, plan, torch.float32)
    assert not packed_layers(model)


def test_full_disk_leaves_the_target_as_it_was(tmp_path, base, monkeypatch):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    (tmp_path / "config.json").write_text("mine")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DQError, match="No space left on device; nothing was changed"):
        model.save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_place_that_cannot_be_written_is_refused(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DQError, match="cannot save to"):
            model.save_pretrained(place)
        with pytest.raises(DQError, match="cannot save to"):
            dq.save(model, place)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_saving_as_pickle_is_refused_and_writes_nothing(tmp_path, base):
    model = load(base, quantization_config=dq.DQConfig("int8"))
    with pytest.raises(DQError, match="safetensors only"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


# modules that are no diffusers models


class Small(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(3)])
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Linear(width, 8, bias=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x) + self.conv(x.reshape(-1, 32, 2, 1)).mean() * self.table[1]


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(seed)
    return Small().to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_module_saves_and_loads_bit_exactly(tmp_path, dtype):
    model, x = small(dtype=dtype), torch.randn(4, 64).to(dtype)
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path / "out")
    again = dq.load(tmp_path / "out", small(seed=1))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dq_plan.json", "model.safetensors"]
    assert same_state(model, again)
    assert torch.equal(model(x), again(x))
    assert hub.plan_of(again).to_dict() == hub.plan_of(model).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.0.scale"), "lacks tensor 'blocks.0.0.scale'"),
        (lambda s: s.update({"table": torch.zeros(5)}), r"tensor 'table': got shape \(5,\)"),
        (lambda s: s["blocks.0.0.weight"].neg_(), "'blocks.0.0.weight': its bytes"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds tensor 'extra', which Small has not"),
    ],
    ids=["missing", "mis-shaped", "tampered", "unknown"],
)
def test_damaged_bare_checkpoint_is_refused_and_the_model_unchanged(tmp_path, change, message):
    model = small()
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata=metadata)
    fresh = small(seed=1)
    with pytest.raises(DQError, match=message):
        dq.load(tmp_path, fresh)
    assert same_state(fresh, small(seed=1))


def test_truncated_bare_checkpoint_is_refused(tmp_path):
    model = small()
    dq.quantize(model, "int8", progress=False)
    dq.save(model, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DQError, match="missing or damaged"):
        dq.load(tmp_path, small())


def test_saving_what_is_not_quantized_is_refused(tmp_path, base):
    for model in (small(), load(base)):
        with pytest.raises(DQError, match="is not quantized, nothing to save"):
            dq.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_from_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DQError, match=r"dq_plan\.json' does not exist"):
        dq.load(tmp_path, small())


def test_stacked_expert_weights_save_and_reload(tmp_path):
    class TinyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 32))

        def forward(self, x):
            return torch.stack([x @ self.gate_up_proj[i] for i in range(3)])

    def build(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"blocks": nn.ModuleList([TinyExperts()])})

    model, x = build(0), torch.randn(2, 64)
    dq.quantize(model, "int8-weight", progress=False)
    assert isinstance(model["blocks"][0].gate_up_proj, layers.PackedStack)
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, build(1))
    assert torch.equal(model["blocks"][0](x), again["blocks"][0](x))


# text encoders, through transformers

T5 = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
CLIP = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CLIP |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}


def text_encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "t5":
        return T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")).eval()
    return CLIPTextModel(CLIPTextConfig(**CLIP)).eval()


@torch.no_grad()
def encode(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(10).reshape(1, 10)).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_text_encoder_quantizes_while_loading_and_reloads_bit_exactly(tmp_path, kind, dtype):
    dense = text_encoder(kind)
    dense.save_pretrained(tmp_path / "base")
    config = dq.DQConfig("int8-weight")
    model = type(dense).from_pretrained(tmp_path / "base", quantization_config=config, dtype=dtype)
    assert len(packed_layers(model)) == len(hub.plan_of(model).layers) >= 12
    assert (encode(model).float() - encode(dense)).norm() / encode(dense).norm() < 0.03
    model.save_pretrained(tmp_path / "q")
    again = type(dense).from_pretrained(tmp_path / "q")
    assert same_state(model, again)
    assert torch.equal(encode(model), encode(again))


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_text_encoder_quantized_after_loading_equals_while_loading(tmp_path, kind):
    dense = text_encoder(kind)
    dense.save_pretrained(tmp_path / "base")
    during = type(dense).from_pretrained(tmp_path / "base", quantization_config=dq.DQConfig("int8-weight"))
    dq.quantize(dense, "int8-weight", progress=False)
    assert same_state(during, dense)
    dense.save_pretrained(tmp_path / "q")
    assert same_state(type(dense).from_pretrained(tmp_path / "q"), during)


@pytest.mark.parametrize("damage", ["missing", "tampered", "truncated"])
def test_damaged_text_encoder_checkpoint_is_refused(tmp_path, damage):
    model = text_encoder("t5")
    dq.quantize(model, "int8-weight", progress=False)
    model.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "encoder.block.0.layer.0.SelfAttention.q"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    if damage == "missing":
        del state[f"{name}.scale"]
    if damage == "tampered":
        state[f"{name}.weight"].neg_()
    save_file(state, path, metadata=metadata)
    if damage == "truncated":
        with path.open("r+b") as file:
            file.truncate(1000)
    message = {"missing": f"lacks tensor '{name}.scale'", "tampered": f"'{name}.weight': its bytes"}
    with pytest.raises(DQError, match=message.get(damage, "is missing or damaged")):
        T5EncoderModel.from_pretrained(tmp_path)


def test_dequantized_text_encoder_saves_as_an_ordinary_one(tmp_path):
    model = text_encoder("t5")
    dq.quantize(model, "int8-weight", progress=False)
    before = encode(model)
    model.dequantize()
    model.save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert not packed_layers(again)
    assert torch.allclose(encode(again), before, atol=1e-5)


# pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A FLUX pipeline with small random parts and no tokenizers, on disk."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=1, norm_num_groups=8, shift_factor=0.0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    parts = {"text_encoder": text_encoder("clip"), "text_encoder_2": text_encoder("t5")}
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, tokenizer=None, tokenizer_2=None, transformer=transformer, **parts
    )
    folder = str(tmp_path_factory.mktemp("pipeline"))
    pipe.save_pretrained(folder)
    return folder


def open_pipeline(folder, **options) -> FluxPipeline:
    absent = dict.fromkeys(("tokenizer", "tokenizer_2", "feature_extractor", "image_encoder"))
    return FluxPipeline.from_pretrained(folder, **absent, **options)


def draw(pipe: FluxPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": encode(pipe.text_encoder_2), "pooled_prompt_embeds": encode(pipe.text_encoder)[:, 0]}
    generator = torch.Generator().manual_seed(0)
    return pipe(**prompts, height=8, width=8, num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.mark.parametrize("how", ["mapping", "backend"])
def test_pipeline_quantizes_while_loading_and_reloads_the_same_pictures(tmp_path, pipeline, how):
    parts = ["transformer", "text_encoder_2"]
    if how == "mapping":
        config = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, dq.DQConfig("int8")))
    else:
        config = PipelineQuantizationConfig("dq", {"recipe": "int8"}, components_to_quantize=parts)
    pipe = open_pipeline(pipeline, quantization_config=config)
    assert all(packed_layers(getattr(pipe, part)) for part in parts)
    assert not packed_layers(pipe.text_encoder)
    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(open_pipeline(tmp_path)), picture)


def test_saved_pipeline_with_quantized_text_encoder_reloads_the_same_pictures(tmp_path, pipeline):
    pipe = open_pipeline(pipeline)
    dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"}, progress=False)
    picture = draw(pipe)
    dq.save(pipe, tmp_path / "out")
    assert torch.equal(draw(open_pipeline(tmp_path / "out")), picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
