"""ComfyUI's quantized safetensors, out and in: read by the formulas of its documentation, kept by dq's formats."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dq
from dq import cookbook
from dq.bridges import safe
from dq.errors import DQError
from dq.export import comfyui, dense
from dq.layers import hadamard, packed_layers
from dq.plan import Recipe
from tests import models
from tests.bridges import written
from tests.bridges.test_from_file import decibels

ROTATED = Recipe("rotated", ("int8/channel", None), ("int8/channel", None))


def exported(model, folder, target=comfyui):
    model.save_pretrained(folder / "saved")
    (folder / "out").mkdir()
    return folder / "out", target.write(folder / "saved", folder / "out")


def by_the_book(file) -> dict[str, torch.Tensor]:
    """Full-precision tensors of a file as ComfyUI's guide defines them."""
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        layers = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
    for name, mark in layers.items():
        assert json.loads(bytes(state.pop(f"{name}.comfy_quant").tolist())) == mark
        values = state[f"{name}.weight"].float() * state.pop(f"{name}.weight_scale")
        if mark.get("convrot"):
            turn = torch.block_diag(
                *[hadamard.hadamard(mark["convrot_groupsize"])] * (values.shape[1] // mark["convrot_groupsize"])
            )
            values = values @ turn.T
        state[f"{name}.weight"] = values
    return state


@pytest.mark.parametrize("family", written.FAMILIES)
@pytest.mark.parametrize("recipe", ["int8-weight", "fp8"])
def test_the_file_holds_what_the_model_stands_for_and_comes_back(family, recipe, tmp_path):
    model, _ = written.model(family)
    dq.quantize(model, comfyui.restrict(cookbook.get(recipe)), progress=False)
    out, lines = exported(model, tmp_path)
    again = dq.from_file(out / "model.safetensors", progress=False)
    dq.dequantize(model)
    found, truth = by_the_book(out / "model.safetensors"), written.named(model, True)
    assert found.keys() == truth.keys()
    near = 30 if "rounded anew" in "".join(lines) else 100  # one scale for what is joined
    for name, value in truth.items():
        assert decibels(torch.from_numpy(value), found[name].reshape(value.shape)) > near or not value.any(), name
    assert {str(layer.plan.weight) for layer in packed_layers(again).values()} == {f"{recipe[:4].strip('-')}/channel"}
    assert decibels(models.output(model), models.output(again)) > near


def test_convrot_comes_and_goes_by_its_codes(tmp_path):
    """256 columns a block, one scale a row: dq's rotation is the one of comfy-kitchen."""
    model, config = written.model("qwen_image")
    names = [n for n, p in model.named_parameters() if n.endswith("net.2.weight") and p.shape[1] % 256 == 0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    turn = hadamard.hadamard(256)
    for name in names:
        home = name.removesuffix(".weight")
        rotated = (state[name].reshape(len(state[name]), -1, 256) @ turn.T).reshape(state[name].shape)
        scale = rotated.abs().amax(1, keepdim=True) / 127
        state[name], state[f"{home}.weight_scale"] = (rotated / scale).round().to(torch.int8), scale
        mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        state[f"{home}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    save_file(state, tmp_path / "m.safetensors")
    loaded = dq.from_file(tmp_path / "m.safetensors", config=config, progress=False)
    assert names and {layer.plan.rotate for layer in packed_layers(loaded).values()} == {256}
    assert decibels(models.output(model), models.output(loaded)) > 35
    out, _ = exported(loaded, tmp_path)
    made = load_file(out / "model.safetensors")
    for name in names:
        home = name.removesuffix(".weight")
        assert torch.equal(made[name], state[name]) and torch.equal(
            made[f"{home}.weight_scale"], state[f"{home}.weight_scale"]
        )


@pytest.mark.parametrize("marked", ["scale_weight", "weight_scale", "none"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_and_plain_fp8_files_keep_their_codes(kind, marked, tmp_path):
    model, config = written.model("flux")
    state = {name: torch.from_numpy(value) for name, value in written.named(model, True).items()}
    for name in [name for name, value in state.items() if value.dim() == 2]:
        scale = torch.tensor(1.0 if marked == "none" else 2.0**-9)
        state[name] = (state[name] / scale).to(kind)
        if marked != "none":
            state[f"{name.removesuffix('weight')}{marked}"] = scale
            state[f"{name.removesuffix('weight')}{marked.replace('weight', 'input')}"] = torch.tensor(0.5)
    if marked == "scale_weight":
        state["scaled_fp8"] = torch.zeros(2, dtype=kind)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    save_file(prefixed, tmp_path / "m.safetensors")
    loaded = dq.from_file(tmp_path / "m.safetensors", config=config, progress=False)
    form = "fp8" if kind is torch.float8_e4m3fn else "fp8_e5m2"
    assert {str(layer.plan.weight) for layer in packed_layers(loaded).values()} == {f"{form}/channel"}
    qkv = state["double_blocks.0.img_attn.qkv.weight"].float() * scale
    ours = [packed_layers(loaded)[f"transformer_blocks.0.attn.to_{key}"].dense_weight() for key in "qkv"]
    assert torch.equal(torch.cat(ours), qkv)


def test_int8_blocks_are_decoded(tmp_path):
    codes = torch.randint(-127, 128, (256, 256), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mark = torch.tensor(list(b'{"format": "int8_blockwise", "group_size": 128}'), dtype=torch.uint8)
    save_file({"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": mark}, tmp_path / "m.safetensors")
    found = safe.File(tmp_path / "m.safetensors").stored("a.weight")
    assert found.kept is None
    assert torch.equal(found.dense(), codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1))


BAD = {
    "no JSON": ({"a.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}, "is no JSON"),
    "a list": ({"a.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "is no JSON"),
    "unread": ({"a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}, "'nvfp4' of ComfyUI"),
    "no scale": ({}, "int8 weights and no scale"),
    "zero": ({"a.weight_scale": torch.zeros(())}, "scales of zero or below"),
    "NaN": ({"a.weight_scale": torch.tensor(torch.nan)}, "scales of NaN"),
    "shape": ({"a.weight_scale": torch.ones(3)}, r"scales \(3,\) for weights \(4, 8\)"),
    "turn": (
        {
            "a.weight_scale": torch.ones(()),
            "a.comfy_quant": torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8),
        },
        "ConvRot of 256",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_marks_and_scales_that_do_not_fit_are_named(what, tmp_path):
    more, line = BAD[what]
    save_file({"a.weight": torch.ones(4, 8, dtype=torch.int8), **more}, tmp_path / "m.safetensors")
    with pytest.raises(DQError, match=line):
        safe.File(tmp_path / "m.safetensors").stored("a.weight")


def test_other_layers_are_folded_and_written_in_full_precision(tmp_path):
    model, _ = written.model("flux")
    dq.quantize(model, "int4-weight", progress=False)
    out, lines = exported(model, tmp_path)
    assert any("folded and written in 16 bits" in line for line in lines)
    dq.dequantize(model)
    assert (
        decibels(models.output(model), models.output(dq.from_file(out / "model.safetensors", None, progress=False)))
        > 100
    )
    for recipe in ("nvfp4-weight", "svdquant-int4", "int4-weight"):
        with pytest.raises(DQError, match="fp8 and int8-weight fit"):
            comfyui.restrict(cookbook.get(recipe))


@pytest.mark.parametrize("most", [dense.MOST, 2**18], ids=["one file", "shards"])
def test_ordinary_checkpoints_in_bf16_are_what_the_model_stands_for(most, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "MOST", most)
    pipe = diffusers.DiffusionPipeline.from_pretrained("pipelines/tiny/tiny-pixart")
    dq.quantize(pipe, "int4-weight", progress=False)
    dq.save(pipe, tmp_path / "saved")
    (tmp_path / "out").mkdir()
    lines = dense.write(tmp_path / "saved", tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert "quantization_config" not in again.transformer.config and "layers in bf16" in lines[0]
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) == 1 or most < dense.MOST * 2
    dq.dequantize(pipe)
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value.to(torch.bfloat16)), name
