"""Formats: bytes on disk, rounding, error in dB, gradients; every format found in dq/formats passes the same tests."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq import formats
from dq.formats.base import FormatError, Granularity
from dq.formats.integer import Integer

NAMES = formats.names()
FREE = [n for n in NAMES if not formats.get(n).fixed]
CASES = [(n, g) for n in FREE for g in ("tensor", "channel", "group:16", "group:24")]
CASES += [(n, None) for n in NAMES if n not in FREE]
TAPERED = ("hif8",)  # scales put the range below the largest number, where numbers are dense
TWO_LEVEL = [n for n in FREE if formats.get(n).most_multiplier]
CASES += [(n, g) for n in TWO_LEVEL for g in ("group:16+channel", "group:24+channel")]
each_name = pytest.mark.parametrize("name", NAMES)
each_case = pytest.mark.parametrize(("name", "granularity"), CASES)


def draw(rows=9, k=77, seed=0):
    """Rows of very different size, with a row of zeros and a lone spike; K is ragged for every group."""
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-6, 3, rows)[:, None]
    x[rows // 2] = 0.0
    x[-1, -1] = 5e3
    return x


def again(form, x, granularity, e):
    return form.encode(x, granularity, e.scale, e.zero, e.scale_global, e.table)


def hexed(t):
    return t.contiguous().view(torch.uint8).numpy().tobytes().hex()


# --- every format ---------------------------------------------------------------------------------------------------


@each_name
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(0, 4), k=st.integers(1, 41), data=st.data())
def test_pack_unpack_is_exact(name, rows, k, data):
    form = formats.get(name)
    low = -(2 ** (form.bits - 1)) if form.signed else (-128 if form.bits == 8 else 0)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(low, low + 2**form.bits, (rows, k), generator=generator).to(torch.int8)
    packed = form.pack(codes)
    assert packed.dtype == torch.int8 and packed.shape == (rows, math.ceil(k * form.bits / 8))
    assert packed.is_contiguous() and torch.equal(form.unpack(packed, k), codes)


@each_name
def test_pack_holds_every_code_and_is_a_little_endian_stream(name):
    form = formats.get(name)
    low = -(2 ** (form.bits - 1)) if form.signed or form.bits == 8 else 0
    codes = torch.arange(low, low + 2**form.bits, dtype=torch.int32).to(torch.int8)[None]
    codes = torch.cat([codes, codes.flip(1)], dim=1)[:, :-1]
    stream = sum((int(c) & (2**form.bits - 1)) << (form.bits * i) for i, c in enumerate(codes[0]))
    width = math.ceil(codes.shape[1] * form.bits / 8)
    assert hexed(form.pack(codes)) == stream.to_bytes(width, "little").hex()
    assert torch.equal(form.unpack(form.pack(codes), codes.shape[1]), codes)


@each_case
def test_packed_bytes_are_the_real_ones(name, granularity):
    form = formats.get(name)
    for rows, k in ((9, 77), (4, 96)):
        e = form.encode(draw(rows, k), granularity)
        parts = [form.pack(e.codes), e.scale, e.zero, e.scale_global, e.table]
        real = sum(p.numel() * p.element_size() for p in parts if p is not None)
        assert form.packed_bytes(rows, k, granularity) == real
        assert all(p.is_contiguous() for p in parts if p is not None)


@each_case
def test_shapes_and_dtypes(name, granularity):
    form = formats.get(name)
    e = form.encode(draw(), granularity)
    grain = form.granularity if granularity is None else Granularity.parse(granularity)
    shape, bytes_ = grain.scale_shape(9, 77), 1 if grain.two_level else form.scale_bytes
    assert e.codes.dtype == torch.int8 and e.codes.shape == (9, 77)
    assert e.scale.shape == shape and e.scale.dtype == (torch.float32 if bytes_ == 4 else torch.int8)
    assert (e.zero is not None) == (form.affine or form.offset) and (e.zero is None or e.zero.shape == shape)
    assert (e.scale_global is not None) == bool(form.global_bytes or grain.two_level)


@each_case
def test_encode_is_idempotent(name, granularity):
    form = formats.get(name)
    for seed in range(3):
        e = form.encode(draw(seed=seed), granularity)
        assert torch.equal(again(form, form.decode(e, granularity), granularity, e).codes, e.codes)


@each_name
def test_every_grid_value_survives(name):
    form, grid = formats.get(name), formats.get(name).grid()
    assert torch.equal(grid, torch.unique(grid)) and 0.0 in grid and len(grid) <= 2**form.bits
    assert torch.equal(form.values_of(form.codes_of(grid)), grid)
    assert torch.equal(form.snap(grid), grid)
    if name in FREE and not form.affine:  # except where a scale does not cover the range it is exactly 1
        scale = None if name not in TAPERED else torch.ones(1, 1)
        assert torch.equal(form.decode(form.encode(grid[None], scale=scale)), grid[None])


@each_name
def test_rounding_is_to_nearest_with_ties_to_even(name):
    form, grid = formats.get(name), formats.get(name).grid()
    middle = (grid[1:].double() + grid[:-1].double()).div(2).float()
    even = torch.where((form.codes_of(grid[:-1]) & 1) == 0, grid[:-1], grid[1:])
    if name in TAPERED:  # as defined: away from 0
        even = torch.where(middle < 0, grid[:-1], grid[1:])
    for rounded in (form.snap(middle), form.values_of(form.codes_of(middle))):
        assert torch.equal(rounded, even)
    for direction, want in ((torch.inf, grid[1:]), (-torch.inf, grid[:-1])):
        beside = torch.nextafter(middle, torch.tensor(direction))
        assert torch.equal(form.snap(beside), want) and torch.equal(form.values_of(form.codes_of(beside)), want)
    far = torch.tensor([-1e30, 1e30])
    for saturated in (form.snap(far), form.values_of(form.codes_of(far))):
        assert torch.equal(saturated, grid[[0, -1]])


def half_step(form):
    """The most that rounding adds to a value, as a share, where scales are powers of two or at their floor."""
    grid = form.grid()
    top = grid[grid >= grid.max() / 4]
    return 0 if isinstance(form, Integer) else float((top.diff() / 2 / top[:-1]).max())


@each_case
@settings(max_examples=8, deadline=None, derandomize=True)
@given(power=st.integers(-45, 38), shift=st.sampled_from([-0.9, 0.0, 0.9]), seed=st.integers(0, 9))
def test_any_finite_size_stays_finite_and_in_range(name, granularity, power, shift, seed):
    form = formats.get(name)
    x = (torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1 + shift) * 10.0**power
    out = form.fake(x.float(), granularity)
    over = 1 / 3 if form.affine else max(1 / 16, half_step(form))  # int2a's; an e4m3 block scale rounded up
    assert out.isfinite().all() and out.abs().max() <= x.abs().max() * (1 + over) + formats.base.SCALE_FLOOR
    assert form.offset or (out.double() * x >= 0).all()  # 0 is no code of a range that begins anywhere


@each_case
def test_zero_rows_decode_to_exact_zeros(name, granularity):
    form = formats.get(name)
    e = form.encode(torch.zeros(3, 40), granularity)
    assert not form.decode(e, granularity).any() and torch.isfinite(form.step(e.scale, e.scale_global)).all()
    assert form.scale_bytes < 4 or (e.scale > 0).all()
    x = draw()
    if not (form.offset and granularity == "tensor"):
        assert not form.decode(form.encode(x, granularity), granularity)[4].any()
    assert form.encode(x[:0], granularity).codes.shape == (0, 77)  # no rows at all: an expert without tokens


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_is_decode_of_encode(name, granularity, dtype):
    form = formats.get(name)
    x = draw(8, 77).to(dtype).reshape(2, 4, 77)
    flat = x.reshape(8, 77)
    e = form.encode(flat, granularity)
    want = form.decode(e, granularity).to(dtype).reshape(2, 4, 77)
    assert torch.equal(form.fake(x, granularity), want) and want.isfinite().all()
    given = form.fake(x, granularity, e.scale, e.zero, e.scale_global, e.table)
    assert given.dtype == dtype and torch.equal(given, want)
    assert torch.equal(form.fake(x.requires_grad_(), granularity), want)


@each_case
def test_gradient_of_fake_is_straight_through(name, granularity):
    form = formats.get(name)
    x = draw().requires_grad_()
    wanted = torch.rand(9, 77, generator=torch.Generator().manual_seed(1))
    (form.fake(x, granularity) * wanted).sum().backward()
    passed = x.grad == wanted
    assert (passed | (x.grad == 0)).all() and passed.float().mean() > 0.9
    e = form.encode(x, granularity)  # half the range: what lies outside gets no gradient, what lies inside all of it
    if form.scale_bytes < 4 or form.affine or form.offset or "+" in str(granularity):
        return
    covers = e.scale
    if name in TAPERED:
        covers = formats.base.block_absmax(x.detach(), Granularity.parse(granularity)) / form.grid().max()
    half = (covers / 2).clamp(min=formats.base.SCALE_FLOOR).requires_grad_()
    x.grad = None
    form.fake(x, granularity, half).sum().backward()
    units = formats.base.block_view(x.detach(), Granularity.parse(granularity)) / half[..., None]
    inside = (units.abs() <= form.limits()[1]).reshape(9, -1)[:, :77]
    assert torch.equal(x.grad, inside.float()) and not inside.all()
    assert half.grad.shape == half.shape and torch.isfinite(half.grad).all()


def test_gradient_of_the_scale_is_lsq():
    x, s = torch.tensor([[0.4, 1.3, -2.6, 900.0]]), torch.tensor([[1.0]], requires_grad=True)
    formats.get("int8").fake(x, "channel", s).sum().backward()
    assert s.grad.item() == pytest.approx((0 - 0.4) + (1 - 1.3) + (-3 + 2.6) + 127, rel=1e-6)


@each_case
def test_bad_values_never_become_numbers(name, granularity):
    form = formats.get(name)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 48)
        x[1, 3] = bad
        assert not form.decode(form.encode(x, granularity), granularity)[1, 3].isfinite()
        assert not form.fake(x, granularity)[1, 3].isfinite()
        with pytest.raises(FormatError, match=r"blocks\.0\.to_q: got 1 non-finite values of 96"):
            formats.base.check_finite(x, "blocks.0.to_q")
    assert formats.base.check_finite(torch.ones(2), "w").sum() == 2


@each_name
def test_encode_keeps_no_graph_and_reads_strided_input(name):
    form = formats.get(name)
    weight = torch.nn.Parameter(torch.randn(48, 8, generator=torch.Generator().manual_seed(2)))
    e = form.encode(weight.T)
    assert not e.scale.requires_grad and torch.equal(e.codes, form.encode(weight.detach().T.contiguous()).codes)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_every_float_dtype_counts_as_fp32(name, granularity, dtype):
    form, x = formats.get(name), (draw() * 0.1).to(dtype)
    e, want = form.encode(x, granularity), form.encode(x.float(), granularity)
    assert torch.equal(e.codes, want.codes) and torch.equal(e.scale, want.scale)


@pytest.mark.parametrize("name", FREE)
def test_a_given_scale_broadcasts(name):
    form, x = formats.get(name), draw()
    for scale in (0.5, torch.tensor([[0.5]]), torch.full((9, 1), 0.5, dtype=torch.bfloat16)):
        e = form.encode(x, "group:24", scale)
        assert e.scale.shape == (9, 4) and e.scale.is_contiguous() and (e.scale == 0.5).all()
        assert e.scale.dtype == torch.float32


@each_name
def test_compiled_path_gives_the_same_codes(name, monkeypatch):
    """Under torch.compile fp8 goes through bit arithmetic instead of torch's casts."""
    form, x = formats.get(name), draw(seed=3)
    eager = form.encode(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    e = form.encode(x)
    assert torch.equal(e.codes, eager.codes) and torch.equal(e.scale, eager.scale)
    assert torch.equal(form.fake(x), form.decode(eager))


@pytest.mark.parametrize("name", ["int8", "int4a", "fp8", "nvfp4", "mxfp4"])
def test_fake_traces_into_one_graph(name):
    form, x = formats.get(name), draw(4, 64).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(form.fake, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), form.fake(x))


