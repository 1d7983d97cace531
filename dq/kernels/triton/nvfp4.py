"""nvfp4 activations and products on the block-scaled units of sm_100 and sm_120.

    y[m, n] = gx[m] gw sum_b sx[m, b] sw[n, b] sum_{k in b} x4[m, k] w4[n, k]        b: blocks of 16 columns

x4, w4: e2m1, two a byte, the even column in the low half, as `dq.formats` packs them; sx, sw: e4m3; gx fp32 a row
(`fit_global(per_row=True)`), gw fp32 one for the weight. The units read scales in tiles of 128 rows x 4 blocks:

    byte of (row r, block b) = ((r / 128) ceil(blocks / 4) + b / 4) 512 + (r % 32) 16 + (r % 128 / 32) 4 + b % 4

`nvfp4_quant` writes the scales of activations in that order; `tile_scales` brings the stored row-major ones of a
weight into it, a sixteenth of the weight's elements a call.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import (
    E2M1_MAX,
    E4M3_MAX,
    INTERPRETED,
    dot16,
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    grouped,
    snap_e4m3,
)
from dq.kernels.triton.gemm import finish

FLOOR = tl.constexpr(1e-12)  # formats.SCALE_FLOOR


@triton.jit
def tiled(row, block, quads):
    """Place of the scale of (row, block) among tiles of 128 rows x 4 blocks; quads = ceil(blocks / 4)."""
    return (row // 128 * quads + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@triton.jit
def nvfp4_quant(
    x_p, q_p, scale_p, g_p, M, K, pitch, quads,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (M, K), K a multiple of 16 -> q (M, K / 2) bytes, scales in tiles (128 ceil(M / 128), 4 quads) bytes, g (M,).

    BK >= 64 quads. Padding blocks get the scale 0. NaN or Inf give the row the global scale NaN.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k, b = tl.arange(0, BK), tl.arange(0, BK // 16)
    inside = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_p + (m * pitch)[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(x)
    bad = tl.sum((~(size < float("inf"))).to(tl.int32), 1)
    g = tl.maximum(tl.div_rn(tl.max(size, 1), E4M3_MAX * E2M1_MAX), FLOOR)
    blocks = tl.reshape(x, (BM, BK // 16, 16))
    wanted = tl.div_rn(tl.max(tl.abs(blocks), 2), E2M1_MAX)
    scale = snap_e4m3(tl.minimum(tl.div_rn(wanted, g[:, None]), E4M3_MAX))
    step = scale * g[:, None]
    step = tl.where(step == 0.0, float("inf"), step)
    code = e2m1_code(tl.reshape(tl.div_rn(blocks, step[:, :, None]), (BM, BK)))
    low, high = tl.split(tl.reshape(code, (BM, BK // 2, 2)))
    half = tl.arange(0, BK // 2)
    byte = (low | (high << 4)).to(tl.uint8)
    tl.store(q_p + (m * (K // 2))[:, None] + half[None, :], byte, mask=(m < M)[:, None] & (half < K // 2)[None, :])
    place = tiled(m[:, None], b[None, :], quads)
    tl.store(scale_p + place, e4m3_byte(scale), mask=(m < M)[:, None] & (b < 4 * quads)[None, :])
    tl.store(g_p + m, tl.where(bad > 0, float("nan"), g), mask=m < M)


@triton.jit
def tile_scales(s_p, out_p, N, blocks, quads, BN: tl.constexpr, BB: tl.constexpr):
    """Stored scale bytes (N, blocks) -> tiles (128 ceil(N / 128), 4 quads), 0 where there is no weight."""
    n, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BB + tl.arange(0, BB)
    inside = (n < N)[:, None] & (b < blocks)[None, :]
    s = tl.load(s_p + (n.to(tl.int64) * blocks)[:, None] + b[None, :], mask=inside, other=0)
    tl.store(out_p + tiled(n[:, None], b[None, :], quads), s, mask=(b < 4 * quads)[None, :] & (n >= 0)[:, None])


@triton.jit
def rows_of(tiles, R: tl.constexpr, C: tl.constexpr):
    """Tiles (1, R, C, 2, 256) of scale bytes -> (128 R, 4 C) in row order."""
    return tiles.reshape(R, C, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(128 * R, 4 * C)


@triton.jit
def product(a, a_scale, b, b_scale, acc):
    """acc + (a a_scale) (b b_scale)^T, blocks of 16: a (BM, BK / 2), b (BN, BK / 2) bytes, scales e4m3 bytes."""
    if INTERPRETED:  # its own version misreads the scales
        acc = dot16(decoded(a, a_scale), decoded(b, b_scale).T, acc)
    else:
        a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
        b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", acc)
    return acc


@triton.jit
def decoded(p, scale):
    """Bytes (R, C) and scale bytes (R, C / 8) -> fp32 (R, 2 C)."""
    R: tl.constexpr = p.shape[0]
    C: tl.constexpr = p.shape[1]
    b = p.to(tl.int32)
    w = tl.reshape(tl.interleave(e2m1_value(b & 15), e2m1_value((b >> 4) & 15)), (R, C // 8, 16))
    return tl.reshape(w * e4m3_value(scale)[:, :, None], (R, 2 * C))


@triton.jit
def nvfp4_gemm(
    a, a_scale, b, b_scale, gx_p, gw_p, bias_p, xd_p, up_p, out_p, M, N, K, R,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """a, b: descriptors of bytes (M, K / 2), (N, K / 2); a_scale, b_scale: of tiles (1, rows / 128, quads, 2, 256)."""
    RM: tl.constexpr = BM // 128
    RN: tl.constexpr = BN // 128
    RK: tl.constexpr = BK // 64
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=False):
        pm, pn = grouped(t, rows, columns, GROUP)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(tl.cdiv(K, BK)):
            sx = rows_of(a_scale.load([0, pm * RM, step * RK, 0, 0]), RM, RK)
            sw = rows_of(b_scale.load([0, pn * RN, step * RK, 0, 0]), RN, RK)
            half = step * (BK // 2)
            acc = product(a.load([pm * BM, half]), sx, b.load([pn * BN, half]), sw, acc)
        m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        y = acc * (tl.load(gx_p + m, mask=m < M, other=0.0) * tl.load(gw_p))[:, None]
        finish(y, m, n, M, N, R, bias_p, xd_p, up_p, out_p, GELU, CHUNKS, CHUNK)
