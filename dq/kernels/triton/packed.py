"""4-bit weights as they are stored: two codes a byte, column 2j in the low half, 2j + 1 in the high half.

    low half:  (b << 4) & 0xF0 = 16 w[2j]       high half:  b & 0xF0 = 16 w[2j + 1]       as int8, w in -8 .. 7

Codes multiplied by 16 come out of one mask, and the factor goes into the scale. `w4a8` and `w4a8_groups` unpack in
registers and meet activation codes that the quantization kernel stored with even columns first (SPLIT, see
`quantize`), so the stored layout needs no second copy. `w4_to_s8` and `w4_to_float` unpack into a workspace instead:
a few microseconds beside a large product, which then runs at the full rate of 8-bit or 16-bit codes.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import INTERPRETED, dot16, e2m1_value, e4m3_value, grouped, narrow, rne
from dq.kernels.triton.gemm import epilogue, finish

INT4, NVFP4, MXFP4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def halves(p, ASM: tl.constexpr):
    """Bytes -> 16 times the low codes, 16 times the high ones, int8. ASM: four at a time by PTX."""
    if ASM and not INTERPRETED:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [p], tl.int8, True, 4
        )
        high = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [p], tl.int8, True, 4)
    else:
        low, high = p << 4, p & -16
    return low.to(tl.int8), high.to(tl.int8)


@triton.jit
def w4a8(
    a_p, b_p, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p, M, N, KP, KB, R,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr, ASM: tl.constexpr,
    SWAP: tl.constexpr, GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`gemm.gemm` with int4 weights and one scale per output channel, unpacked in registers.

    a (M, KP) int8, SPLIT = 128; b (N, KB) bytes; KP a multiple of 128. RAGGED: KB is no multiple of 64. SWAP computes
    the transpose, so that the weights are the operand that Hopper reads from registers. Sums are 16 times too large.
    """
    pm, pn = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, 64)
    a_row, b_row = tl.where(m < M, m, 0).to(tl.int64) * KP, tl.where(n < N, n, 0).to(tl.int64) * KB
    if SWAP:
        a_at, b_at = a_p + a_row[None, :] + k[:, None], b_p + b_row[:, None] + k[None, :]
        inside = k[None, :]
        acc = tl.zeros((BN, BM), dtype=tl.int32)
    else:
        a_at, b_at = a_p + a_row[:, None] + k[None, :], b_p + b_row[None, :] + k[:, None]
        inside = k[:, None]
        acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, KP // 2, 64):
        p = tl.load(b_at, mask=inside < KB - start, other=0) if RAGGED else tl.load(b_at)
        low, high = halves(p, ASM)
        even, odd = tl.load(a_at), tl.load(a_at + 64)
        if SWAP:
            acc = tl.dot(high, odd, tl.dot(low, even, acc, out_dtype=tl.int32), out_dtype=tl.int32)
        else:
            acc = tl.dot(odd, high, tl.dot(even, low, acc, out_dtype=tl.int32), out_dtype=tl.int32)
        a_at += 128
        b_at += 64
    if SWAP:
        acc = acc.T
    acc = acc >> 4  # exact: every product is a multiple of 16
    epilogue(
        acc, m, n, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
        GELU, CHUNKS, CHUNK,
    )  # fmt: skip


