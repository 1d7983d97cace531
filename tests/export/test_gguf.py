"""GGUF out: the same codes, in the names that other programs read, and the same picture through diffusers' loader."""

from __future__ import annotations

import diffusers
import gguf
import numpy as np
import pytest
import torch

import dq
from dq import cookbook, export
from dq.bridges import loading
from dq.errors import DQError
from dq.export import gguf as target
from dq.layers import packed_layers
from dq.plan import Recipe
from pipelines import tiny
from tests import models
from tests.bridges import written
from tests.bridges.test_from_file import converted, decibels
from tests.test_cli import refused, run

ARCHITECTURES = {
    "flux",
    "sd1",
    "sdxl",
    "sd3",
    "aura",
    "hidream",
    "cosmos",
    "ltxv",
    "hyvid",
    "wan",
    "lumina2",
    "qwen_image",
}
each_family = pytest.mark.parametrize("family", written.FAMILIES)


def exported(model, folder):
    """-> (path of the GGUF file of a quantized model, lines for people)."""
    model.save_pretrained(folder / "saved")
    (folder / "out").mkdir()
    lines = target.write(folder / "saved", folder / "out")
    assert [path.name for path in (folder / "out").iterdir()] == ["model.gguf"]
    return folder / "out" / "model.gguf", lines


@each_family
@pytest.mark.parametrize("kind", written.ENCODED)
def test_a_gguf_file_comes_back_with_the_bytes_it_came_with(family, kind, tmp_path):
    model, config = written.model(family)
    source = written.file(tmp_path / "m.gguf", written.named(model, True), kind)
    loaded = dq.from_file(source, config=config, progress=False)
    made, lines = exported(loaded, tmp_path)
    ours, theirs = (
        {t.name.removeprefix("model.diffusion_model."): t for t in gguf.GGUFReader(file).tensors}
        for file in (made, source)
    )
    theirs = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in theirs.items()}
    assert ours.keys() == theirs.keys() and "rounded anew" not in "".join(lines)
    same = [name for name, t in ours.items() if t.tensor_type.name == kind]
    assert len(same) > 10 and all((ours[name].data == theirs[name].data).all() for name in same)
    plain = (name for name in ours if name not in same)
    for name in plain:  # what dq keeps in full precision, convolutions in 16 bits
        truth = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        found = gguf.quants.dequantize(ours[name].data, ours[name].tensor_type)
        assert np.allclose(found, truth, rtol=2**-10, atol=1e-6), name


@each_family
def test_the_file_says_what_it_is_and_needs_no_config(family, tmp_path):
    model, _ = written.model(family)
    dq.quantize(model, "int4-weight", progress=False)
    made, lines = exported(model, tmp_path)
    found = gguf.GGUFReader(made)
    arch = found.fields["general.architecture"].contents()
    assert arch == family and ("read by dq alone" in lines[0]) == (arch not in ARCHITECTURES)
    assert found.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert {"Q4_0", "Q8_0", "F32"} <= {tensor.tensor_type.name for tensor in found.tensors}
    assert all(len(tensor.name.encode()) <= 127 for tensor in found.tensors)
    again = dq.from_file(made, progress=False)
    assert type(again) is type(model) and packed_layers(again)
    dq.dequantize(model)
    assert decibels(models.output(model), models.output(again)) > 55


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "wan", "qwen_image"])
def test_diffusers_own_loader_draws_the_same(family, tmp_path, monkeypatch):
    model, _ = written.model(family)
    dq.quantize(model, "int8-weight", progress=False)
    truth, (made, _) = models.output(model), exported(model, tmp_path)
    given = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    if family == "flux":
        monkeypatch.setitem(
            diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"],
            "checkpoint_mapping_fn",
            lambda checkpoint, **rest: converted("flux", model, checkpoint, monkeypatch),
        )
    loaded = type(model).from_single_file(
        str(made), config=str(tmp_path / "saved"), quantization_config=given, dtype=torch.float32
    )
    assert sum(type(layer).__name__ == "GGUFLinear" for layer in loaded.modules()) > 10
    assert decibels(truth, models.output(loaded)) > 50  # it decodes in fp16


FOLDED = {
    "fp8": Recipe("a", ("fp8/channel", None), ("fp8/channel", None)),
    "nvfp4": Recipe("b", ("nvfp4", None), ("nvfp4", None)),
    "groups of 16": Recipe("c", ("int4/group:16", None), ("int8/channel", None)),
    "8 affine bits": Recipe("d", ("int8a/channel", None), ("int8/channel", None)),
}
HELD = {
    "Q4_0": "int4/group:64",
    "Q5_0": "int4a/group:32",
    "Q4_1": "int4m/group:32",
    "Q5_1": "int5m/channel",
    "Q8_0": "mxfp4/group:32",
}