# --- two-level scales ------------------------------------------------------------------------------------------------

two_level = pytest.mark.parametrize("name", TWO_LEVEL)


def test_two_levels_are_for_symmetric_integers_of_at_most_four_bits():
    assert TWO_LEVEL == ["int2", "int3", "int4"]
    assert [formats.get(name).most_multiplier for name in TWO_LEVEL] == [64, 32, 16]


@two_level
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    k=st.integers(1, 200),
    size=st.sampled_from((16, 24, 64)),
    spread=st.sampled_from((0.0, 1.0, 4.0)),
    seed=st.integers(0, 99),
)
def test_codes_times_multipliers_fit_a_byte_and_the_error_is_bounded(name, rows, k, size, spread, seed):
    form, grain, make = formats.get(name), Granularity("group", size, True), torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=make)
    x *= (spread * torch.randn(grain.scale_shape(rows, k), generator=make)).exp().repeat_interleave(size, 1)[:, :k]
    e = form.encode(x, grain)
    assert e.scale.min() >= 1 and e.scale.max() <= form.most_multiplier and (e.scale_global > 0).all()
    times = e.scale.repeat_interleave(size, 1)[:, :k].int()
    assert (e.codes.int() * times).abs().max() <= 127 and form.most_multiplier * 2 ** (form.bits - 1) == 128
    decoded, step = form.decode(e, grain), times * e.scale_global
    assert torch.equal(decoded, e.codes.float() * step)
    clipped = 0.5 * form.max_code * e.scale_global  # by a multiplier that is rounded down
    assert ((decoded - x).abs() <= 0.5001 * step + 1.001 * clipped).all()
    whole = form.encode(x, grain, scale_global=e.scale_global)
    assert torch.equal(whole.scale, e.scale) and torch.equal(whole.codes, e.codes)