@triton.jit
def w4a8_groups(
    a_p, b_p, sx_p, sw_p, bias_p, xd_p, up_p, out_p, M, N, KP, KB, R,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    ASM: tl.constexpr, TOKEN: tl.constexpr, GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """int4 weights with a scale per G columns: sw (N, KP / G); sx (M,) if TOKEN, else (M, KP / G), as activations of
    4 bits have. Sums of a group are exact in int32, those of groups are added in fp32.

    a (M, KP) int8, SPLIT = G; b (N, KB) bytes; KP a multiple of G. RAGGED: KB is no multiple of G / 2.
    """
    H: tl.constexpr = G // 2
    pm, pn = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN), tl.arange(0, H)
    m_in, n_in = tl.where(m < M, m, 0).to(tl.int64), tl.where(n < N, n, 0).to(tl.int64)
    a_at, b_at = a_p + (m_in * KP)[:, None] + k[None, :], b_p + (n_in * KB)[None, :] + k[:, None]
    sx_at, sw_at = sx_p + m_in * (KP // G), sw_p + n_in * (KP // G)
    y = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, KP // 2, H):
        p = tl.load(b_at, mask=k[:, None] < KB - start, other=0) if RAGGED else tl.load(b_at)
        low, high = halves(p, ASM)
        acc = tl.dot(tl.load(a_at), low, out_dtype=tl.int32)
        acc = tl.dot(tl.load(a_at + H), high, acc, out_dtype=tl.int32).to(tl.float32)
        if TOKEN:
            y += acc * tl.load(sw_at)[None, :]
        else:
            y += acc * (tl.load(sx_at)[:, None] * tl.load(sw_at)[None, :])
        a_at += G
        b_at += H
        sx_at += 1
        sw_at += 1
    y *= 0.0625
    if TOKEN:
        y *= tl.load(sx_p + m_in)[:, None]
    finish(y, m, n, M, N, R, bias_p, xd_p, up_p, out_p, GELU, CHUNKS, CHUNK)


@triton.jit
def pair(p, SIGNED: tl.constexpr):
    """A tile of bytes (R, C) -> its codes in column order (R, 2 C), int32."""
    b = p.to(tl.int32)
    low, high = b & 15, (b >> 4) & 15
    if SIGNED:
        low, high = (low ^ 8) - 8, (high ^ 8) - 8
    return tl.interleave(low, high)


@triton.jit
def w4_to_s8(
    b_p, times_p, out_p, N, K, KB, groups, G: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """b (N, KB) bytes -> int8 codes (N, K), with times_p (N, groups) times the multiplier of their G columns: int8, or
    fp32 and rounded.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    j, k = tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(1) * 2 * BB + tl.arange(0, 2 * BB)
    p = tl.load(b_p + (n * KB)[:, None] + j[None, :], mask=(n < N)[:, None] & (j < KB)[None, :], other=0)
    inside = (n < N)[:, None] & (k < K)[None, :]
    codes = pair(p, True)
    if times_p is not None:
        place = (n * groups)[:, None] + (k // G)[None, :]
        times = tl.load(times_p + place, mask=inside, other=0)
        codes = rne(codes * times) if times.dtype == tl.float32 else codes * times.to(tl.int32)
    tl.store(out_p + (n * K)[:, None] + k[None, :], codes.to(tl.int8), mask=inside)


@triton.jit
def w4_to_float(
    b_p, scale_p, zero_p, global_p, out_p, N, K, KB, groups,
    FORMAT: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """b (N, KB) bytes with a scale per G columns (N, groups) -> weights (N, K) in out's dtype, rounded once from fp32.

    FORMAT: INT4 with fp32 scales and optional int8 zero points, NVFP4 with e4m3 bytes and one global fp32, MXFP4 with
    exponent bytes.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    j, k = tl.program_id(1) * BB + tl.arange(0, BB), tl.program_id(1) * 2 * BB + tl.arange(0, 2 * BB)
    p = tl.load(b_p + (n * KB)[:, None] + j[None, :], mask=(n < N)[:, None] & (j < KB)[None, :], other=0)
    inside = (n < N)[:, None] & (k < K)[None, :]
    place = (n * groups)[:, None] + (k // G)[None, :]
    step = tl.load(scale_p + place, mask=inside, other=0)
    if FORMAT == INT4:
        w = pair(p, True)
        if zero_p is not None:
            w = w - tl.load(zero_p + place, mask=inside, other=0).to(tl.int32)
        w = w.to(tl.float32) * step
    else:
        w = e2m1_value(pair(p, False))
        if FORMAT == NVFP4:
            w = w * (e4m3_value(step.to(tl.uint8, bitcast=True)) * tl.load(global_p))
        else:
            byte = step.to(tl.int32) & 255
            power = (byte << 23).to(tl.float32, bitcast=True)
            power = tl.where(byte == 0, 5.877471754111438e-39, power)
            w = w * tl.where(byte == 255, float("nan"), power)
    tl.store(out_p + (n * K)[:, None] + k[None, :], narrow(w, out_p.dtype.element_ty), mask=inside)


@triton.jit
def weight_sums(
    b_p, scale_p, out_p, N, K, KB, groups,
    BITS: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Sum of each row: int32 sums of codes of BITS 8 or 4, or with scale_p (N, groups) fp32 sums of 4-bit weights."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    real = n < N
    total = tl.zeros((BN,), tl.int32 if scale_p is None else tl.float32)
    for start in range(0, KB, BB):
        j = start + tl.arange(0, BB)
        p = tl.load(b_p + (n * KB)[:, None] + j[None, :], mask=real[:, None] & (j < KB)[None, :], other=0)
        if BITS == 8:
            w = p.to(tl.int32)
        else:
            b = p.to(tl.int32)
            w = ((b & 15) ^ 8) + (((b >> 4) & 15) ^ 8) - 16
        if scale_p is not None:
            place = (n * groups)[:, None] + (2 * j // G)[None, :]
            inside = real[:, None] & (2 * j < K)[None, :]
            w = w.to(tl.float32) * tl.load(scale_p + place, mask=inside, other=0.0)
        total += tl.sum(w, 1)
    tl.store(out_p + n, total, mask=real)


@triton.jit
def few_rows(
    x_p, b_p, scale_p, zero_p, bias_p, out_p, M, N, K, KB, groups, pitch,
    BITS: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = x w^T + bias for at most BM rows of x: reads the stored weight once, codes of BITS 8 or 4 (N, KB) bytes.

    scale_p, zero_p (N, groups), a scale for G columns; a single one a row follows the sum where there are no zero
    points, so that the weight in 16 bits is exact, else weights are rounded once as `w4_to_float` does.
    """
    m, n = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    n_in = tl.where(n < N, n, 0).to(tl.int64)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (n < N)[:, None] & (k < K)[None, :]
        if BITS == 8:
            w = tl.load(b_p + (n_in * KB)[:, None] + k[None, :], mask=inside, other=0).to(tl.float32)
        else:
            j = start // 2 + tl.arange(0, BK // 2)
            p = tl.load(b_p + (n_in * KB)[:, None] + j[None, :], mask=(n < N)[:, None] & (j < KB)[None, :], other=0)
            w = pair(p, True).to(tl.float32)
        if G > 0:
            place = (n_in * groups)[:, None] + (k // G)[None, :]
            if zero_p is not None:
                w -= tl.load(zero_p + place, mask=inside, other=0).to(tl.float32)
            w *= tl.load(scale_p + place, mask=inside, other=0.0)
        x = tl.load(x_p + (m * pitch)[:, None] + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot16(x, narrow(w, x_p.dtype.element_ty).T, acc)
    if G == 0:
        acc *= tl.load(scale_p + n, mask=n < N, other=0.0)[None, :]
    if bias_p is not None:
        acc += tl.load(bias_p + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = (m * N)[:, None] + n[None, :]
    tl.store(out_p + place, narrow(acc, out_p.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
