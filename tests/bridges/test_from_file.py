"""A denoiser out of a GGUF file: by the file's codes or rounded anew, in diffusers' names or those of the authors."""

from __future__ import annotations

import json
import sys

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs

import dq
from dq import cookbook
from dq.bridges import layouts, loading, naming
from dq.errors import DQError
from dq.layers import packed_layers
from tests import models
from tests.bridges import written
from tests.test_cli import refused, run

each_family = pytest.mark.parametrize("family", written.FAMILIES)


def decibels(truth: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(truth.square().mean() / (truth - other).square().mean().clamp(min=1e-30)))


def same_as_the_library(file, model, config) -> None:
    """Every weight of a model loaded from a file is, to the bit, what the library decodes of the file."""
    dense = loading.load(file, None, config)[0].state_dict()
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.dense_weight(), dense[f"{name}.weight"]), name


@each_family
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "authors' names"])
def test_codes_of_a_file_are_kept_in_every_family(family, original, tmp_path):
    model, config = written.model(family)
    truth = models.output(model)
    file = written.file(tmp_path / "m.gguf", written.named(model, original), "Q8_0")
    loaded = dq.from_file(file, config=config, progress=False)
    plans = {str(layer.plan.weight) for layer in packed_layers(loaded).values()}
    assert plans == {"int8/group:32"} and len(packed_layers(loaded)) > 10
    same_as_the_library(file, loaded, config)
    assert decibels(truth, models.output(loaded)) > 34  # 8 bits of random weights
    loaded.save_pretrained(tmp_path / "saved")
    again = type(loaded).from_pretrained(tmp_path / "saved")
    assert torch.equal(models.output(again), models.output(loaded))


@pytest.mark.parametrize("kind", [kind for kind in written.HALVES if kind != "Q8_0"])
def test_codes_of_every_type_are_kept_or_decoded(kind, tmp_path):
    model, config = written.model("qwen_image")
    file = written.file(tmp_path / "m.gguf", written.named(model, False), kind)
    assert sum(info.kind == kind for info in loading.opened(file).tensors.values()) > 4
    if kind.startswith("IQ"):
        with pytest.raises(DQError, match="no weight has codes that dq has a format for"):
            dq.from_file(file, config=config, progress=False)
        loaded = dq.from_file(file, "int8-weight", config=config, progress=False)
    else:
        loaded = dq.from_file(file, config=config, progress=False)
        same_as_the_library(file, loaded, config)
    assert models.output(loaded).isfinite().all()


@pytest.mark.parametrize("recipe", ["int8", "int4-weight", "stored-int8"])
def test_a_file_is_rounded_anew_as_its_decoded_model_would_be(recipe, tmp_path):
    model, config = written.model("flux")
    file = written.file(tmp_path / "m.gguf", written.named(model, True), "Q8_0")
    loaded = dq.from_file(file, recipe, config=config, progress=False)
    if recipe == "stored-int8":
        acts = [layer.plan.act for layer in packed_layers(loaded).values()]
        assert {str(act) for act in acts} == {"int8/token", "None"}
        same_as_the_library(file, loaded, config)
        return
    plain = dq.from_file(file, None, config=config, progress=False)
    assert not packed_layers(plain)
    dq.quantize(plain, recipe, progress=False)
    assert torch.equal(models.output(loaded), models.output(plain))


def converted(family: str, model, state: dict, monkeypatch) -> dict:
    """A file's tensors as diffusers' own conversion names and cuts them."""
    if family == "flux":  # it has FLUX's width in its text
        own = theirs.convert_flux_transformer_checkpoint_to_diffusers
        width = model.config.num_attention_heads * model.config.attention_head_dim
        consts = tuple(width if const == 3072 else const for const in own.__code__.co_consts)
        monkeypatch.setattr(own, "__code__", own.__code__.replace(co_consts=consts))
        return own(state)
    convert = {
        "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
        "wan": theirs.convert_wan_transformer_to_diffusers,
        "sdxl": theirs.convert_ldm_unet_checkpoint,
    }[family]
    return convert(state, config=dict(model.config))


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "sdxl"])
def test_the_tables_of_names_are_the_inverse_of_diffusers_conversions(family, monkeypatch):
    model, _ = written.model(family)
    state = {name: torch.from_numpy(value) for name, value in written.named(model, True).items()}
    assert not set(state) & set(model.state_dict()) or family in ("wan", "sd3"), "the authors' names are others"
    found = converted(family, model, dict(state), monkeypatch)
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].reshape(value.shape), value) for name, value in wanted.items())