def test_two_levels_cost_a_tenth_of_a_decibel_and_save_three_bytes_a_group():
    x = torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    x[:, ::96] *= 8
    form = formats.get("int4")
    loss = {g: (form.fake(x, g) - x).square().sum() for g in ("channel", "group:64", "group:64+channel")}
    assert loss["group:64+channel"] < 1.023 * loss["group:64"] < 0.3 * loss["channel"]
    ours, theirs = (form.packed_bytes(64, 1152, grain) for grain in ("group:64+channel", "group:64"))
    assert theirs - ours == 64 * (3 * 18 - 4)


@two_level
def test_given_steps_go_to_the_nearest_two_level_ones(name):
    form, x, grain = formats.get(name), draw(), "group:16+channel"
    steps = form.fit(x, "group:16").scale
    e = form.encode(x, grain, steps)
    nearest = (steps / e.scale_global).round().clamp(1, form.most_multiplier)
    assert torch.equal(e.scale.float(), nearest)
    assert (e.scale.amax(1)[x.any(1)] == form.most_multiplier).all()
    assert torch.equal(again(form, x, grain, e).codes, e.codes)


# --- error in dB: research/methods_dit.md section 11.1 --------------------------------------------------------------

SQNR_DB = [  # format, granularity, N(0, 1), Laplace
    ("int8", "channel", 42.1, 38.3),
    ("int6", "channel", 29.8, 26.1),
    ("int4", "channel", 16.9, 13.3),
    ("int4", "group:128", 18.6, 15.9),
    ("int4", "group:16", 21.4, 19.9),
    ("fp4", "channel", 18.8, None),
    ("fp4", "group:128", 19.3, None),
    ("e1m2", "group:128", 18.6, None),
    ("e3m0", "group:128", 14.3, None),
    ("fp6_e2m3", "channel", 31.1, None),
    ("fp6_e3m2", "channel", 25.6, None),
    ("e3m4", "channel", 37.6, None),
    ("mxfp4", None, 18.8, 17.9),
    ("nvfp4", None, 20.5, 20.7),
    ("hif8", "tensor", 31.6, 31.5),
]


