"""Checkpoints for diffusers' `nunchaku_lite` quantizer: its own loader takes them, its own layers draw the same.

The operators stand in torch (tests/kernels/nunchaku_ops.py), on the CPU; what they do on a card is not shown here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file
from torch import nn

import dq
from dq import export, layers
from dq.errors import DQError
from dq.export import nunchaku_lite
from dq.host import saved
from dq.kernels.nunchaku import layout
from dq.plan import LayerPlan, Plan, TensorPlan
from pipelines import tiny
from tests.kernels import nunchaku_ops
from tests.test_cli import refused, run

SOURCE = tiny.folder("tiny-pixart")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (quantized pipeline as dq saved it, as it was exported)."""
    home = tmp_path_factory.mktemp("nunchaku")
    pipe = DiffusionPipeline.from_pretrained(SOURCE, dtype=torch.bfloat16)
    dq.quantize(pipe, "svdquant-int4-nunchaku", calibration=dq.Calibration(steps=2, samples=2), progress=False)
    dq.save(pipe, home / "dq")
    (home / "lite").mkdir()
    nunchaku_lite.write(home / "dq", home / "lite")
    return home / "dq", home / "lite"


@pytest.fixture
def allowed(monkeypatch):
    """diffusers finds a `kernels` package with the operators, allowed by the user, and asks for no card."""
    asked = nunchaku_ops.stand_in(monkeypatch)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_available", True)
    monkeypatch.setattr("diffusers.utils.import_utils._kernels_version", "0.14.0")
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    monkeypatch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    yield asked
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)


def call(model) -> torch.Tensor:
    dice = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 16, 16, generator=dice).to(torch.bfloat16)
    text = torch.randn(2, 8, 128, generator=dice).to(torch.bfloat16)
    with torch.no_grad():
        return model(latents, text, timestep=torch.tensor([300, 700]), return_dict=False)[0].float()


def decibels(truth: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(truth.square().mean() / (truth - other).square().mean()))


def test_the_plan_of_the_recipe_holds_what_the_operators_do(made):
    plan = saved.plans(made[0])["transformer"][1]
    assert all(nunchaku_lite.why_not(layer) is None for layer in plan.layers.values())
    acts = [layer for layer in plan.layers.values() if layer.act is not None]
    assert {str(layer.act) for layer in acts} == {"int4/group:64"}
    assert all(layer.rank % 16 == 0 < layer.rank for layer in acts) and any(layer.smooth for layer in acts)
    assert not any(layer.rotate or layer.act.shift for layer in acts)
    assert any(layer.act is None and layer.role == "time" for layer in plan.layers.values())


def test_diffusers_own_loader_takes_every_tensor_and_invents_none(made, allowed):
    model, info = PixArtTransformer2DModel.from_pretrained(made[1] / "transformer", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert isinstance(model.hf_quantizer, NunchakuLiteQuantizer) and allowed[0][0][0].startswith("rootonchair/")
    stored = load_file(made[1] / "transformer" / nunchaku_lite.WEIGHTS)
    own = model.state_dict()
    assert own.keys() == stored.keys()
    for name, value in stored.items():
        assert (own[name].shape, own[name].dtype) == (value.shape, value.dtype), name
        assert torch.equal(own[name], value), name
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"SVDQW4A4Linear", "AWQW4A16Linear"} <= kinds


def test_the_config_is_one_that_diffusers_checks_and_the_rest_of_the_pipeline_is_as_it_was(made):
    config = json.loads((made[1] / "transformer" / "config.json").read_text())["quantization_config"]
    checked = NunchakuLiteQuantizationConfig(**{key: value for key, value in config.items() if key != "quant_method"})
    assert checked.compute_dtype is torch.bfloat16 and checked.svdq_w4a4["rank"] % 16 == 0
    names = {str(path.relative_to(made[0])) for path in made[0].rglob("*") if path.is_file()}
    there = {str(path.relative_to(made[1])) for path in made[1].rglob("*") if path.is_file()}
    assert there == names
    for name in names:
        if not name.startswith("transformer/"):
            assert (made[1] / name).read_bytes() == (made[0] / name).read_bytes()


