"""Weights of 2 to 8 bits, symmetric and affine, on dq's CPU kernels: exact in integer products, within twice torch's
rounding in weight-only ones, decoded to the bit; any shape, on every level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dq import kernels
from dq.kernels import Tensors, reference
from dq.kernels.cpu import library, ops, weightonly  # noqa: F401  defines the ops
from tests.kernels.levels import each_level, generator, level, levels  # noqa: F401
from tests.kernels.test_cpu_kernels import linear
from tests.kernels.test_kernels import plan, tensors, truth_and_torch

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))
few = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 150)
formats = st.builds("int{}{}".format, st.integers(2, 8), st.sampled_from(("", "a")))
grains = st.sampled_from(("channel", "tensor", "group:64", "group:32", "group:16", "group:20", "group:8"))
dtypes = st.sampled_from(list(ops.DTYPES))


def within(ours, truth, theirs, dtype):
    """Sums of fp32 are rounded at every step, of torch and of ours: some units in the last place of the largest."""
    room = 2 * (theirs - truth).abs().max() + 8 * torch.finfo(dtype).eps * truth.abs().max() + 1e-6
    assert ours.dtype == dtype and (ours.float() - truth).abs().max() <= room


# --- integer products ------------------------------------------------------------------------------------------------


@each_level
@few
@given(weight=formats, rows=sizes, columns=st.integers(1, 300), outputs=sizes, seed=st.integers(0, 99))
def test_sums_of_every_width_are_exact(weight, rows, columns, outputs, seed):
    """Rows whose largest entry is 127 have scale 1: the result is the integer product, to the bit."""
    p, make = plan("linear", (outputs, columns), f"{weight}/channel"), generator(seed)
    spec = p.weight.spec
    low, high = spec.min_code, spec.max_code + 1
    codes = torch.randint(low, high, (outputs, columns), generator=make).to(torch.int8)
    zero = torch.randint(low, high, (outputs, 1), generator=make).to(torch.int8) if spec.affine else None
    x = torch.randint(-127, 128, (rows, columns), generator=make).float()
    x[:, 0] = 127
    y = linear(x, Tensors(spec.pack(codes), torch.ones(outputs, 1), zero), p, zero=zero)
    expected = codes.double() if zero is None else codes.double() - zero.double()
    assert torch.equal(y.double(), x.double() @ expected.t())


@each_level
@pytest.mark.parametrize("weight", ["int5", "int4a", "int7a", "int8a"])
def test_sums_of_the_largest_codes_do_not_saturate(weight):
    """Every column at the end of both ranges, where a narrower sum or code would wrap."""
    p = plan("linear", (70, 15360), f"{weight}/channel")
    spec, columns = p.weight.spec, 15360
    for code, zero in ((spec.min_code, spec.max_code), (spec.max_code, spec.min_code)):
        given = torch.full((70, 1), zero, dtype=torch.int8) if spec.affine else None
        packed = spec.pack(torch.full((70, columns), code, dtype=torch.int8))
        step = code - zero if spec.affine else code
        for sign in (1.0, -1.0):
            y = linear(torch.full((7, columns), 127.0 * sign), Tensors(packed, torch.ones(70, 1)), p, zero=given)
            assert torch.equal(y, torch.full((7, 70), sign * 127.0 * step * columns))


@each_level
@few
@given(
    weight=formats,
    grain=st.sampled_from(("channel", "tensor", "group:64", "group:20")),
    act=st.sampled_from(("int8/token", "int8a/token", "int4/token", "int8a/token/dynamic/0.17")),
    rows=sizes,
    columns=st.integers(4, 300),
    outputs=sizes,
    dtype=dtypes,
)
def test_layers_of_every_width_follow_the_reference(weight, grain, act, rows, columns, outputs, dtype):
    p = plan("linear", (outputs, columns), f"{weight}/{grain}", act)
    assert kernels.cpu.why_not("linear", p, "cpu") is None
    t, x = tensors(p, dtype), torch.randn(rows, columns, generator=generator(rows)).to(dtype)
    truth = reference.build("linear", p, None)(x.float(), t)
    ours = kernels.cpu.build("linear", p, None)(x, t)
    room = 4e-6 if dtype is torch.float32 else 2.0**-8 * 1.01  # half a unit of bf16
    assert (ours.float() - truth).abs().max() <= room * truth.abs().max() + 1e-6


# --- decoding --------------------------------------------------------------------------------------------------------


@each_level
@few
@given(weight=formats, grain=grains, rows=sizes, columns=st.integers(1, 300), dtype=dtypes)
def test_decoding_is_the_references_to_the_bit(weight, grain, rows, columns, dtype):
    p = plan("linear", (rows, columns), f"{weight}/{grain}", None)
    t = tensors(p)
    stored = {"weight_bits": p.weight.spec.bits, "weight_group": p.weight.grain.size or 0, "zero": t.zero}
    ours = torch.ops.dq.cpu_decode(t.weight, t.scale, columns=columns, dtype=dtype, **stored)
    assert torch.equal(ours, reference.weight_decoder(p)(t).to(dtype))


@each_level
@pytest.mark.parametrize("weight", ["int4/channel", "int5a/group:8", "int8/tensor"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", list(ops.DTYPES), ids=str)
def test_weight_only_convolutions_follow_the_reference(weight, dtype, groups):
    conv = kernels.Conv((2, 1), (1, 0), (1, 1), groups)
    p = plan("conv2d", (10, 6 // groups, 3, 3), weight, None, rank=2 if groups == 1 else 0)
    assert kernels.cpu.why_not("conv", p, "cpu", conv) is None
    t, x = tensors(p, dtype), torch.randn(2, 6, 9, 8, generator=generator(0)).to(dtype)
    truth, theirs = truth_and_torch("conv", p, conv, x, t)
    within(kernels.cpu.build("conv", p, conv)(x, t), truth, theirs, dtype)


# --- weight-only products --------------------------------------------------------------------------------------------


@each_level
@pytest.mark.parametrize("weight", ["int4/group:32+channel", "int3/group:20+channel", "int2/group:8+channel"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", list(ops.DTYPES), ids=str)
def test_two_level_scales_are_multiplied_out(weight, rows, dtype):
    p = plan("linear", (70, 130), weight, None)
    t, x = tensors(p, dtype), torch.randn(rows, 130, generator=generator(rows)).to(dtype)
    truth, theirs = truth_and_torch("linear", p, None, x, t)
    within(kernels.cpu.build("linear", p, None)(x, t), truth, theirs, dtype)
    image, conv = x[..., None, None], kernels.Conv((1, 1), (0, 0), (1, 1), 1)
    p = plan("conv2d", (70, 130, 1, 1), weight, None)
    truth, theirs = truth_and_torch("conv", p, conv, image, t)
    within(kernels.cpu.build("conv", p, conv)(image, t), truth, theirs, dtype)


@each_level
@few
@given(
    weight=formats,
    grain=grains,
    rows=st.one_of(st.integers(1, 20), sizes),
    columns=st.integers(1, 700),
    outputs=sizes,
    rank=st.sampled_from((0, 0, 3, 16)),
    dtype=dtypes,
)
def test_weight_only_linears_are_within_twice_torchs_rounding(weight, grain, rows, columns, outputs, rank, dtype):
    p = plan("linear", (outputs, columns), f"{weight}/{grain}", None, rank=rank)
    t, x = tensors(p, dtype), torch.randn(rows, columns, generator=generator(rows)).to(dtype)
    truth, theirs = truth_and_torch("linear", p, None, x, t)
    within(kernels.cpu.build("linear", p, None)(x, t), truth, theirs, dtype)


@each_level
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", list(ops.DTYPES), ids=str)
def test_the_gelu_of_a_weight_only_linear_is_torchs(rows, dtype):
    p = plan("linear", (77, 130), "int4a/group:32", None, rank=4)
    t, x = tensors(p, dtype), torch.randn(rows, 130, generator=generator(0)).to(dtype) * 0.2
    truth, theirs = (F.gelu(y, approximate="tanh") for y in truth_and_torch("linear", p, None, x, t))
    within(kernels.cpu.build_gelu(p)(x, t), truth, theirs, dtype)


@each_level
@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize("weight", ["int4/group:64", "int6a/channel"])
def test_threads_do_not_change_a_bit_of_weight_only_linears(rows, weight):
    p, before = plan("linear", (300, 1100), weight, None), torch.get_num_threads()
    t, x, results = tensors(p, torch.bfloat16), torch.randn(rows, 1100).bfloat16(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.cpu.build("linear", p, None)(x, t))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_level
def test_no_rows_and_strided_rows():
    p = plan("linear", (40, 61), "int5/channel", None)
    run, t, wide = kernels.cpu.build("linear", p, None), tensors(p), torch.randn(7, 200)
    assert run(torch.empty(2, 0, 61), t).shape == (2, 0, 40)
    assert torch.equal(run(wide[:, 3:64], t), run(wide[:, 3:64].clone(), t))


@pytest.mark.parametrize("rows", [4, 40])
def test_what_the_kernels_do_not_take_runs_dense(rows):
    """Gradients, and dtypes that the ops do not have."""
    p = plan("linear", (40, 64), "int4/channel", None)
    run, t, x = kernels.cpu.build("linear", p, None), tensors(p), torch.randn(rows, 64, requires_grad=True)
    run(x, t).sum().backward()
    assert torch.allclose(x.grad, reference.weight_decoder(p)(t).sum(0).expand(rows, 64), rtol=1e-5, atol=1e-5)
    assert run(x.detach().double(), t).dtype == torch.float64


def test_ops_are_proper_torch_ops_and_compile_to_one_graph():
    p = plan("linear", (48, 64), "int5a/group:32", None, rank=4)
    t, x = tensors(p), torch.randn(5, 64)
    stored, tests = {"weight_bits": 5, "weight_group": 32, "zero": t.zero}, ("test_schema", "test_faketensor")
    check = lambda op, given, named: torch.library.opcheck(op, given, named, test_utils=tests)  # noqa: E731
    check(torch.ops.dq.cpu_weight_only, (x, t.weight, t.scale), stored | {"bias": t.bias, "gelu": True})
    check(torch.ops.dq.cpu_decode, (t.weight, t.scale), stored | {"columns": 64, "dtype": torch.bfloat16})
    run = kernels.cpu.build("linear", p, None)
    assert torch.equal(torch.compile(run, fullgraph=True)(x, t), run(x, t))
