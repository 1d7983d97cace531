"""Activations without a unit on a GPU are left in floating point: same plan and bytes, closer to the original."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dq import explaining, kernels
from dq.errors import DQError
from dq.formats.base import Granularity
from dq.kernels import Conv, Machine, Tensors, choice, dense, reference, weightonly
from dq.layers import packed
from dq.plan import LayerPlan, TensorPlan

SM_90 = Machine(gpu="sm_90")
GEOMETRY = Conv((2, 1), (1, 1), (1, 1), 1)
CASES = {
    "groups": ("int4/group:16", "int4/group:16", {}),
    "zero points": ("int4a/channel", "int4a/token", {}),
    "nvfp4": ("nvfp4/group:16", "nvfp4/group:16", {}),
    "shift": ("int4/channel", "int4/token", {"shift": 0.17}),
    "low rank": ("int4/group:16", "int4/group:16", {"rank": 4}),
    "splits": ("int4/channel", "int4/token", {"splits": (16,)}),
    "stored scale": ("int4/channel", "int4/tensor", {"scale": "static"}),
    "step table": ("int4/channel", "int4/tensor", {"scale": "table", "steps": 3}),
}


def layer(weight: str, act: str, about: dict) -> tuple[LayerPlan, torch.Tensor, torch.Tensor, Tensors]:
    """-> plan (24, 48), x, the full-precision weight, tensors."""
    dice = torch.Generator().manual_seed(0)
    about = dict(about)
    rounded = TensorPlan.parse(act)
    rounded = TensorPlan(rounded.format, rounded.granularity, about.pop("scale", "dynamic"), about.pop("shift", 0.0))
    plan = LayerPlan("linear", (24, 48), TensorPlan.parse(weight), rounded, **about)
    full, x = (torch.randn(rows, 48, generator=dice) for rows in (24, 7))
    packed: dict = reference.encode(full, plan) | {"bias": torch.randn(24, generator=dice)}
    if plan.rank:
        packed |= {"down": torch.randn(4, 48, generator=dice) / 9, "up": torch.randn(24, 4, generator=dice)}
    if rounded.scale != "dynamic":
        packed["act_scale"] = rounded.spec.fit(x.reshape(1, -1), Granularity("tensor")).scale.reshape(1)
    return plan, x, full, Tensors(**packed)


@pytest.mark.parametrize("case", CASES)
def test_is_full_precision_on_decoded_weights_and_closer_than_emulation(case):
    plan, x, full, t = layer(*CASES[case])
    run = kernels.built("weightonly", (), "linear", plan, None).run
    emulated = kernels.built("dense", (), "linear", plan, None).run
    exact = F.linear(x, reference.weight_decoder(plan)(t), t.bias)
    original = F.linear(x, full, t.bias)
    if t.down is not None:
        branch = x @ t.down.T @ t.up.T
        exact, original = exact + branch, original + branch
    torch.testing.assert_close(run(x, t), exact, rtol=1e-5, atol=1e-5)
    assert (run(x, t) - original).norm() < (emulated(x, t) - original).norm()


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_serves_gpus_without_the_unit(device):
    plan = layer("int5/group:16", "int4/group:16", {})[0]
    with kernels.imagined(SM_90):
        found = kernels.choose("linear", plan, device)
    assert (found.backend, found.weight_only, found.emulated) == ("weightonly", True, False)


def test_a_cpu_emulates_and_hears_nothing_of_it():
    plan = layer("nvfp4/group:16", "nvfp4/group:16", {})[0]
    with kernels.imagined(Machine()):
        found = kernels.choose("linear", plan, "cpu")
    assert (found.backend, found.weight_only, found.emulated) == ("dense", False, True)
    assert "weightonly" not in dict(found.refusals)


@pytest.mark.parametrize("asked", ["dense", "reference"])
def test_emulation_is_there_for_who_asks(asked):
    plan = layer("nvfp4/group:16", "nvfp4/group:16", {})[0]
    with kernels.imagined(SM_90):
        found = kernels.choose("linear", plan, "cuda", backend=asked)
    assert (found.backend, found.weight_only, found.emulated) == (asked, False, True)


def test_a_weight_only_plan_is_not_said_to_be_left_in_floating_point():
    plan = LayerPlan("linear", (24, 48), TensorPlan.parse("int5/group:16"))
    with kernels.imagined(SM_90):
        found = kernels.choose("linear", plan, "cuda")
    assert not found.weight_only and "weightonly" not in dict(found.refusals)


def test_units_that_are_there_are_used():
    plan = LayerPlan("linear", (64, 64), TensorPlan.parse("int8/channel"), TensorPlan("int8", "token"))
    with kernels.imagined(SM_90):
        name, _ = kernels.chosen("linear", plan, "cuda")
    assert not kernels.leaves_floating(name, "linear", plan) and not kernels.emulates(name, "linear", plan)


def test_a_row_of_a_report_has_it_as_a_field():
    plan = layer("nvfp4/group:16", "nvfp4/group:16", {})[0]
    for device, expected in (("cuda", True), ("cpu", False)):
        with kernels.imagined(Machine(gpu="sm_80")):
            found = kernels.choose("linear", plan, device)
        row = explaining.served(explaining.row("", "layer", plan, 0, None, ""), found)
        assert row.weight_only is expected and row.emulated is not expected and row.act == str(plan.act)


CONVOLUTION = LayerPlan("conv2d", (16, 8, 3, 3), TensorPlan.parse("int8/channel"), TensorPlan("int8", "tensor"))


def test_convolutions_on_gpus_are_floating_by_rank_and_integer_where_that_is_faster():
    with kernels.imagined(SM_90):
        said = kernels.asked("conv", CONVOLUTION, "cuda", GEOMETRY)
        assert kernels.chosen("conv", CONVOLUTION, "cuda", GEOMETRY)[0] == "weightonly"
    assert said["torchops"] is None
    name, refusals = choice._decide(
        said, {}, {"weightonly": 2.0, "torchops": 1.0, "dense": 0.5}, {"dense", "reference"}
    )
    assert name == "torchops" and "slower here" in dict(refusals)["weightonly"]


def test_what_emulates_serves_only_where_nothing_else_is_right():
    said = {"torchops": None, "dense": None, "reference": None}
    times, emulating = {"torchops": 9.0, "dense": 1.0}, {"dense", "reference"}
    assert choice._decide(said, {}, times, emulating)[0] == "torchops"
    assert choice._decide(said, {"torchops": "wrong"}, times, emulating)[0] == "dense"


@pytest.mark.parametrize("plan", [CONVOLUTION, LayerPlan("conv3d", (8, 4, 3, 3, 3), TensorPlan.parse("int8/channel"))])
def test_decoded_weights_of_convolutions_are_channels_last_on_gpus(plan):
    shape = plan.shape
    out, last = dense.laid_out(torch.empty(shape, device="meta")), dense.laid_out(torch.empty(shape))
    assert out.stride(1) == 1 and out.shape == torch.Size(shape)
    assert last.is_contiguous()


class Seen(TorchDispatchMode):
    """Names of the operators that run, and the shapes they give."""

    def __init__(self):
        super().__init__()
        self.ops: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func.overloadpacket.__name__, tuple(out.shape)))
        return out


def test_int8_weights_are_scaled_in_the_cast_off_the_cpu():
    plan = LayerPlan("linear", (24, 48), TensorPlan.parse("int8/channel"))
    shapes = Tensors(
        torch.empty(24, 48, dtype=torch.int8, device="meta"), torch.empty(24, 1, device="meta"),
        bias=torch.empty(24, dtype=torch.bfloat16, device="meta"),
    )  # fmt: skip
    with Seen() as seen:
        dense.build("linear", plan, None)(torch.empty(7, 48, dtype=torch.bfloat16, device="meta"), shapes)
    assert [name for name, shape in seen.ops if shape == (7, 24)] == ["addmm"]
    assert [name for name, shape in seen.ops if shape == (24, 48)] == ["empty", "mul"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_in_the_cast_rounds_once(dtype):
    plan = LayerPlan("linear", (24, 48), TensorPlan.parse("int8/channel"))
    t = Tensors(**reference.encode(torch.randn(24, 48, generator=torch.Generator().manual_seed(0)), plan))
    assert torch.equal(dense.scaled(t, dtype), reference.weight_decoder(plan)(t).to(dtype))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_smoothing_rotation_and_branch_stay_valid(kind, monkeypatch):
    monkeypatch.setattr(weightonly, "why_not", lambda *about: None)  # a CPU in place of the card
    torch.manual_seed(0)
    about = {"smooth": True, "rotate": 16, "rank": 4}
    if kind == "linear":
        module, x = torch.nn.Linear(48, 24), torch.randn(7, 48)
        plan = LayerPlan("linear", (24, 48), TensorPlan.parse("int4/channel"), TensorPlan("int4", "token"), **about)
    else:
        module, x = torch.nn.Conv2d(16, 24, 3, stride=(2, 1), padding=1), torch.randn(2, 16, 9, 7)
        shape = (24, 16, 3, 3)
        plan = LayerPlan("conv2d", shape, TensorPlan.parse("int4/channel"), TensorPlan("int4", "tensor"), **about)
    layer = packed.pack("layer", module, plan, torch.float32)
    layer.put("smooth", torch.rand(plan.shape[1]) + 0.5)
    layer.put("proj_up", torch.randn(24, 4) / 9)
    layer.put("proj_down", torch.randn(4, plan.columns) / 9)
    layer.backend = "weightonly"
    assert layer.bind("cpu").backend == "weightonly"
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-4)


def test_studies_ask_for_the_rounding_kernel_of_a_card():
    with kernels.imagined(SM_90):
        assert kernels.with_rounding("conv", CONVOLUTION, "cuda", GEOMETRY) == "torchops"
        assert kernels.with_rounding("linear", layer("nvfp4/group:16", "nvfp4/group:16", {})[0], "cuda") == "dense"


def test_backend_names_are_known():
    assert kernels.known("weightonly") == "weightonly"
    with pytest.raises(DQError):
        kernels.known("weight-only-please")
