"""Attention on dq's CPU kernels, on every level: bounds, masks, strides, threads, extreme values, what is torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dq.kernels.cpu import attention as cpu
from dq.kernels.cpu import library
from tests.kernels.levels import levels

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
few = settings(max_examples=40, deadline=None, derandomize=True)
FEWEST = cpu.FEWEST_PRODUCTS, cpu.FEWEST_ROWS
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (1, 5, 7, 8, 33, 40, 64, 72, 80, 96, 112, 128, 160, 256)
LAYOUTS = ("heads", "tokens", "sliced", "strided")
MASKS = (None, "bool", "keys", "full", "heads", "empty rows")
PRECISIONS = pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])


@pytest.fixture(scope="module", params=levels(), autouse=True)
def level(request):
    """Each level that the processor has, on calls of every size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "level", lambda: request.param)
        patch.setattr(cpu, "FEWEST_PRODUCTS", 0)
        patch.setattr(cpu, "FEWEST_ROWS", {False: 0, True: 0})
        yield request.param


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(shape, layout="heads", seed=0, dtype=torch.bfloat16):
    """Standard normal (batch, heads, tokens, width) in one of the memory layouts that models use."""
    batch, heads, tokens, width = shape
    normal = lambda *size: torch.randn(*size, generator=generator(seed)).to(dtype)  # noqa: E731
    if layout == "tokens":
        return normal(batch, tokens, heads, width).transpose(1, 2)
    if layout == "sliced":  # a third of a fused projection
        return normal(batch, tokens, 3, heads, width)[:, :, 1].transpose(1, 2)
    return normal(batch, heads, tokens, 2 * width)[..., ::2] if layout == "strided" else normal(*shape)


def drawn_mask(kind, batch, heads, rows, keys, seed=0):
    normal = lambda *size: torch.randn(*size, generator=generator(seed))  # noqa: E731
    if kind is None:
        return None
    if kind == "bool":
        return normal(batch, 1, 1, keys) > -1
    if kind == "keys":
        return torch.where(normal(batch, 1, 1, keys) > 0, 0.0, -10000.0).bfloat16().expand(batch, heads, 1, keys)
    if kind == "full":
        return normal(batch, heads, rows, keys).bfloat16()
    if kind == "heads":
        return normal(heads, rows, 1)
    return (normal(batch, 1, rows, 1) > 0).expand(batch, 1, rows, keys)


