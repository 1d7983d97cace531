"""The nunchaku backend: who it serves, that it is right on stand-ins of the operators, and weights laid out in place.

The operators stand in torch (nunchaku_ops.py) and serve a CPU; what the Hub's do on a card is not shown here.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from dq import kernels, layers
from dq.host import peft
from dq.kernels import Machine, choice, nunchaku, proof, reference
from dq.kernels.nunchaku import layout
from dq.plan import LayerPlan, TensorPlan
from tests.kernels import nunchaku_ops
from tests.kernels.injected import inject

SERVED = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")


def plan_of(shape=(128, 256), weight="int4/group:64", act="int4/group:64", rank=16, **more) -> LayerPlan:
    act = TensorPlan.parse(act) if act else None
    return LayerPlan("linear", shape, TensorPlan.parse(weight), act, rank=rank, **more)


def linear(dtype=torch.bfloat16, bias=True, **more):
    """A packed linear with a branch that matters, and its dq order."""
    torch.manual_seed(0)
    plan = plan_of(**more)
    plain = nn.Linear(plan.shape[1], plan.shape[0], bias=bias).to(dtype).requires_grad_(False)
    made = layers.pack("layer", plain, plan, dtype)
    made.put("proj_down", torch.randn(plan.rank, plan.shape[1]).to(dtype))
    made.put("proj_up", (torch.randn(plan.shape[0], plan.rank) / 16).to(dtype))
    return made


def inputs(rows=37, columns=256, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Layers of a CPU are served by nunchaku beside `dense`, with stand-ins; the times of the choice can be set."""
    monkeypatch.setattr(nunchaku, "why_not", lambda op, plan, device, conv=None: nunchaku._why_not_plan(op, plan))
    monkeypatch.setattr(nunchaku, "_operators", lambda: nunchaku_ops.OPS)
    return inject(monkeypatch, tmp_path, {"nunchaku": 0.1}, nunchaku=nunchaku)


def why_not(monkeypatch, arch="sm_89", plan=None, allowed="true", device="cuda") -> str | None:
    monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_KERNELS", allowed)
    with kernels.imagined(Machine(gpu=arch)):
        return nunchaku.why_not("linear", plan or plan_of(), device)


@pytest.mark.parametrize("arch", SERVED)
def test_cards_that_the_operators_are_built_for_are_served_and_before_dqs_own_kernels(monkeypatch, arch):
    assert why_not(monkeypatch, arch) is None
    with kernels.imagined(Machine(gpu=arch)):
        assert kernels.chosen("linear", plan_of(), "cuda")[0] == "nunchaku"


@pytest.mark.parametrize("arch", ["", "sm_70", "sm_90", "sm_100", "sm_103", "gfx942"])
def test_other_machines_are_refused_by_name(monkeypatch, arch):
    assert f"this is {arch or 'no GPU'}" in why_not(monkeypatch, arch)
    assert why_not(monkeypatch, device="cpu") == "nunchaku's operators run on NVIDIA GPUs, this is cpu"


@pytest.mark.parametrize("allowed", ["", "false", "0"])
def test_nobody_loads_code_from_the_hub_who_did_not_allow_it(monkeypatch, allowed):
    told = why_not(monkeypatch, allowed=allowed)
    assert told == "nunchaku's operators are code from the Hub; set DIFFUSERS_TRUST_REMOTE_KERNELS=true to allow it"


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_of(weight="int8/channel"), "take int4/group:64 x int4/group:64, not int8/channel x int4/group:64"),
        (plan_of(act=None), "not int4/group:64 x floating point"),
        (plan_of(act="int4a/group:64"), "not int4/group:64 x int4a/group:64"),
        (plan_of(act="int4/group:64/dynamic/0.17"), "not int4/group:64 x int4/group:64/dynamic/0.17"),
        (plan_of(shape=(128, 192)), "sizes in multiples of 128, got (128, 192)"),
        (plan_of(rank=0), "a multiple of 16 columns, got 0"),
        (plan_of(rank=24), "a multiple of 16 columns, got 24"),
        (plan_of(splits=(128,)), "an input split needs one product per part"),
    ],
)
def test_plans_that_the_operators_cannot_hold_are_refused(monkeypatch, plan, reason):
    assert reason in why_not(monkeypatch, plan=plan)


def test_operators_that_are_not_there_or_do_not_load_are_a_reason_and_no_exception(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_KERNELS", "true")
    monkeypatch.setattr(kernels, "architecture", lambda: "sm_89")
    assert "need the package kernels (pip install kernels)" in nunchaku.why_not("linear", plan_of(), "cuda")
    monkeypatch.setattr(nunchaku, "find_spec", lambda name: object())
    nunchaku._operators.cache_clear()
    told = nunchaku.why_not("linear", plan_of(), "cuda")
    nunchaku._operators.cache_clear()
    assert told.startswith("nunchaku's operators do not load: ") and "\n" not in told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (384, 1024)])
def test_the_arithmetic_of_the_operators_passes_dqs_own_proof(served, dtype, shape):
    like = torch.empty(0, dtype=dtype)
    assert proof.why_wrong("nunchaku", "linear", plan_of(shape, rank=32), None, like) is None