def test_families_without_a_table_go_by_diffusers_conversion(tmp_path):
    """LTX: renamed alone; the conversion is run on row numbers."""
    model = models.zoo.build("LTXVideoTransformer3DModel")
    config = {**model.config, "_class_name": "LTXVideoTransformer3DModel"}
    assert layouts.of("LTXVideoTransformer3DModel", config) is None
    names = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
    state = {}
    for name, value in written.named(model, False).items():
        for ours, file in names.items():
            name = ".".join(file if part == ours else part for part in name.split("."))
        state[name] = value
    file = written.file(tmp_path / "m.gguf", state, "Q8_0")
    loaded = dq.from_file(file, config=config, progress=False)
    same_as_the_library(file, loaded, config)


def test_a_conversion_that_computes_is_not_trusted(monkeypatch):
    from diffusers.loaders import single_file_model

    known = {"checkpoint_mapping_fn": lambda checkpoint: {name: value * 2 + 1 for name, value in checkpoint.items()}}
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "Odd", known)
    with pytest.raises(DQError, match="file f lacks tensor 'a'"):
        naming.pieces(type("Odd", (), {}), {}, {"a": (4, 3)}, {"b": (4, 3), "c": (2,)}, "file f")


def test_missing_tensors_and_other_sizes_are_named(tmp_path):
    model, config = written.model("flux")
    state = written.named(model, True)
    lost = state.pop("single_blocks.0.linear1.weight")
    with pytest.raises(DQError, match=r"lacks tensor 'single_blocks.0.linear1.weight', of which 'single_transformer"):
        dq.from_file(written.file(tmp_path / "a.gguf", state), "int8", config=config)
    state["single_blocks.0.linear1.weight"] = lost[:-1]
    with pytest.raises(DQError, match=r"tensor 'single_blocks.0.linear1.weight' is \(\d+, \d+\), Flux"):
        dq.from_file(written.file(tmp_path / "b.gguf", state), "int8", config=config)


def test_wrong_use_is_one_line(tmp_path):
    model, config = written.model("qwen_image")
    file = written.file(tmp_path / "m.gguf", written.named(model, False))
    with pytest.raises(DQError, match="no weight has codes that dq has a format for; name a recipe"):
        dq.from_file(file, config=config)
    with pytest.raises(DQError, match="needs calibration; load with recipe=None"):
        dq.from_file(file, "svdquant-int4", config=config)
    with pytest.raises(DQError, match="is for 'Nothing', expected a model class of diffusers"):
        dq.from_file(file, "int8", config={"_class_name": "Nothing"})
    with pytest.raises(DQError, match="num_layers is out of bounds"):
        dq.from_file(file, "int8", config={**config, "num_layers": 2**40})
    with pytest.raises(DQError, match="recipe 'stored' keeps codes that weights have already"):
        cookbook.get("stored")
    with pytest.raises(DQError, match="has no codes that dq has a format for"):
        dq.quantize(model, "stored")


def test_the_package_gguf_is_asked_for(tmp_path, monkeypatch):
    from dq.bridges import gguf as ours

    model, config = written.model("qwen_image")
    file = written.file(tmp_path / "m.gguf", written.named(model, False))
    ours.library.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    try:
        with pytest.raises(DQError, match=r"GGUF files need the package gguf: pip install 'dq-diffusion\[gguf\]'"):
            dq.from_file(file, "int8", config=config)
    finally:
        ours.library.cache_clear()