@pytest.mark.parametrize("what", FOLDED)
def test_what_no_block_type_holds_is_folded_and_rounded_anew(what, tmp_path):
    model, _ = written.model("qwen_image")
    dq.quantize(model, FOLDED[what], progress=False)
    made, lines = exported(model, tmp_path)
    assert "folded and rounded anew to Q8_0 (4" in lines[1]
    dq.dequantize(model)
    assert decibels(models.output(model), models.output(dq.from_file(made, None, progress=False))) > 40


@pytest.mark.parametrize("kind", HELD)
def test_formats_go_to_the_smallest_type_that_has_their_codes(kind, tmp_path):
    model, _ = written.model("qwen_image")
    dq.quantize(model, Recipe("r", (HELD[kind], None), ("int8/channel", None)), progress=False)
    names = [name for name, layer in packed_layers(model).items() if str(layer.plan.weight) == HELD[kind]]
    made, lines = exported(model, tmp_path)
    file = loading.opened(made)
    assert names and {file.tensors[f"{name}.weight"].kind for name in names} == {kind} and "anew" not in lines[1]
    for name in names:
        ours, theirs = packed_layers(model)[name].dense_weight(), file.stored(f"{name}.weight").dense()
        assert decibels(ours, theirs) > 55  # scales in 16 bits, codes as they were


def test_smoothing_rotation_and_branch_are_folded(tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.folder("tiny-pixart"))
    dq.quantize(pipe, "svdquant-int4", calibration=dq.Calibration(steps=2, samples=2), progress=False)
    layers = [layer.plan for layer in packed_layers(pipe.transformer).values()]
    assert any(plan.rank for plan in layers)
    dq.save(pipe, tmp_path / "saved")
    (tmp_path / "out").mkdir()
    lines = target.write(tmp_path / "saved", tmp_path / "out")
    assert lines[0].startswith("transformer.gguf: architecture pixart") and "folded and rounded anew" in lines[1]
    dq.dequantize(pipe)
    again = dq.from_file(tmp_path / "out" / "transformer.gguf", None, progress=False).state_dict()
    for name, value in pipe.transformer.state_dict().items():
        assert decibels(value, again[name]) > 40 or not value.any(), name


def test_scales_that_16_bits_do_not_hold_are_rounded_anew(tmp_path):
    model, _ = written.model("qwen_image")
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.mul_(1e-6)
    dq.quantize(model, "int8-weight", progress=False)
    _, lines = exported(model, tmp_path)
    assert ", 1 folded and rounded anew" in lines[1]


def test_refusals_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.folder("tiny-sd"))
    with pytest.raises(DQError, match="holds no quantized model"):
        target.write(tiny.folder("tiny-sd"), tmp_path)
    other = models.zoo.build("AuraFlowTransformer2DModel")
    dq.quantize(other, "int8", progress=False)
    other.save_pretrained(tmp_path / "aura")
    line = refused(monkeypatch, capsys, "export", tmp_path / "aura", "--to", "gguf", "--out", tmp_path / "x")
    assert "is a AuraFlowTransformer2DModel, gguf files are known of FluxTransformer2DModel, " in line
    assert not (tmp_path / "x").exists()
    for recipe in ("fp8", "nvfp4-weight", "svdquant-int4"):
        with pytest.raises(DQError, match=f"--for gguf: recipe '{recipe}' has more than weights; int8-weight and"):
            target.restrict(cookbook.get(recipe))
    assert pipe is not None


def test_a_recipe_for_gguf_has_weights_alone_and_comes_back_whole(tmp_path, monkeypatch, capsys):
    words = ("quantize", "tiny-pixart", "--recipe", "int8", "--for", "gguf", "--dtype", "fp32")
    assert run(monkeypatch, *words, "--out", tmp_path / "saved") == 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert all(layer.plan.act is None for layer in packed_layers(pipe.transformer).values())
    assert run(monkeypatch, "export", tmp_path / "saved", "--to", "gguf", "--out", tmp_path / "out") == 0
    assert "layers with the codes they have\n" in capsys.readouterr().out
    words = ("quantize", "tiny-pixart", "--recipe", "int8", "--for", "nothing", "--out", tmp_path / "x")
    assert "--for 'nothing' is unknown" in refused(monkeypatch, capsys, *words)
    assert "gguf" in export.targets()