@pytest.mark.parametrize(("name", "granularity", "normal", "laplace"), SQNR_DB)
def test_sqnr(name, granularity, normal, laplace):
    form, generator = formats.get(name), torch.Generator().manual_seed(0)
    sign_and_size = torch.rand(1024, 1024, generator=generator) - 0.5
    drawn = {
        normal: torch.randn(1024, 1024, generator=generator),
        laplace: -sign_and_size.sign() * torch.log1p(-2 * sign_and_size.abs()),
    }
    for want, x in drawn.items():
        error = form.decode(form.encode(x, granularity), granularity) - x
        got = 10 * math.log10(x.square().sum() / error.square().sum())
        assert want is None or got == pytest.approx(want, abs=0.3)


def test_affine_beats_symmetric_on_one_sided_data():
    x = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) + 0.1
    loss = [(formats.get(n).fake(x) - x).square().mean() for n in ("int4a", "int4")]
    assert loss[0] < loss[1] / 3


# --- fp8 equals torch -----------------------------------------------------------------------------------------------

FP8 = [("fp8", torch.float8_e4m3fn, 448.0), ("fp8_e5m2", torch.float8_e5m2, 57344.0)]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(("name", "dtype", "top"), FP8)
def test_fp8_is_torch_fp8(name, dtype, top, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    form = formats.get(name)
    codes = torch.arange(256, dtype=torch.int32).to(torch.int8)
    values = codes.view(dtype).float()
    torch.testing.assert_close(form.values_of(codes), values, rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite()
    assert torch.equal(form.codes_of(values)[finite], codes[finite])
    assert form.grid().max() == top == form.max_value
    ties = (form.grid()[1:] + form.grid()[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(100_000, generator=generator) * torch.exp2(torch.rand(100_000, generator=generator) * 40 - 24)
    x = torch.cat([ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0), spread, torch.zeros(1)])
    x = torch.cat([x, -x, torch.tensor([top * 2, -top * 2, torch.nan])])
    want = x.clamp(-top, top).to(dtype)
    assert (
        torch.equal(form.codes_of(x)[:-1], want.view(torch.int8)[:-1]) and form.values_of(form.codes_of(x))[-1].isnan()
    )
    torch.testing.assert_close(form.snap(x), want.float(), rtol=0, atol=0, equal_nan=True)


# --- HiF8 ----------------------------------------------------------------------------------------------------------

HIF8_DOTS = [  # dot, bits of the exponent with its sign, bits of the mantissa
    ("11", 4, 1),
    ("10", 3, 2),
    ("01", 2, 3),
    ("001", 1, 3),
    ("0001", 0, 3),
]


def hif8_value(code: int) -> float:
    """The value of a pattern by the published table, read off its bits."""
    text = f"{code:08b}"
    sign, text = (-1.0 if text[0] == "1" else 1.0), text[1:]
    if code in (0x00, 0x80):
        return math.nan if code else 0.0
    if code in (0x6F, 0xEF):
        return sign * math.inf
    for dot, width, bits in HIF8_DOTS:
        if text.startswith(dot):
            exponent, mantissa = text[len(dot) : len(dot) + width], text[len(dot) + width :]
            assert len(mantissa) == bits
            size = int("1" + exponent[1:], 2) if width else 0
            return sign * 2.0 ** (-size if exponent[:1] == "1" else size) * (1 + int(mantissa, 2) / 2**bits)
    return sign * 2.0 ** (int(text[4:], 2) - 23)


def test_every_hif8_code_is_the_published_value():
    form, codes = formats.get("hif8"), torch.arange(256, dtype=torch.int32).to(torch.int8)
    want = torch.tensor([hif8_value(code) for code in range(256)])
    values = form.values_of(codes)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    finite = want.isfinite()
    assert int(finite.sum()) == 253 == len(form.grid()) and int(want.isnan().sum()) == 1
    assert torch.equal(form.codes_of(want)[finite], codes[finite]) and int(form.codes_of(want)[0x80]) == -0x80
    assert form.grid().max() == 2.0**15 and form.grid()[form.grid() > 0].min() == 2.0**-22


def test_hif8_rounds_as_defined():
    form = formats.get("hif8")
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.exp2(torch.rand(len(x), generator=torch.Generator().manual_seed(1)).double() * 42 - 26)
    edges = form.grid().double()
    x = torch.cat([x, (edges[1:] + edges[:-1]) / 2]).float().double()
    exponent = x.abs().log2().floor()
    mantissa = 3 - sum((exponent.abs() > edge).double() for edge in (3, 7, 15))
    spacing = torch.exp2(exponent - mantissa)
    want = (x.abs() / spacing + 0.5).floor() * spacing
    want = torch.where(x.abs() < 2.0**-22, (x.abs() >= 2.0**-23) * 2.0**-22, want).clamp(max=2.0**15) * x.sign()
    assert torch.equal(form.snap(x.float()), want.float())
    assert torch.equal(form.values_of(form.codes_of(x.float())), want.float())


def test_hif8_is_exact_near_one_and_reaches_far():  # methods_dit.md section 8
    form = formats.get("hif8")
    x = torch.exp2(torch.linspace(-15, 15, 20_001))
    share = (form.snap(x) / x - 1).abs()
    for reach, bound in ((3, 2.0**-4), (7, 2.0**-3), (15, 2.0**-2)):
        inside = (x >= 2.0**-reach) & (x < 2.0 ** (reach + (reach < 15)))
        assert share[inside].max() <= bound
        assert share[inside].max() > 0.79 * bound
    wide = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    kept = [formats.get(name).fake(wide, "tensor") != 0 for name in ("hif8", "fp8")]
    assert kept[0].float().mean() > 0.95 and kept[1].float().mean() < 0.6, "e4m3 flushes half of it to 0"
    normal = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    scaled = form.fake(normal, "tensor", normal.abs().max().reshape(1, 1) / 2**15)
    lost = (scaled - normal).square().sum() / (form.fake(normal, "tensor") - normal).square().sum()
    assert lost > 10, "the largest value belongs at 15, not at the largest number"


# --- golden bytes, worked out by hand -------------------------------------------------------------------------------


def test_golden_int4():
    form, x = formats.get("int4"), torch.tensor([[1.0, -1.0, 7.0, -6.6, 2.5]])  # scale 1, 2.5 is a tie
    e = form.encode(x)
    assert e.scale.tolist() == [[1.0]] and e.codes.tolist() == [[1, -1, 7, -7, 2]]
    assert hexed(form.pack(e.codes)) == "f19702"


def test_golden_int4a():
    form, x = formats.get("int4a"), torch.tensor([[0.0, 1.0, 15.0]])  # scale 1, zero point −8
    e = form.encode(x)
    assert (e.scale.item(), e.zero.item(), e.codes.tolist()) == (1.0, -8, [[-8, -7, 7]])
    assert hexed(form.pack(e.codes)) == "9807"
    e = form.encode(torch.tensor([[-3.75, 11.25]]))  # scale 1, zero point −8 + 4: the largest value gets code 11 − 4
    assert (e.scale.item(), e.zero.item(), e.codes.tolist()) == (1.0, -4, [[-8, 7]])


def test_golden_int3():
    form, x = formats.get("int3"), torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.0, 1.0, -1.0, 0.5, 1.5]])  # scale 1/2
    e = form.encode(x)
    assert e.scale.tolist() == [[0.5]] and e.codes.tolist() == [[1, -1, 3, -3, 0, 2, -2, 1, 3]]
    assert hexed(form.pack(e.codes)) == "f90a3903"