def truth_of(q, k, v, mask=None, scale=None):
    """In fp64, straight from the formula; rows without keys are zero."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0) @ v


def relative(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


# --- bounds ----------------------------------------------------------------------------------------------------------


def assert_as_exact_as_torch(q, k, v, mask=None, scale=None):
    assert cpu.why_not(q, k, v, mask) is None
    theirs_mask = mask if mask is None or mask.dtype is torch.bool else mask.to(q.dtype)
    truth = truth_of(q, k, v, mask, scale)
    theirs = F.scaled_dot_product_attention(q, k, v, theirs_mask, scale=scale)
    ours = cpu.sdpa(q, k, v, mask, scale=scale)
    last_bits = 1
    if q.dtype is torch.float32:  # an exponent is as exact as the scores: sums in one chain, where torch's have lanes
        scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        last_bits = 4 + scores.abs().max()
    room = 2 * (theirs - truth).abs().max() + last_bits * torch.finfo(q.dtype).eps * truth.abs().max()
    assert ours.dtype == q.dtype and ours.shape == q.shape
    assert (ours - truth).abs().max() <= room


@few
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 90), st.integers(1, 700)),
    width=st.sampled_from(WIDTHS),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    scale=st.sampled_from((None, None, 0.02, 1.0, -0.3, 0.0)),
    dtype=st.sampled_from(DTYPES),
)
def test_floats_are_as_exact_as_torchs(sizes, width, layout, mask, scale, dtype):
    batch, heads, rows, keys = sizes
    q = drawn((batch, heads, rows, width), layout, 1, dtype)
    k, v = (drawn((batch, heads, keys, width), layout, seed, dtype) for seed in (2, 3))
    assert_as_exact_as_torch(q, k, v, drawn_mask(mask, batch, heads, rows, keys), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_and_its_remainders(dtype):
    for width, keys in itertools.product((1, 7, 40, 72, 80, 160, 256), (1, 3, 17, 77, 300, 513)):
        q = drawn((1, 2, 31, width), "tokens", 1, dtype)
        assert_as_exact_as_torch(q, *(drawn((1, 2, keys, width), "tokens", seed, dtype) for seed in (2, 3)))


@few
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 90), st.integers(1, 1400)),
    width=st.sampled_from((40, 64, 72, 80, 96, 128, 256)),
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from(DTYPES),
)
def test_int8_is_within_three_percent(sizes, width, layout, mask, dtype):
    batch, heads, rows, keys = sizes
    q = drawn((batch, heads, rows, width), layout, 1, dtype)
    k, v = (drawn((batch, heads, keys, width), layout, seed, dtype) for seed in (2, 3))
    mask = drawn_mask(mask, batch, heads, rows, keys)
    ours = cpu.sdpa(q, k, v, mask, int8=True)
    assert ours.dtype == dtype and relative(ours, truth_of(q, k, v, mask)) < 0.03


def test_int8_scores_do_not_see_a_constant_key():
    """Keys with a large common part are where plain 8-bit keys lose everything."""
    q, k, v = (drawn((1, 2, 200, 64), seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    assert relative(cpu.sdpa(q, k + 100, v, int8=True), truth_of(q, k + 100, v)) < 0.03


@PRECISIONS
@pytest.mark.parametrize("keys", [8_000, 20_000])
def test_long_sequences(keys, int8):
    q = drawn((1, 1, 60, 16), seed=1)
    k, v = (drawn((1, 1, keys, 16), seed=seed) for seed in (2, 3))
    truth = truth_of(q, k, v)
    assert relative(cpu.sdpa(q, k, v, int8=int8), truth) < (0.03 if int8 else 0.005)
    rising = (
        k + torch.linspace(-4, 4, keys).reshape(-1, 1)
    ).bfloat16()  # for half the rows, the last block is largest
    assert relative(cpu.sdpa(q, rising, v, int8=int8), truth_of(q, rising, v)) < (0.05 if int8 else 0.01)


# --- the same to the bit ---------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 500, 72), (2, 3, 77, 40), (1, 2, 1, 64), (1, 5, 700, 128)])
def test_threads_change_no_bit(shape, dtype, int8):
    q, k, v = (drawn(shape, "tokens", seed, dtype) for seed in (1, 2, 3))
    mask = drawn_mask("full", *shape[:3], shape[2])
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((cpu.sdpa(q, k, v, int8=int8), cpu.sdpa(q, k, v, mask, int8=int8)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@PRECISIONS
def test_layouts_and_neighbours_change_no_bit(int8):
    q, k, v = (drawn((2, 3, 70, 72), seed=seed) for seed in (1, 2, 3))
    whole = cpu.sdpa(q, k, v, int8=int8)
    moved = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert torch.equal(cpu.sdpa(*moved, int8=int8), whole)
    assert torch.equal(cpu.sdpa(q[1:, 1:2, 9:40], k[1:, 1:2], v[1:, 1:2], int8=int8), whole[1:, 1:2, 9:40])
    assert torch.equal(cpu.sdpa(q[:1].expand(2, -1, -1, -1), k, v, int8=int8)[0], whole[0])


@PRECISIONS
def test_merging_the_heads_is_a_view(int8):
    q = drawn((2, 3, 70, 72))
    out = cpu.sdpa(q, q, q, int8=int8)
    assert out.transpose(1, 2).reshape(2, 70, 216).data_ptr() == out.data_ptr()


# --- extreme values --------------------------------------------------------------------------------------------------


@PRECISIONS
def test_zero_queries_keys_and_values(int8):
    q, k, v = (drawn((1, 2, 70, 64), seed=seed) for seed in (1, 2, 3))
    zero = torch.zeros_like(q)
    mean = v.double().mean(-2, keepdim=True).expand_as(v)
    for ours in (cpu.sdpa(q, zero, v, int8=int8), cpu.sdpa(zero, k, v, int8=int8)):
        assert relative(ours, mean) < (0.02 if int8 else 0.005)
    assert torch.equal(cpu.sdpa(q, k, zero, int8=int8), zero)
    assert relative(cpu.sdpa(q[:, :, :1], k[:, :, :1], v[:, :, :1], int8=int8), v[:, :, :1].double()) < 0.01


@PRECISIONS
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e15])
def test_huge_and_tiny_values(size, int8):
    q, k, v = (drawn((1, 2, 70, 64), seed=seed) for seed in (1, 2, 3))
    big = (v * size).bfloat16()
    assert relative(cpu.sdpa(q, k, big, int8=int8), truth_of(q, k, big)) < 0.03 or size < 1e-12
    far = (q * size).bfloat16()
    ours = cpu.sdpa(far, k, v, int8=int8)
    assert ours.isfinite().all()
    if size > 1:  # one key has all the weight, unless two score nearly the same
        same = (ours.double() - truth_of(far, k, v)).abs().amax(-1) < 0.1
        assert same.double().mean() > (0.8 if int8 else 0.98)


@PRECISIONS
@pytest.mark.parametrize("keys", [64, 70, 600])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_spoil_what_they_reach(bad, keys, int8):
    q = drawn((1, 2, 60, 40), seed=1)
    k, v = (drawn((1, 2, keys, 40), seed=seed) for seed in (2, 3))
    clean = cpu.sdpa(q, k, v, int8=int8)
    spoiled = [tensor.clone() for tensor in (q, k, v)]
    spoiled[0][0, 0, 17, 5] = bad
    ours = cpu.sdpa(spoiled[0], k, v, int8=int8)
    others = torch.arange(60) != 17
    assert torch.equal(ours[0, 1], clean[0, 1]) and torch.equal(ours[0, 0, others], clean[0, 0, others])
    assert ours[0, 0, 17].isnan().all()
    spoiled[1][0, 0, 33, 7] = bad
    ours = cpu.sdpa(q, spoiled[1], v, int8=int8)
    assert torch.equal(ours[0, 1], clean[0, 1]) and (bad == torch.inf or ours[0, 0].isnan().all())
    spoiled[2][0, 0, 33, 7] = bad
    ours = cpu.sdpa(q, k, spoiled[2], int8=int8)
    assert not ours[0, 0, :, 7].isfinite().any() and torch.equal(ours[0, 0, :, 8:], clean[0, 0, :, 8:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_spread_what_is_no_number_as_torch_does_in_fp32(dtype, place, bad):
    tensors = [drawn((1, 2, tokens, 40), seed=seed, dtype=dtype) for seed, tokens in enumerate((30, 77, 77))]
    tensors[place][0, 1, 13, 5] = bad
    ours, theirs = cpu.sdpa(*tensors), F.scaled_dot_product_attention(*(tensor.float() for tensor in tensors))
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isposinf(), theirs.isposinf())
    assert (ours - theirs).nan_to_num(0, 0, 0).abs().max() < 0.05


@PRECISIONS
def test_masks_that_leave_nothing(int8):
    q, k, v = (drawn((1, 2, 70, 64), seed=seed) for seed in (1, 2, 3))
    mask = torch.zeros(70, 70)
    mask[3], mask[9, :64], mask[11], mask[20, 4] = -torch.inf, -torch.inf, torch.finfo(torch.float32).min, torch.nan
    ours = cpu.sdpa(q, k, v, mask, int8=int8)
    assert torch.equal(ours[:, :, 3], torch.zeros(1, 2, 64).bfloat16())
    assert relative(ours[:, :, 9], truth_of(q, k, v, mask)[:, :, 9]) < 0.03
    assert relative(ours[:, :, 11], v.double().mean(-2)) < 0.03, "masked alike is not masked"
    assert ours[:, :, 20].isnan().all() and not ours[:, :, 21:].isnan().any()


# --- what the kernel does not take -----------------------------------------------------------------------------------


def test_calls_of_other_kinds_are_torchs_with_a_reason():
    q, k, v = (drawn((1, 4, 9, 16), seed=seed) for seed in (1, 2, 3))
    wide = drawn((1, 4, 9, 257))
    calls = {
        "not in torch.float64": ((q.double(), k.double(), v.double()), {}),
        "no causal mask": ((q, k, v), {"is_causal": True}),
        "differ in batch, heads or tokens": ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
        "takes (batch, heads, tokens, width)": ((q[0], k[0], v[0]), {}),
        "no gradient": ((q.clone().requires_grad_(), k, v), {}),
        "one width up to 256": ((wide, wide, wide), {}),
        "there are no keys": ((q, k[:, :, :0], v[:, :, :0]), {}),
        "does not run on meta": (tuple(t.to("meta") for t in (q, k, v)), {}),
    }
    for words, (tensors, options) in calls.items():
        assert words in cpu.why_not(*tensors, **options)
        ours, theirs = cpu.sdpa(*tensors, **options), F.scaled_dot_product_attention(*tensors, **options)
        assert ours.is_meta or torch.equal(ours, theirs)
    assert "dropout" in cpu.why_not(q, k, v, dropout_p=0.5)
    assert "mask" in cpu.why_not(q, k, v, torch.zeros(9, 8))


def test_calls_that_torch_computes_faster_are_torchs(level, monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", FEWEST[0])
    monkeypatch.setattr(cpu, "FEWEST_ROWS", FEWEST[1])
    wide = level.startswith("avx512")
    for dtype, int8 in itertools.product(DTYPES, (False, True)):
        single = dtype is torch.float32
        edge = 16 if single else 8 >> wide  # heads of 64 x 32 tokens and 32 columns: 2^20 products, 2^19 or 2^18
        large, small = (drawn((1, edge // by, 64, 32), dtype=dtype) for by in (1, 2))
        assert cpu.why_not(large, large[:, :, :32], large[:, :, :32], int8=int8) is None
        call = small, small[:, :, :32], small[:, :, :32]
        assert "this small" in cpu.why_not(*call, int8=int8)
        assert torch.equal(cpu.sdpa(*call, int8=int8), F.scaled_dot_product_attention(*call))
        rows, keys = (drawn((1, 16, tokens, 64), dtype=dtype) for tokens in (7, 1024))
        reason = cpu.why_not(rows, keys, keys, int8=int8)
        assert (reason is None) == (not single and not int8) and (reason is None or "rows" in reason)
    rows = drawn((1, 16, 24, 64), dtype=torch.float32)
    assert cpu.why_not(rows, keys.float(), keys.float()) is None


def test_the_unit_is_what_the_level_multiplies(level):
    assert cpu.unit(torch.bfloat16, False) == ("bf16" if level == "avx512" else "fp32")
    assert cpu.unit(torch.float16, False) == cpu.unit(torch.float32, False) == "fp32"
    assert {cpu.unit(dtype, True) for dtype in DTYPES} == {"int8"}


def test_gradients_pass_through_torchs_attention():
    q = drawn((1, 2, 9, 16)).requires_grad_()
    cpu.sdpa(q, q, q).float().square().sum().backward()
    assert q.grad.norm() > 0
    with torch.no_grad():
        assert cpu.why_not(q, q, q) is None


@PRECISIONS
def test_the_op_is_a_proper_torch_op(int8):
    q, k = drawn((2, 3, 20, 40), "tokens"), drawn((2, 3, 30, 40))
    tests = ("test_schema", "test_faketensor")
    for mask in (None, torch.zeros(30)):
        torch.library.opcheck(torch.ops.dq.cpu_attention, (q, k, k, mask, 0.1, int8), test_utils=tests)
