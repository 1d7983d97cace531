"""Rounding rows in aten: the formats' own bits, and one generated kernel from what comes before to the codes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import dq
from dq import kernels, layers
from dq.formats import get
from dq.kernels import rows
from dq.kernels.reference import PER_ROW

WIDTH = 64


@pytest.fixture
def x():
    """Rows over six decades, one of zeros, one of one sign."""
    torch.manual_seed(0)
    found = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    found[3] = 0
    found[5] = found[5].abs()
    return found


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_symmetric_codes_and_scales_are_those_of_the_format(name, x):
    expected = get(name).encode(x, PER_ROW)
    codes, scale = rows.symmetric(x, get(name).max_code)
    assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)


@pytest.mark.parametrize("name", ["int8a", "int4a"])
def test_affine_codes_scales_and_zero_points_are_those_of_the_format(name, x):
    expected = get(name).encode(x, PER_ROW)
    codes, scale, zero = rows.affine(x, get(name).bits)
    assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale)
    assert torch.equal(zero, expected.zero)


def test_e4m3_values_and_scales_are_those_of_the_format(x):
    expected = get("fp8").encode(x, PER_ROW)
    codes, scale = rows.e4m3(x)
    assert torch.equal(codes.float(), get("fp8").values_of(expected.codes)) and torch.equal(scale, expected.scale)


def test_mxfp8_codes_and_scales_are_those_of_the_format(x):
    x = torch.cat([x, x * 1e30, x * 1e-37, x * 1e-43, torch.full_like(x, 448), torch.full_like(x, -500)])
    x[11, 50], x[12, 50] = float("inf"), -float("inf")
    expected = get("mxfp8").encode(x)
    codes, scale = rows.mxfp8(x)
    assert torch.equal(scale, expected.scale)
    theirs, ours = get("mxfp8").values_of(expected.codes), codes.float()
    assert torch.equal(ours.nan_to_num(7e7), theirs.nan_to_num(7e7))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_with_nan_of_any_sign_has_the_scale_nan_and_no_other_block(sign, x):
    x[7, 40] = torch.tensor(float("nan")).copysign(torch.tensor(float(sign)))
    for scale in (rows.mxfp8(x)[1], get("mxfp8").encode(x).scale):
        assert (scale == -1).nonzero().tolist() == [[7, 1]]


def test_beyond_a_stored_scale_codes_saturate():
    codes, scale = rows.stored(torch.tensor([[0.5, 1.5, 300.0, -300.0]]), torch.tensor(1.0))
    assert codes.tolist() == [[0, 2, 127, -127]] and scale.shape == (1, 1)


@pytest.mark.parametrize("round_rows", [rows.symmetric, rows.affine, rows.e4m3])
def test_a_row_with_nan_has_the_scale_nan_and_no_other_row(round_rows, x):
    x[7, 2] = float("nan")
    assert round_rows(x)[1].isnan().reshape(-1).nonzero().tolist() == [[7]]


def packed(plan: dq.LayerPlan) -> nn.Module:
    layer = layers.pack("", nn.Linear(*reversed(plan.shape)), plan, torch.float32)
    if plan.smooth:
        layer.put("smooth", torch.rand(plan.shape[1]) + 0.5)
    layer.backend = "torchops"
    return layer.eval()


class Block(nn.Module):
    """Norm, adaLN modulation, q, k, v, their sum as attention, gate and residual; then a GELU feed-forward."""

    def __init__(self, act: str, smooth: bool):
        super().__init__()
        weight = dq.TensorPlan.parse("int8/channel")
        plan = dq.LayerPlan("linear", (WIDTH, WIDTH), weight, dq.TensorPlan.parse(act), smooth=smooth)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.q, self.k, self.v, self.out, self.up, self.down = (packed(plan) for _ in range(6))
        for layer in (self.k, self.v):  # fitted together, as layers of one input are
            layer.smooth = self.q.smooth

    def forward(self, x, shift, scale, gate):
        y = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.out(torch.sin(self.q(y)) + self.k(y) + self.v(y))
        return x + self.down(F.gelu(self.up(x), approximate="tanh"))


@pytest.fixture
def torchops():
    """Torch's int8 product wherever it is right, on processors where it is slow as well."""
    if dict(kernels.asked("linear", PLAIN, "cpu", backend="torchops"))["torchops"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "vnni", lambda: True)
            yield
    else:
        yield


PLAIN = dq.LayerPlan("linear", (64, 64), dq.TensorPlan.parse("int8/channel"), dq.TensorPlan.parse("int8/token"))


CALL = re.compile(r"^\s+(cpp_fused\w*|extern_kernels\._int_mm)\(", re.M)


def calls(block: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """-> (output, "fused" and "product" in the order in which Inductor's code calls them)."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        y, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), *args)
    names = CALL.findall(code[code.index("def call(") :])
    return y, ["fused" if name.startswith("cpp_fused") else "product" for name in names]


@pytest.mark.parametrize("act,smooth", [("int8/token", False), ("int8/token", True)])
def test_all_that_lies_between_two_products_is_one_kernel(act, smooth, torchops):
    torch.manual_seed(0)
    block, x = Block(act, smooth), torch.randn(32, WIDTH)
    args = (x, *(torch.randn(1, WIDTH) for _ in range(3)))
    with torch.no_grad():
        expected = block(*args)
    y, found = calls(block, *args)
    assert (y - expected).norm() < 1e-2 * expected.norm()  # a code next to a tie may be the other one
    between = [
        "fused",
        "product",
    ]  # attention to out; gate, residual to up; GELU to down; what follows is the last one
    assert found == ["fused", *["product"] * 3, *between * 3, "fused"]
