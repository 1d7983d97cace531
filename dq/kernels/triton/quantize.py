"""Activations to 8 bits in one pass over them, per token or group.

    q = clip(rne(z / s)),  s = max(absmax(z) / 127, 1e-12)    z = x + shift (rows, K) fp32, s per row or group of a row

The divisions are IEEE divisions, so codes and scales are those of `dq.formats` to the bit. fp8: e4m3 with 448 for 127.
Affine: s = (max - min) / 255, a zero point, as in `dq.formats.integer`; codes of at most 7 bits are stored with their
zero point already taken off.
A row (group) with NaN or Inf gets the scale NaN, which makes its whole output NaN as it does in the reference.

SPLIT > 0 writes the codes of every SPLIT neighbours with the even columns first and the odd ones after them: a byte
of two 4-bit weights holds columns 2j and 2j + 1, so that a tile of bytes meets two contiguous tiles of codes.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import E4M3_MAX, clip, rne, to_e4m3

FLOOR = tl.constexpr(1e-12)  # formats.SCALE_FLOOR


@triton.jit
def source(j, SPLIT: tl.constexpr):
    """Input column that is stored as column j."""
    if SPLIT > 0:
        j = j // SPLIT * SPLIT + j % (SPLIT // 2) * 2 + j % SPLIT // (SPLIT // 2)
    return j


@triton.jit
def read(x_p, row, column, inside, shift):
    """z of one tile, fp32, 0 where not inside."""
    x = tl.load(x_p + row + column, mask=inside, other=0.0)
    return tl.where(inside, x.to(tl.float32) + shift, 0.0)


@triton.jit
def span(z, AFFINE: tl.constexpr):
    """-> (low, high, bad) of each row: range (symmetric: 0 and the largest magnitude), count of NaN and Inf."""
    size = tl.abs(z)
    bad = tl.sum((~(size < float("inf"))).to(tl.int32), 1)
    if AFFINE:
        return tl.minimum(tl.min(z, 1), 0.0), tl.maximum(tl.max(z, 1), 0.0), bad
    high = tl.max(size, 1)
    return high * 0.0, high, bad


@triton.jit
def scale_zero(low, high, bad, TOP: tl.constexpr, AFFINE: tl.constexpr):
    """-> (scale, zero point) of each row, both fp32."""
    if AFFINE:
        s = tl.maximum(tl.div_rn(high - low, 2.0 * TOP + 1.0), FLOOR)
        zero = clip(-TOP - 1.0 - rne(clip(tl.div_rn(low, s), -2.0 * TOP - 2.0, 0.0)), -TOP - 1.0, TOP)
    else:
        s = tl.maximum(tl.div_rn(high, TOP), FLOOR)
        zero = s * 0.0
    return tl.where(bad > 0, float("nan"), s), zero


@triton.jit
def code(z, s, zero, TOP: tl.constexpr, FP8: tl.constexpr, AFFINE: tl.constexpr):
    """Codes of a tile: int8 or e4m3. Affine codes of fewer than 8 bits are stored less their zero point."""
    u = tl.div_rn(z, s[:, None])
    if FP8:
        q = to_e4m3(clip(u, -E4M3_MAX, E4M3_MAX))
    elif AFFINE:
        c = clip(rne(clip(u, -1024.0, 1024.0)) + zero[:, None], -TOP - 1.0, TOP)
        if TOP < 127:
            c = c - zero[:, None]
        q = c.to(tl.int8)
    else:
        q = rne(clip(u, -TOP, TOP)).to(tl.int8)
    return q


@triton.jit
def put(q_p, s_p, z_p, sum_p, q, s, zero, place, v, real, inside):
    """Store a tile of whole rows and what belongs to each row: scale, zero point, sum of codes."""
    tl.store(q_p + place, q, mask=inside)
    tl.store(s_p + v, s, mask=real)
    if z_p is not None:
        tl.store(z_p + v, zero.to(tl.int32), mask=real)
    if sum_p is not None:
        tl.store(sum_p + v, tl.sum(q.to(tl.int32), 1), mask=real)


@triton.jit
def quant_rows(
    x_p, given_p, q_p, s_p, z_p, sum_p, V, G, W, WP, K, pitch, shift, part,
    TOP: tl.constexpr, FP8: tl.constexpr, AFFINE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (M, K) -> q (M, G * WP) and s, z, sum (M, G): G groups of W columns, stored WP wide (zeros behind). V = M * G.

    part     of the measured range that codes cover
    given_p  a stored scale (1,) instead of a measured one: only NaN spoils a row then, Inf saturates
    z_p      int32 zero points (8-bit affine codes); sum_p: int32 sums of codes (affine weights); BK >= WP
    """
    v = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.arange(0, BK)
    real = v < V
    first = (v % G) * W
    column = first[:, None] + source(j, SPLIT)[None, :]
    width = tl.minimum(K - first, W)
    inside = real[:, None] & (source(j, SPLIT)[None, :] < width[:, None])
    z = read(x_p, (v // G * pitch)[:, None], column, inside, shift)
    if given_p is not None:
        bad = tl.sum((z != z).to(tl.int32), 1)
        s = tl.where(bad > 0, float("nan"), tl.load(given_p).to(tl.float32))
        zero = s * 0.0
    else:
        low, high, bad = span(z, AFFINE)
        s, zero = scale_zero(low * part, high * part, bad, TOP, AFFINE)
    q = code(z, s, zero, TOP, FP8, AFFINE)
    if AFFINE:  # padding is 0, whatever the zero point
        q = tl.where(inside, q, tl.zeros_like(q))
    place = (v * WP)[:, None] + j[None, :]
    put(q_p, s_p, z_p, sum_p, q, s, zero, place, v, real, real[:, None] & (j[None, :] < WP))


@triton.jit
def quant_long_rows(
    x_p, given_p, q_p, s_p, z_p, sum_p, V, G, W, WP, K, pitch, shift, part,
    TOP: tl.constexpr, FP8: tl.constexpr, AFFINE: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`quant_rows` for rows too long for registers: a pass for the range, another for the codes. One group; G = 1."""
    v = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.arange(0, BK)
    real = v < V
    row = (v * pitch)[:, None]
    low, high, bad = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.int32)
    for k in range(0, WP, BK):
        column = source(k + j, SPLIT)[None, :]
        z = read(x_p, row, column, real[:, None] & (column < K), shift)
        some_low, some_high, some_bad = span(z, AFFINE)
        low, high = tl.minimum(low, some_low), tl.maximum(high, some_high)
        if given_p is not None:
            some_bad = tl.sum((z != z).to(tl.int32), 1)
        bad += some_bad
    s, zero = scale_zero(low * part, high * part, bad, TOP, AFFINE)
    if given_p is not None:
        s = tl.where(bad > 0, float("nan"), tl.load(given_p).to(tl.float32))
    total = tl.zeros((BM,), tl.int32)
    for k in range(0, WP, BK):
        column = source(k + j, SPLIT)[None, :]
        inside = real[:, None] & (column < K)
        z = read(x_p, row, column, inside, shift)
        q = code(z, s, zero, TOP, FP8, AFFINE)
        if AFFINE:  # padding is 0, whatever the zero point
            q = tl.where(inside, q, tl.zeros_like(q))
        tl.store(q_p + (v * WP)[:, None] + (k + j)[None, :], q, mask=real[:, None] & ((k + j)[None, :] < WP))
        if sum_p is not None:
            total += tl.sum(q.to(tl.int32), 1)
    tl.store(s_p + v, s, mask=real)
    if z_p is not None:
        tl.store(z_p + v, zero.to(tl.int32), mask=real)
    if sum_p is not None:
        tl.store(sum_p + v, total, mask=real)