def test_golden_hif8():
    x = [15.0, -1.0, 0.5, -2.5, 4.0, 0.09375, -(2.0**-20), -(2.0**-24), 13.5, 2.0**-23, 0.0, 1.5 * 2.0**-9]
    e = formats.get("hif8").encode(torch.tensor([x]))  # scale 1; 13.5 and 2^-23 are ties
    assert e.scale.tolist() == [[1.0]] and hexed(e.codes) == "2f881892205283002e010073"


def test_golden_nvfp4():
    ladder = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.zeros(1, 70)
    x[0, :16] = torch.cat([ladder, -ladder]) * 448  # absmax 2688: g = 1, block scale 448 = 0x7e, codes 0 … 15
    x[0, 16:24] = torch.tensor([6.0, 2.5, 5.0, -0.25, 0.75, 1.25, 1.75, 3.5])  # scale 1 = 0x38; seven ties
    x[0, 48] = 6 * 2.0**-11  # block scale below half the smallest e4m3 number: zeros
    x[0, 64:] = -12.0  # short last block, scale 2 = 0x40
    form = formats.get("nvfp4")
    e = form.encode(x)
    assert e.scale_global.tolist() == [1.0] and hexed(e.scale) == "7e38000040"
    assert hexed(form.pack(e.codes)) == "1032547698badcfe" + "4786226400000000" + "00" * 16 + "ffffff"
    assert torch.equal(form.decode(e)[0, 16:24], torch.tensor([6.0, 2.0, 4.0, 0.0, 1.0, 1.0, 2.0, 4.0]))
    assert not form.decode(e)[0, 24:64].any() and torch.equal(form.decode(e)[0, 64:], x[0, 64:])


