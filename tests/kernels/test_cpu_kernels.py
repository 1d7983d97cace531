"""dq's native CPU kernels: exact integer sums, the reference's own codes, every epilogue, any shape, any threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dq import kernels, layers
from dq.kernels import Tensors, reference
from dq.kernels.cpu import compile as source
from dq.kernels.cpu import library, ops
from dq.plan import LayerPlan, TensorPlan
from tests.kernels.levels import each_level, generator, level, levels  # noqa: F401

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))
wide = pytest.mark.skipif(library.missing("avx512") is not None, reason=str(library.missing("avx512")))
few = settings(max_examples=40, deadline=None, derandomize=True)
sizes = st.integers(1, 200)


def plan(shape, weight="int8/channel", act="int8/token", kind="linear", **more):
    return LayerPlan(kind, tuple(shape), TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, **more)


def tensors(p, bias=None, seed=0):
    packed = layers.encode(torch.randn(p.rows, p.columns, generator=generator(seed)), p)
    return Tensors(packed["weight"], packed["scale"], scale_global=packed.get("scale_global"), bias=bias)


def linear(x, t, p, **more):
    """The linear op on the tensors of a layer."""
    groups = [grain.size if grain.kind == "group" else 0 for grain in (p.weight.grain, p.act.grain)]
    scale, more = t.scale, dict(more)
    if p.weight.grain.two_level:
        scale, groups = t.scale_global, (0, groups[1])
        more |= {"multiplier": t.scale, "multiplier_group": p.weight.grain.size}
    fixed = {"weight_bits": p.weight.spec.bits, "act_bits": p.act.spec.bits, "act_affine": p.act.spec.affine}
    fixed |= {
        "weight_group": groups[0],
        "act_group": groups[1],
        "shift": p.act.shift,
        "clip": p.act.clip,
        "bias": t.bias,
    }
    return torch.ops.dq.cpu_linear(x, t.weight, scale, **fixed, **more)


def ulps(ours, truth):
    """Largest distance in units of the last place of bf16, at the size of each number, 2^-20 at least."""
    step = torch.finfo(torch.bfloat16).eps * truth.abs().clamp_min(2.0**-20).log2().floor().exp2()
    return ((ours.float() - truth) / step).abs().max().item()


# --- integers --------------------------------------------------------------------------------------------------------


@each_level
@few
@given(rows=sizes, columns=st.integers(1, 300), outputs=sizes, bits=st.sampled_from((8, 4)), seed=st.integers(0, 99))
def test_sums_are_exact(rows, columns, outputs, bits, seed):
    """Rows whose largest entry is 127 have scale 1: the result is the integer product, to the bit."""
    p, make = plan((outputs, columns), f"int{bits}/channel"), generator(seed)
    top = p.weight.spec.max_code
    codes = torch.randint(-top, top + 1, (outputs, columns), generator=make).to(torch.int8)
    x = torch.randint(-127, 128, (rows, columns), generator=make).float()
    x[:, 0] = 127
    y = linear(x, Tensors(p.weight.spec.pack(codes), torch.ones(outputs, 1)), p)
    assert torch.equal(y.double(), x.double() @ codes.double().t())


@each_level
@few
@given(
    act=st.sampled_from(("int4/group:32", "int4a/group:32", "int4a/group:32/dynamic/0.17", "int8a/token")),
    rows=sizes,
    outputs=sizes,
    clip=st.sampled_from((0.95, 0.8, 0.6)),
    seed=st.integers(0, 99),
)
def test_codes_cover_a_part_of_the_range_as_the_reference_has_it(act, rows, outputs, clip, seed):
    """With one weight of 1 a row every output shows one rounded input."""
    act = replace(TensorPlan.parse(act), clip=clip)
    weight = TensorPlan.parse("int4/group:32" if act.grain.size else "int4/channel")
    p = LayerPlan("linear", (outputs, 96), weight, act)
    x = torch.randn(rows, 96, generator=generator(seed))
    codes = torch.zeros(outputs, 96, dtype=torch.int8)
    codes[torch.arange(outputs), torch.arange(outputs) % 96] = 1
    t = Tensors(p.weight.spec.pack(codes), torch.ones(p.weight.grain.scale_shape(outputs, 96)))
    rounded = reference.input_rounder(p, -1)(x, None)
    assert not torch.equal(rounded, reference.input_rounder(replace(p, act=replace(act, clip=1.0)), -1)(x, None))
    torch.testing.assert_close(linear(x, t, p), rounded[:, torch.arange(outputs) % 96], rtol=1e-6, atol=1e-6)


@each_level
def test_sums_do_not_saturate():
    p = plan((70, 15360))
    for sign in (1.0, -1.0):
        weight = torch.full((70, 15360), 127, dtype=torch.int8)
        y = linear(torch.full((7, 15360), 127.0 * sign), Tensors(weight, torch.ones(70, 1)), p)
        assert torch.equal(y, torch.full((7, 70), sign * 127.0 * 127 * 15360))


@each_level
@pytest.mark.parametrize(("byte", "code"), [(0x77, 7), (0x88 - 256, -8)])
def test_sums_of_the_largest_int4_codes_do_not_saturate(byte, code):
    """All columns at the end of both ranges: sums in 16 bits hold sixteen of these products, and not one more."""
    p = plan((70, 15360), "int4/channel")
    weight = torch.full((70, 7680), byte, dtype=torch.int8)
    for sign in (1.0, -1.0):
        y = linear(torch.full((7, 15360), 127.0 * sign), Tensors(weight, torch.ones(70, 1)), p)
        assert torch.equal(y, torch.full((7, 70), sign * 127.0 * code * 15360))


@each_level
@few
@given(
    rows=sizes,
    columns=st.integers(1, 300),
    outputs=sizes,
    group=st.sampled_from((32, 64, 96)),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_under_two_level_scales_are_exact(rows, columns, outputs, group, affine, seed):
    """Of int4 codes times multipliers of up to 16: integers, whatever the group and the order they are summed in."""
    p, make = (
        plan((outputs, columns), f"int4/group:{group}+channel", "int8a/token" if affine else "int8/token"),
        generator(seed),
    )
    codes = torch.randint(-8, 8, (outputs, columns), generator=make).to(torch.int8)
    times = torch.randint(1, 17, p.weight.grain.scale_shape(outputs, columns), generator=make).to(torch.int8)
    x = torch.randint(-127, 128, (rows, columns), generator=make).float()
    x[:, 0] = -128 if affine else 127
    if affine and columns > 1:
        x[:, 1] = 127
    t = Tensors(p.weight.spec.pack(codes), times, scale_global=torch.ones(outputs, 1))
    whole = codes.double() * times.repeat_interleave(group, 1)[:, :columns]
    if columns > 1 or not affine:
        assert torch.equal(linear(x, t, p).double(), x.double() @ whole.t())


@each_level
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_codes_and_multipliers_do_not_overflow(sign):
    p = plan((70, 64_992), "int4/group:32+channel")
    codes, times = torch.full((70, 64_992), -8, dtype=torch.int8), torch.full((70, 2031), 16, dtype=torch.int8)
    t = Tensors(p.weight.spec.pack(codes), times, scale_global=torch.ones(70, 1))
    y = linear(torch.full((7, 64_992), 127.0 * sign), t, p)
    assert torch.equal(y, torch.full((7, 70), sign * 127.0 * -128 * 64_992))


@each_level
@few
@given(
    rows=sizes,
    columns=sizes,
    act=st.sampled_from(("int8/token", "int8a/token", "int4/token", "int4a/group:16", "int8/group:64", "int6a/token")),
    spread=st.sampled_from((1e-20, 1e-6, 1.0, 1e4, 1e30)),
    dtype=st.sampled_from(list(ops.DTYPES)),
    seed=st.integers(0, 999),
)
def test_codes_are_the_references(rows, columns, act, spread, dtype, seed):
    """A weight of one 1 a row shows the decoded activations themselves."""
    p = plan((columns, columns), "int8/channel", act)
    x = torch.randn(rows, columns, generator=generator(seed)) * min(spread, 1e4 if dtype is torch.float16 else spread)
    x = x.to(dtype).float()  # fp32 in and out, so that nothing but the codes is rounded
    y = linear(x, Tensors(torch.eye(columns, dtype=torch.int8), torch.ones(columns, 1)), p)
    expected = reference.input_rounder(p, -1)(x, None)
    assert torch.allclose(y, expected, rtol=3e-7, atol=0)  # decoding: (q - z) s, either order


# --- layers ----------------------------------------------------------------------------------------------------------

WEIGHTS = ("int8/channel", "int4/channel", "int4/group:64", "int8/tensor", "int5/channel", "int4/group:32")
TWO_LEVEL = ("int4/group:64+channel", "int4/group:32+channel", "int4/group:20+channel", "int3/group:64+channel")
ACTS = ("int8/token", "int8a/token", "int4/group:64", "int4a/group:64", "int4/group:64/dynamic/0.17", "int4/group:32")


@each_level
@few
@given(
    weight=st.sampled_from(WEIGHTS + TWO_LEVEL),
    act=st.sampled_from(ACTS),
    rows=sizes,
    columns=st.integers(4, 300),
    outputs=sizes,
    rank=st.sampled_from((0, 2, 5, 16)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_layers_follow_the_reference(weight, act, rows, columns, outputs, rank, dtype):
    p = plan((outputs, columns), weight, act, rank=rank)
    assume(kernels.cpu.why_not("linear", p, "cpu") is None)
    make = generator(rows)
    bias = torch.randn(outputs, generator=make).to(dtype)
    factors = [torch.randn(*size, generator=make).to(dtype) for size in ((rank, columns), (outputs, rank))]
    t = tensors(p, bias)._replace(**dict(zip(("down", "up"), factors, strict=True)) if rank else {})
    x = torch.randn(rows, columns, generator=make).to(dtype)
    ours = kernels.cpu.build("linear", p, None)(x, t)
    truth = reference.build("linear", p, None)(x.float(), t)
    room = 4e-6 if dtype is torch.float32 else 2.0**-6 if rank else 2.0**-8 * 1.01  # half a unit; the branch in bf16
    assert ours.dtype == dtype
    assert (ours.float() - truth).abs().max() <= room * truth.abs().max() + 1e-6


@each_level
@pytest.mark.parametrize("act", ["int8/token", "int4a/group:16"])
def test_a_call_does_not_depend_on_the_calls_before(act):
    p, other = plan((40, 64), act=act), plan((24, 64), "int4/channel", act)
    inputs = torch.randn(2, 9, 64, generator=generator(0))
    calls = [(x, tensors(which), which) for x in inputs for which in (p, other)]
    forward, backward = [linear(*call) for call in calls], [linear(*call) for call in reversed(calls)]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(forward[0], forward[2])


def test_what_follows_the_scale_is_passed_by_name():
    p = plan((40, 64))
    t, x = tensors(p), torch.randn(9, 64)
    with pytest.raises((TypeError, RuntimeError), match="positional"):
        torch.ops.dq.cpu_linear(x, t.weight, t.scale, None, None, None, None, 8, 8)
    with pytest.raises(RuntimeError, match="act_bits"):
        torch.ops.dq.cpu_linear(x, t.weight, t.scale, weight_bits=8)


@pytest.mark.skipif(len(levels()) < 2, reason="one level runs here")
@few
@given(
    weight=st.sampled_from(WEIGHTS[:4] + TWO_LEVEL[:2]),
    act=st.sampled_from(ACTS[:4]),
    rows=sizes,
    columns=st.integers(4, 300),
    outputs=sizes,
    dtype=st.sampled_from(list(ops.DTYPES)),
    gelu=st.booleans(),
)
def test_every_level_gives_the_same_bits(weight, act, rows, columns, outputs, dtype, gelu):
    p = plan((outputs, columns), weight, act)
    assume(kernels.cpu.why_not("linear", p, "cpu") is None)
    t, x = tensors(p, torch.randn(outputs).to(dtype)), torch.randn(rows, columns, generator=generator(rows)).to(dtype)
    results = []
    for name in levels():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "level", lambda name=name: name)
            results.append(linear(x, t, p, gelu=gelu))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_level
def test_gelu_is_within_two_units_of_bf16():
    p = plan((512, 64))
    t, x = tensors(p), torch.randn(256, 64, generator=generator(3)) * 3
    t = t._replace(scale=t.scale * 0.2)
    exact = lambda x: F.gelu(linear(x, t, p).double(), approximate="tanh").float()  # noqa: E731
    assert ulps(linear(x.bfloat16(), t, p, gelu=True), exact(x.bfloat16().float())) <= 2
    assert torch.allclose(linear(x, t, p, gelu=True), exact(x), rtol=3e-6, atol=1e-7)


# --- any memory, any threads -----------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_level
@pytest.mark.parametrize("act", ["int8/token", "int4a/group:64"])
def test_threads_do_not_change_a_bit(threads, act):
    p = plan((320, 320), "int4/group:64", act)
    t, x = tensors(p), torch.randn(777, 320, generator=generator(0)).bfloat16()
    conv = plan((40, 24, 3, 3), "int8/channel", "int8a/tensor", "conv2d")
    pixels, geometry = torch.randn(2, 24, 33, 31), kernels.Conv((1, 1), (1, 1), (1, 1), 1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((linear(x, t, p), kernels.cpu.build("conv", conv, geometry)(pixels, tensors(conv))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@each_level
def test_unaligned_and_strided_inputs():
    p = plan((33, 61))
    t, wide = tensors(p), torch.randn(40, 200, generator=generator(1))
    for x in (wide[:, 3:64], wide.t()[:61].t()[:, :61], wide.flatten()[7 : 7 + 610].view(10, 61)):
        assert torch.equal(linear(x, t, p), linear(x.clone(), t, p))


@each_level
def test_nan_and_infinity_stay_in_their_row():
    p = plan((40, 64))
    t, x = tensors(p), torch.randn(9, 64, generator=generator(1))
    clean = linear(x, t, p)
    x[2, 5], x[4, 60], x[6] = float("nan"), float("inf"), 0
    y = linear(x, t, p)
    assert y[2].isnan().all() and not y[4].isfinite().any() and (y[6] == 0).all()
    assert torch.equal(y[[0, 1, 3, 5, 7, 8]], clean[[0, 1, 3, 5, 7, 8]])


@each_level
def test_no_rows_give_no_rows():
    p = plan((40, 64))
    assert linear(torch.empty(0, 64), tensors(p), p).shape == (0, 40)


# --- the ops --------------------------------------------------------------------------------------------------------


@wide
def test_ops_are_proper_torch_ops():
    p, conv = (
        plan((48, 64), "int4/group:64", "int8a/token"),
        plan((8, 4, 3, 3), "int8/channel", "int8a/tensor", "conv2d"),
    )
    t, of_conv, x, image = tensors(p), tensors(conv), torch.randn(5, 64), torch.randn(2, 4, 8, 8)
    tests, named = ("test_schema", "test_faketensor"), {"weight_bits": 4, "weight_group": 64}
    low, up = torch.randn(5, 4).bfloat16(), torch.randn(48, 4).bfloat16()
    check = lambda op, given, named: torch.library.opcheck(op, given, named, test_utils=tests)  # noqa: E731
    ones = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    head = t.weight, t.scale
    double = tensors(plan((48, 64), "int4/group:32+channel"))
    twice = {"weight_bits": 4, "act_bits": 8, "multiplier": double.scale, "multiplier_group": 32}
    check(torch.ops.dq.cpu_linear, (x, double.weight, double.scale_global), twice)
    check(torch.ops.dq.cpu_linear, (x, *head), named | {"act_bits": 8, "act_affine": True, "low": low, "up": up})
    for pixels in (image, image.contiguous(memory_format=torch.channels_last)):
        given = pixels, of_conv.weight, of_conv.scale
        check(torch.ops.dq.cpu_conv, given, ones | {"weight_bits": 8, "act_bits": 8, "act_affine": True})


@wide
def test_ops_compile_to_one_graph():
    p = plan((48, 64), "int4/group:64", "int8/token", rank=4)
    bias, down, up = (torch.randn(*size).bfloat16() for size in ((48,), (4, 64), (48, 4)))
    t = tensors(p, bias)._replace(down=down, up=up)
    conv, geometry = (
        plan((8, 4, 3, 3), "int8/channel", "int8a/tensor", "conv2d"),
        kernels.Conv((1, 1), (1, 1), (1, 1), 1),
    )
    run, patches, of_conv = (
        kernels.cpu.build("linear", p, None),
        kernels.cpu.build("conv", conv, geometry),
        tensors(conv),
    )
    both = lambda x, image: (run(x, t), patches(image, of_conv))  # noqa: E731
    x, image = torch.randn(5, 64).bfloat16(), torch.randn(2, 4, 8, 8)
    for eager, compiled in zip(both(x, image), torch.compile(both, fullgraph=True)(x, image), strict=True):
        assert torch.allclose(eager.float(), compiled.float(), rtol=2e-2, atol=2e-2) and eager.dtype == compiled.dtype


@pytest.mark.slow
def test_address_sanitizer_finds_nothing(tmp_path):
    """Every kernel over ragged shapes in a process whose every read and write is checked."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("no AddressSanitizer runtime")
    source.build(tmp_path / "checked.so", source.SANITIZED)
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    script = Path(__file__).with_name("sanitized.py")
    command = [sys.executable, str(script), str(tmp_path / "checked.so")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("clean"), done.stderr[-2000:]