def test_the_loaded_model_is_as_near_to_dq_as_two_kernels_of_dq_are_to_each_other(made, allowed):
    theirs = PixArtTransformer2DModel.from_pretrained(made[1] / "transformer")
    ours = PixArtTransformer2DModel.from_pretrained(made[0] / "transformer")
    dq.set_backend("reference", ours)
    truth = call(ours)
    dq.set_backend("dense", ours)
    usual = decibels(truth, call(ours))
    assert decibels(truth, call(theirs)) > usual - 1.5, "codes next to a tie flip in each of them"


def test_each_layer_stands_for_the_weight_that_it_had_to_the_rounding_of_bf16(made):
    ours = PixArtTransformer2DModel.from_pretrained(made[0] / "transformer")
    stored = load_file(made[1] / "transformer" / nunchaku_lite.WEIGHTS)
    for name, layer in layers.packed_layers(ours).items():
        own = {key: stored[f"{name}.{key}"] for key in ("qweight", "wscales")}
        outputs = layer.plan.rows
        if layer.plan.act is None:
            scale, zero = (stored[f"{name}.{key}"].float().T.repeat_interleave(64, 1) for key in ("wscales", "wzeros"))
            weight = (layout.words_back(own["qweight"]).float() + 8) * scale + zero
        else:
            scale = layout.scale_back(own["wscales"].reshape(outputs // 128, -1, 8, 4, 2, 2)).float()
            weight = nunchaku_ops.weight_codes(own["qweight"]).float() * scale.repeat_interleave(64, 1)
            weight = weight / layout.vector_back(stored[f"{name}.smooth_factor"]).float()
            up, down = layout.up_back(stored[f"{name}.proj_up"]), layout.down_back(stored[f"{name}.proj_down"])
            weight = weight + up.float() @ down.float()
        off = (weight - layer.dense_weight()).norm() / layer.dense_weight().norm()
        assert off < 2**-8, name  # two roundings of 2^-9 at most, of scale and of smoothing
        if layer.bias is not None:
            bias = stored[f"{name}.bias"] if layer.plan.act is None else layout.vector_back(stored[f"{name}.bias"])
            assert torch.equal(bias, layer.bias)


def plan_of(shape=(128, 128), weight="int4/group:64", act="int4/group:64", **more) -> LayerPlan:
    return LayerPlan("linear", shape, TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, **more)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of(weight="int8/channel"), "its weight is int8/channel, expected int4/group:64"),
        (plan_of(act="int4a/group:64"), "its activation is int4a/group:64, expected int4/group:64"),
        (plan_of(act="int4/group:64/dynamic/0.171875"), "its activation is int4/group:64/dynamic/0.171875"),
        (plan_of(act="int8/token"), "its activation is int8/token"),
        (plan_of(rotate=64), "its input is rotated in blocks of 64, the operators do not rotate"),
        (plan_of(splits=(64,)), "its input is split, the operators take one whole"),
        (plan_of(start=True), "the output of its first token is stored"),
        (plan_of((128, 192)), "its sizes (128, 192) are no multiples of 128"),
        (plan_of((192, 128)), "its sizes (192, 128) are no multiples of 128"),
        (plan_of((12, 128), act=None), "its sizes (12, 128) are no multiples of 8 outputs and 64 inputs"),
        (plan_of(act=None, rank=16), "a weight-only linear has no branch"),
        (replace(plan_of(), kind="conv2d", shape=(128, 128, 3, 3)), "a conv2d has no operator there"),
    ],
)
def test_what_the_format_cannot_hold_is_named(plan, reason):
    assert reason in nunchaku_lite.why_not(plan)