def test_golden_mxfp4():
    x = torch.zeros(1, 136)
    x[0, :3] = torch.tensor([7.9, -1.0, 5.0])  # exponent 2 − 2 = 0: byte 127; 7.9 saturates to 6, 5 is a tie
    x[0, 32:34] = torch.tensor([8.0, -3.0])  # exponent 1: byte 128; codes of 4 and −1.5
    x[0, 64] = 0.1  # 2^-4 ≤ 0.1: exponent −6, byte 121; 6.4 -> 6
    x[0, 128] = -1e-42  # fp32 subnormal: smallest scale, byte 0
    form = formats.get("mxfp4")
    e = form.encode(x)
    assert hexed(e.scale) == "7f80790000"
    rows = ["a706", "b6", "07"]
    assert hexed(form.pack(e.codes)) == "".join(r.ljust(32, "0") for r in rows) + "00" * 16 + "08000000"
    assert form.decode(e)[0, [0, 1, 2, 32, 33]].tolist() == [6.0, -1.0, 4.0, 8.0, -3.0]
    assert form.decode(e)[0, 64].item() == 6 / 64


def test_mx_scales_reach_both_ends():
    form = formats.get("mxfp4")
    top = torch.full((1, 32), torch.finfo(torch.float32).max)
    assert hexed(form.encode(top).scale) == "fc" and form.decode(form.encode(top)).isfinite().all()
    assert form.step(torch.tensor([0, -2, -1], dtype=torch.int8)).tolist()[:2] == [2.0**-127, 2.0**127]
    assert form.step(torch.tensor([-1], dtype=torch.int8)).isnan().all()