@pytest.fixture
def loaded_by_diffusers(tmp_path):
    """-> load(kind): a fresh model with diffusers' GGUF layers, and the file it is of."""
    model, config = written.model("qwen_image")
    model.save_pretrained(tmp_path / "model")

    def load(kind: str):
        file = written.file(tmp_path / f"{kind}.gguf", written.named(model, False), kind)
        given = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        return diffusers.QwenImageTransformer2DModel.from_single_file(
            str(file), config=str(tmp_path / "model"), quantization_config=given, dtype=torch.float32
        ), file

    return load, config


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_model_of_diffusers_gguf_loader_keeps_its_codes(loaded_by_diffusers, kind):
    load, config = loaded_by_diffusers
    model, file = load(kind)
    theirs_out = models.output(model)
    report = dq.quantize(model, "stored", progress=False)
    assert report.bytes_after < report.bytes_before / 2
    assert decibels(theirs_out, models.output(model)) > 55  # diffusers decodes in fp16
    assert torch.equal(models.output(model), models.output(dq.from_file(file, config=config, progress=False)))
    same_as_the_library(file, model, config)


def test_a_model_of_diffusers_gguf_loader_is_rounded_anew_or_left_as_it_was(loaded_by_diffusers, monkeypatch):
    load, _ = loaded_by_diffusers
    model, _file = load("Q8_0")
    before, kinds = models.output(model), [type(layer) for layer in model.modules()]
    with pytest.raises(DQError, match="keep pattern 'nothing'"):
        dq.quantize(model, "int8", keep="nothing")
    from dq.bridges import adopting

    with monkeypatch.context() as broken:
        broken.setattr(adopting, "pack", lambda *a: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            dq.quantize(model, "int8", progress=False)
    assert [type(layer) for layer in model.modules()] == kinds and torch.equal(models.output(model), before)
    assert type(model.hf_quantizer).__name__ == "GGUFQuantizer"
    dq.quantize(model, "int8", progress=False)
    assert not any(type(layer).__name__ == "GGUFLinear" for layer in model.modules())
    assert decibels(before, models.output(model)) > 35


def test_the_command_line_takes_a_file_with_the_pipeline_it_belongs_to(tmp_path, monkeypatch, capsys):
    pipe = diffusers.DiffusionPipeline.from_pretrained("pipelines/tiny/tiny-pixart")
    file = written.file(tmp_path / "pix.gguf", written.named(pipe.transformer, False), "Q8_0", "pixart")
    source = "pipelines/tiny/tiny-pixart"
    out = tmp_path / "out"
    words = ("quantize", file, "--recipe", "stored", "--pipeline", source, "--dtype", "fp32", "--out", out)
    assert run(monkeypatch, *words) == 0
    made = diffusers.DiffusionPipeline.from_pretrained(out)
    assert {str(layer.plan.weight) for layer in packed_layers(made.transformer).values()} == {"int8/group:32"}
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["plan"]["recipe"] == "stored"
    alone = tmp_path / "alone"
    words = ("quantize", file, "--recipe", "int8", "--pipeline", f"{source}/transformer", "--out", alone)
    assert run(monkeypatch, *words) == 0
    assert (alone / "config.json").is_file() and not (alone / "model_index.json").exists()
    fresh = ("--recipe", "int8", "--out", tmp_path / "x")
    line = refused(monkeypatch, capsys, "quantize", source, "--pipeline", source, *fresh)
    assert "--pipeline goes with a single file" in line
    assert "does not say what model it is of" in refused(monkeypatch, capsys, "quantize", file, *fresh)
    assert not (tmp_path / "x").exists()


def test_a_fitted_recipe_takes_a_file_as_it_takes_its_decoded_model(tmp_path, monkeypatch):
    source, short = "pipelines/tiny/tiny-pixart", ("--steps", 1, "--samples", 2, "--dtype", "fp32")
    pipe = diffusers.DiffusionPipeline.from_pretrained(source)
    file = written.file(tmp_path / "pix.gguf", written.named(pipe.transformer, False), "Q8_0", "pixart")
    words = ("quantize", file, "--recipe", "gptq-int4-weight", "--pipeline", source, *short, "--out", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    pipe.transformer = dq.from_file(file, None, config=pipe.transformer.config, progress=False)
    pipe.save_pretrained(tmp_path / "plain")
    words = ("quantize", tmp_path / "plain", "--recipe", "gptq-int4-weight", *short, "--out", tmp_path / "same")
    assert run(monkeypatch, *words) == 0
    made, same = (diffusers.DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("out", "same"))
    layers = packed_layers(made)
    assert {str(layer.plan.weight) for layer in layers.values()} >= {
        "int4/group:64"
    } and layers.keys() == packed_layers(same).keys()
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in made.state_dict().items())