@pytest.mark.parametrize("plan", [plan_of(), plan_of(smooth=True, rank=5), plan_of((8, 192), act=None, role="time")])
def test_what_it_holds_it_holds(plan):
    assert nunchaku_lite.why_not(plan) is None


def test_the_command_exports_and_refuses_in_one_line_with_the_recipe_that_fits(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(monkeypatch, "export", made[0], "--to", "nunchaku-lite", "--out", out) == 0
    assert f"exported to {out}" in capsys.readouterr().out
    name = f"transformer/{nunchaku_lite.WEIGHTS}"
    assert (out / name).read_bytes() == (made[1] / name).read_bytes()
    pipe = DiffusionPipeline.from_pretrained(SOURCE, dtype=torch.bfloat16)
    dq.quantize(pipe, "int8", progress=False)
    dq.save(pipe, tmp_path / "int8")
    told = refused(monkeypatch, capsys, "export", tmp_path / "int8", "--to", "nunchaku-lite", "--out", tmp_path / "no")
    assert "its weight is int8/channel, expected int4/group:64" in told and "layers do not fit)" in told
    assert "nunchaku-lite holds what `--recipe svdquant-int4-nunchaku` plans" in told
    assert not (tmp_path / "no").exists()
    told = refused(monkeypatch, capsys, "export", SOURCE, "--to", "nunchaku-lite", "--out", tmp_path / "no")
    assert "holds no quantized model" in told
    told = refused(monkeypatch, capsys, "export", made[0], "--to", "nunchaku", "--out", tmp_path / "no")
    known = "comfyui, diffusers-bf16, gguf, nunchaku-lite"
    assert told == f"dq: --to 'nunchaku' is unknown, expected one of {known}. Did you mean 'nunchaku-lite'?"


def saved_linear(folder, dtype):
    """A bare model of one linear, saved by dq under a plan of the format."""
    model = nn.Sequential(nn.Linear(128, 128)).to(dtype)
    dq.quantize(model, Plan({"0": plan_of()}, compute_dtype=str(dtype)[6:]), progress=False)
    dq.save(model, folder)
    return folder


def test_models_of_no_library_and_dtypes_without_operators_are_refused(tmp_path):
    with pytest.raises(DQError, match="is no diffusers model, nunchaku-lite holds those alone"):
        nunchaku_lite.write(saved_linear(tmp_path / "bare", torch.bfloat16), tmp_path)
    pipe = DiffusionPipeline.from_pretrained(SOURCE)
    dq.quantize(pipe, "int4-weight", progress=False)
    dq.save(pipe, tmp_path / "fp32")
    with pytest.raises(
        DQError, match="computes in float32, nunchaku-lite in bf16 or fp16; quantize with --dtype bf16"
    ):
        nunchaku_lite.write(tmp_path / "fp32", tmp_path)


def test_a_layer_of_another_size_is_named_in_a_pattern_to_keep(made):
    plan = saved.plans(made[0])["transformer"][1]
    name = next(name for name, layer in plan.layers.items() if layer.act is not None)
    plan.layers[name] = replace(plan.layers[name], shape=(256, 192))
    with pytest.raises(DQError) as told:
        nunchaku_lite._check("transformer", made[0] / "transformer", plan)
    keep = f"--keep '({name.replace('.', chr(92) + '.')})$'"
    assert f"`--recipe svdquant-int4-nunchaku {keep}` plans" in str(told.value)


def test_scales_that_fp16_rounds_away_are_refused():
    own = {"weight": torch.zeros(128, 64, dtype=torch.int8), "scale": torch.full((128, 2), 1e-5)}
    assert nunchaku_lite.low_rank("a", own, torch.bfloat16, 16)["wscales"].isfinite().all()
    with pytest.raises(DQError, match=r"tensor 'a.scale': 1e-05 is out of the range of torch.float16"):
        nunchaku_lite.low_rank("a", own, torch.float16, 16)


def test_every_target_is_found_by_listing_the_folder():
    assert export.get("nunchaku-lite") is nunchaku_lite