def test_stored_scales_round_trip():
    for name in ("nvfp4", "mxfp4", "mxfp8"):
        form = formats.get(name)
        e = form.encode(draw(8, 64)[[0, 1, 2, 3, 5, 6]] + 1.0)
        assert torch.equal(form.store(form.step(e.scale, e.scale_global), e.scale_global), e.scale)


def test_nvfp4_scale_per_row_keeps_rows_apart():
    form, x = formats.get("nvfp4"), draw(8, 64)
    per_row = form.fit_global(x, per_row=True)
    assert per_row.shape == (8, 1)
    whole = form.fake(x, scale_global=per_row)
    assert torch.equal(whole[:3], form.fake(x[:3], scale_global=per_row[:3]))
    assert torch.equal(whole[2:3], form.fake(x[2:3])) and not torch.equal(form.fake(x)[:3], whole[:3])


# --- names, granularity, errors -------------------------------------------------------------------------------------


def test_names_and_aliases():
    assert {"int8", "int4", "int4a", "fp8", "fp8_e5m2", "fp4", "nvfp4", "mxfp4", "mxfp8"} <= set(NAMES)
    assert formats.get("e4m3") == formats.get("fp8") == formats.get("fp8_e4m3")
    assert formats.get("e2m1") is formats.get("fp4") and formats.get("e5m2") is formats.get("fp8_e5m2")
    for name, top in {"e3m4": 31.0, "e1m2": 3.5, "e3m0": 16.0, "e2m3": 7.5, "e3m2": 28.0, "e2m1": 6.0}.items():
        assert formats.get(name).grid().max() == top
    elements = {"mxfp4": 6.0, "mxfp6_e2m3": 7.5, "mxfp6_e3m2": 28.0, "mxfp8": 448.0, "mxfp8_e5m2": 57344.0}
    for name, top in elements.items():
        form = formats.get(name)
        step = 2.0 ** (5 - math.floor(math.log2(top)))  # absmax 32 … 63
        assert form.grid().max() == top and form.step(form.encode(torch.full((1, 32), 40.0)).scale).item() == step
    assert torch.equal(formats.get("e1m2").grid() * 2, formats.get("int4").grid())  # evenly spaced
    assert len({formats.get(n) for n in NAMES}) == len(NAMES)  # hashable, all different


@pytest.mark.parametrize(
    ("wrong", "right"), [("in4", "int4"), ("nvpf4", "nvfp4"), ("mxfp-4", "mxfp4"), ("FP8", "fp8")]
)
def test_unknown_name_gives_the_nearest(wrong, right):
    with pytest.raises(FormatError, match=f"got '{wrong}'.*did you mean '{right}'"):
        formats.get(wrong)


