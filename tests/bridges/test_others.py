"""Models of diffusers' nunchaku_lite quantizer and of torchao, taken over."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import dq
from dq.errors import DQError
from dq.export import nunchaku_lite
from dq.layers import packed_layers
from pipelines import tiny
from tests import models
from tests.bridges import written
from tests.bridges.test_from_file import decibels
from tests.export.test_nunchaku_lite import call
from tests.test_cli import run


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """-> (a quantized transformer, the folder of nunchaku-lite that it was exported to)."""
    home = tmp_path_factory.mktemp("lite")
    pipe = DiffusionPipeline.from_pretrained(tiny.folder("tiny-pixart"), dtype=torch.bfloat16)
    dq.quantize(pipe, "svdquant-int4-nunchaku", calibration=dq.Calibration(steps=2, samples=2), progress=False)
    dq.save(pipe, home / "dq")
    (home / "lite").mkdir()
    nunchaku_lite.write(home / "dq", home / "lite")
    return pipe.transformer, home / "lite" / "transformer"


def test_a_nunchaku_lite_checkpoint_keeps_its_codes_scales_and_branch(lite, tmp_path, monkeypatch):
    ours, folder = lite
    loaded = dq.from_file(folder, dtype="bfloat16", progress=False)
    before, after = packed_layers(ours), packed_layers(loaded)
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert torch.equal(after[name].stored, layer.stored), name
        assert torch.equal(after[name].scale.bfloat16(), layer.scale.bfloat16())
        assert str(after[name].plan.act) == str(layer.plan.act)
        if layer.plan.rank:
            assert decibels(layer.dense_weight(), after[name].dense_weight()) > 40
    assert decibels(call(ours), call(loaded)) > 15  # bf16 scales and smoothing move some 4-bit activations by a step
    loaded.save_pretrained(tmp_path / "dq")
    (tmp_path / "lite").mkdir()
    nunchaku_lite.write(tmp_path / "dq", tmp_path / "lite")
    there, back = (load_file(home / "diffusion_pytorch_model.safetensors") for home in (folder, tmp_path / "lite"))
    assert there.keys() == back.keys()
    assert all(torch.equal(back[key], there[key]) for key in there if "proj_down" not in key)
    words = (
        "quantize",
        folder,
        "--recipe",
        "int8",
        "--pipeline",
        tiny.folder("tiny-pixart"),
        "--out",
        tmp_path / "out",
    )
    assert run(monkeypatch, *words) == 0
    plans = {
        str(layer.plan.weight)
        for layer in packed_layers(DiffusionPipeline.from_pretrained(tmp_path / "out").transformer).values()
    }
    assert plans == {"int8/channel"}


def test_weight_only_zeros_of_any_value_are_held_and_bad_configs_named(lite, tmp_path):
    _, folder = lite
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    name = config["quantization_config"]["awq_w4a16"]["targets"][0]

    def saved(config, state):
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
        return tmp_path

    zeros = state[f"{name}.wzeros"] * 0.875
    loaded = dq.from_file(saved(config, {**state, f"{name}.wzeros": zeros}), dtype="bfloat16", progress=False)
    layer = packed_layers(loaded)[name]
    assert str(layer.plan.weight) == "int4m/group:64" and torch.equal(layer.zero, zeros.T.float())
    lacking = {key: value for key, value in state.items() if key != f"{name}.wscales"}
    with pytest.raises(DQError, match=f"layer '{name}' .*lacks its qweight or wscales"):
        dq.from_file(saved(config, lacking), progress=False)
    with pytest.raises(DQError, match=f"layer '{name}': qweight is"):
        dq.from_file(saved(config, {**state, f"{name}.wscales": state[f"{name}.wscales"][:-1]}), progress=False)
    config["quantization_config"]["svdq_w4a4"]["precision"] = "nvfp4"
    with pytest.raises(DQError, match="svdq_w4a4 is not int4 in groups of 64"):
        dq.from_file(saved(config, state), progress=False)


def test_layers_of_torchao_are_decoded_one_at_a_time(monkeypatch):
    """A tensor that decodes itself, as torchao's do; with torchao itself where it is installed."""
    model, _ = written.model("qwen_image")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    except ImportError:
        _stand_in(model, monkeypatch)
    before = models.output(model)
    with pytest.raises(DQError, match="has no codes that dq has a format for"):
        dq.quantize(model, "stored", progress=False)
    assert torch.equal(models.output(model), before)
    report = dq.quantize(model, "int8", progress=False)
    assert len(packed_layers(model)) == sum(row.weight is not None for row in report.layers) > 10
    assert decibels(before, models.output(model)) > 35
    assert all(type(value.data) is torch.Tensor for value in model.parameters())


def _stand_in(model: nn.Module, monkeypatch) -> None:
    class Int8(torch.Tensor):
        """int8 codes and a scale a row."""

        @staticmethod
        def __new__(cls, codes, scale):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes, scale):
            self.codes, self.scale = codes, scale

        def dequantize(self):
            return self.codes.float() * self.scale

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.detach.default:
                return args[0]
            return func(*(each.dequantize() if isinstance(each, cls) else each for each in args), **(kwargs or {}))

    Int8.__module__ = "torchao.stand_in"
    monkeypatch.setitem(sys.modules, "torchao.stand_in", types.ModuleType("torchao.stand_in"))
    for layer in model.modules():
        if type(layer) is nn.Linear:
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(Int8(codes, scale), requires_grad=False)