@pytest.mark.parametrize("what", ["weight", "scale", "up", "down", "vector"])
def test_one_tensor_in_another_order_fails_the_proof(served, monkeypatch, what):
    lay = getattr(layout, what)
    monkeypatch.setattr(layout, what, lambda value: lay(value.flip(0)))
    told = proof.why_wrong("nunchaku", "linear", plan_of((256, 256)), None, torch.empty(0, dtype=torch.bfloat16))
    assert told.startswith("wrong on a small problem: off by")


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_it_serves_holds_its_weights_in_the_operators_order_in_the_same_parameters(served, bias):
    layer = linear(bias=bias)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    parameters = {key: (value, value.nbytes) for key, value in layer.named_parameters()}
    truth = reference.build("linear", layer.plan, None)(inputs(), layer.tensors())
    y = layer(inputs())
    assert layer.choice.backend == "nunchaku" and layer.stored.dim() == layer.scale.dim() == 6
    assert layer.stored.dtype is torch.int8 and layer.scale.dtype is torch.float32
    now = dict(layer.named_parameters())
    assert all(now[key] is value and value.nbytes == size for key, (value, size) in parameters.items())
    assert torch.equal(y, layer(inputs())), "laid before the call or in it"
    assert (y - truth).norm() < 0.05 * truth.norm()
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    assert layer.tensors().weight.dim() == 2 and torch.equal(layer.tensors().scale, before["scale"])


@torch.no_grad()
def test_everything_that_reads_or_replaces_weights_finds_them_in_dqs_order(served):
    layer, other = linear(), linear()
    dense = layer.dense_weight()
    layer(inputs())
    assert layer.stored.dim() == 6 and torch.equal(layer.dense_weight(), dense)
    assert torch.equal(copy.deepcopy(layer)(inputs()), layer(inputs()))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).dense_weight(), dense)
    other.stored.zero_()
    layer.load_state_dict(other.state_dict())
    assert not layer.dense_weight().equal(dense) and layer.stored.dim() == 2
    layer.put("weight", layer.stored.data.clone())  # as a host that brings one tensor after the other
    assert layer(inputs()).isfinite().all()


@torch.no_grad()
def test_another_backend_gets_its_own_order_back_in_place(served):
    layer = linear()
    before = layer.tensors().weight.clone()
    layer(inputs())
    assert layer.stored.dim() == 6
    layer.backend = "dense"
    y = layer(inputs())
    assert torch.equal(layer.stored.data, before) and layer.choice.backend == "dense"
    assert torch.equal(y, kernels.backends()["dense"].build("linear", layer.plan, None)(inputs(), layer.tensors()))


@torch.no_grad()
def test_a_class_of_rows_that_another_kernel_serves_reads_dqs_order_too(served):
    layer = linear()
    layer(inputs())
    served.ms["nunchaku"] = 5.0
    y = layer(inputs(300))
    assert layer._met[torch.bfloat16, 2, 0].backend == "dense" and layer.stored.dim() == 6
    assert torch.equal(y, kernels.backends()["dense"].build("linear", layer.plan, None)(inputs(300), layer.tensors()))


@torch.no_grad()
def test_weights_are_never_laid_again_once_calls_were_served(served):
    layer = linear()
    served.ms["nunchaku"] = 5.0
    layer(inputs())
    assert layer.choice.backend == "dense" and layer.stored.dim() == 2
    served.ms["nunchaku"] = 0.1
    layer(inputs(300))
    assert layer.choice.backend == "nunchaku" and layer.stored.dim() == 2, "a graph may read them where they are"


@torch.no_grad()
def test_what_is_timed_reads_weights_that_were_laid_before(served, monkeypatch):
    dims, lay = [], layout.weight

    def clocked(runs):
        monkeypatch.setattr(layout, "weight", lambda packed: (dims.append(packed.dim()), lay(packed))[1])
        runs["nunchaku"]()
        return dict.fromkeys(runs, 1.0)

    layer = linear()
    monkeypatch.setattr(choice, "clocked", clocked)
    layer(inputs())
    assert dims == []


@torch.no_grad()
def test_a_wrong_operator_is_refused_and_the_layer_is_right(served, monkeypatch):
    wrong = copy.copy(nunchaku_ops.OPS)

    def off(*args):
        nunchaku_ops.gemm_w4a4(*args)
        args[2].mul_(1.02)

    wrong.gemm_w4a4 = off
    monkeypatch.setattr(nunchaku, "_operators", lambda: wrong)
    layer = linear()
    layer(inputs())
    assert layer.choice.backend == "dense" and layer.stored.dim() == 2
    assert dict(layer.choice.refusals)["nunchaku"].startswith("wrong on a small problem")


def test_gradients_and_other_dtypes_take_the_plain_way(served):
    layer = linear(torch.float32)
    layer.backend = "nunchaku"
    plain = kernels.backends()["dense"].build("linear", layer.plan, None)
    x = inputs(dtype=torch.float32)
    assert torch.equal(layer(x), plain(x, layer.tensors())) and layer.stored.dim() == 6
    half = inputs().requires_grad_(True)
    layer(half).sum().backward()
    other = inputs().requires_grad_(True)
    plain(other, layer.tensors()).sum().backward()
    assert torch.equal(half.grad, other.grad)
    assert layer(inputs(0)).shape == (0, 128)


def test_it_is_listed_and_experimental():
    assert kernels.backends()["nunchaku"] is nunchaku and nunchaku.STATUS == "experimental"
    assert choice.mode() in choice.MODES


@torch.no_grad()
def test_a_branch_that_an_adapter_grew_past_a_tile_is_served_by_another_kernel_in_dqs_order(served):
    layer = linear()
    layer(inputs())
    assert layer.stored.dim() == 6
    down, up = torch.randn(4, 256).bfloat16(), torch.randn(128, 4).bfloat16()
    peft.widen(layer, down, up)
    assert layer.plan.rank == 20
    y = layer(inputs())
    assert layer.choice.backend == "dense" and layer.stored.dim() == 2
    assert torch.equal(y, kernels.backends()["dense"].build("linear", layer.plan, None)(inputs(), layer.tensors()))