@pytest.mark.parametrize("wrong", ["e9m9", "e0m3", "fp6_e2m1", ""])
def test_impossible_names_raise(wrong):
    with pytest.raises(FormatError, match="expected"):
        formats.get(wrong)


def test_a_new_file_is_a_new_format(tmp_path, monkeypatch):
    text = "from dq.formats import Granularity\nfrom dq.formats.integer import Integer\n"
    text += 'FORMATS = {"int5x": Integer("int5x", 5, Granularity("tensor"))}\n'
    (tmp_path / "extra_for_test.py").write_text(text)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    try:
        assert set(formats.names()) == {*NAMES, "int5x"} and formats.get("int5x").max_code == 15
        (tmp_path / "twice_for_test.py").write_text(text)
        with pytest.raises(FormatError, match=r"twice_for_test: got format 'int5x'"):
            formats.names()
    finally:
        for name in ("extra_for_test", "twice_for_test"):
            sys.modules.pop(f"dq.formats.{name}", None)


@pytest.mark.parametrize("text", ["tensor", "channel", "token", "group:64", "group:64+channel"])
def test_granularity_text_round_trip(text):
    assert str(Granularity.parse(text)) == text and Granularity.parse(text) == Granularity.parse(text)


ODD = ["channel+channel", "+channel", "group+channel", "group:64+channel+channel", "group:64+token", "group:64+"]


@pytest.mark.parametrize(
    "text", ["row", "group", "group:", "group:0", "group:-4", "group:x", "channel:8", "", None, *ODD]
)
def test_bad_granularity_raises(text):
    with pytest.raises(FormatError, match="granularity: got"):
        Granularity.parse(text)


X = torch.ones(4, 32)
INT8 = X.to(torch.int8)
WRONG = {
    "a vector": (lambda: formats.get("int8").encode(X[0]), r"int8: got torch.float32 \(32,\)"),
    "integers": (lambda: formats.get("int8").encode(INT8), "expected a float matrix"),
    "no columns": (lambda: formats.get("int8").encode(X[:, :0]), "expected a float matrix"),
    "scale shape": (
        lambda: formats.get("int8").encode(X, "group:8", torch.ones(4, 3)),
        r"expected \(4, 4\) for group:8",
    ),
    "a zero point": (lambda: formats.get("int8").encode(X, zero=torch.zeros(4, 1)), "use an affine format"),
    "a second scale": (lambda: formats.get("int8").encode(X, scale_global=torch.ones(1)), "got a scale_global"),
    "micro granularity": (lambda: formats.get("nvfp4").encode(X, "group:32"), "expected its only one, group:16"),
    "micro fp32 scale": (lambda: formats.get("mxfp4").encode(X, scale=torch.ones(4, 1)), "expected stored int8 bytes"),
    "nvfp4 half a scale": (lambda: formats.get("nvfp4").encode(X, scale=INT8[:, :2]), "expected scale_global with it"),
    "nvfp4 global shape": (
        lambda: formats.get("nvfp4").fit(X, scale_global=torch.ones(4)),
        r"expected \(1,\) or \(4, 1\)",
    ),
    "rows of two levels": (
        lambda: formats.get("int4").encode(X, "group:8+channel", scale_global=torch.ones(4)),
        r"got a scale_global of shape \(4,\), expected \(4, 1\) for two levels",
    ),
    "two levels of 8 bits": (
        lambda: formats.get("int8").encode(X, "group:8+channel"),
        "of at most 4 bits, such as int4",
    ),
    "two levels of floats": (
        lambda: formats.get("fp4").encode(X, "group:8+channel"),
        "expected two-level scales with",
    ),
    "two affine levels": (lambda: formats.get("int4a").encode(X, "group:8+channel"), "with symmetric integers"),
    "decode granularity": (lambda: formats.get("int8").decode(formats.get("int8").encode(X), "group:8"), "decode got"),
    "pack floats": (lambda: formats.get("int4").pack(X), "pack got torch.float32"),
    "unpack width": (lambda: formats.get("int4").unpack(INT8, 65), r"expected int8 \(rows, 33\); check k"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_was_expected(case):
    call, message = WRONG[case]
    with pytest.raises(FormatError, match=message):
        call()
