"""Matrix products of 8-bit codes with everything that follows a linear layer in the epilogue.

    y[m, n] = f((sum_k q[m, k] w[n, k] - zx[m] wsum[n] - zw[n] qsum[m]) sx[m] sw[n] + (xd up^T)[m, n] + bias[n])
    f: nothing or GELU (tanh)

q (M, K) row-major with rows `pitch` apart; w (N, K) row-major (8-bit tensor cores want both operands contiguous along
K); sums of int8 in int32 (exact up to K = 131072), of e4m3 in fp32. Optional operands are None and cost nothing.
Hopper's units sum e4m3 products in 14 bits of mantissa, as `torch._scaled_mm` does with use_fast_accum; with SHORT
they hand over to fp32 every SHORT products, for which a second accumulator must fit into registers.
`gemm` reads through pointers and takes any shape; `gemm_tma` reads through tensor descriptors (sm_90 and later, rows
of 16-byte multiples) with one resident program per multiprocessor that walks the tiles.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import dot16, gelu_tanh, grouped, narrow


@triton.jit
def branch(y, m, n, M, N, R, xd_p, up_p, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """y + xd up^T: xd (M, R), up (N, R), summed in CHUNKS of CHUNK columns."""
    for c in tl.static_range(CHUNKS):
        r = c * CHUNK + tl.arange(0, CHUNK)
        xd = tl.load(xd_p + (m * R)[:, None] + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        up = tl.load(up_p + (n * R)[None, :] + r[:, None], mask=(n < N)[None, :] & (r < R)[:, None], other=0.0)
        y = dot16(xd, up.to(xd.dtype), y)
    return y


@triton.jit
def finish(
    y, m, n, M, N, R, bias_p, xd_p, up_p, out_p,
    GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Low-rank branch, bias and f of the scaled tile y (fp32, rows m, columns n), then the store in out's dtype.

    GELU: 0 for none, 1, or 2 for the fast one (see `gelu_tanh`).
    """
    m = m.to(tl.int64)
    if xd_p is not None:
        y = branch(y, m, n, M, N, R, xd_p, up_p, CHUNKS, CHUNK)
    if bias_p is not None:
        y += tl.load(bias_p + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU > 0:
        y = gelu_tanh(y, GELU == 2)
    place = (m * N)[:, None] + n[None, :]
    tl.store(out_p + place, narrow(y, out_p.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def correct(acc, m, n, M, N, zx_p, wsum_p, zw_p, qsum_p):
    """Integer sums less the part of zero points of rows (zx, with sums of weights) or columns (zw, sums of codes)."""
    if zx_p is not None:
        zx = tl.load(zx_p + m, mask=m < M, other=0)
        acc -= zx[:, None] * tl.load(wsum_p + n, mask=n < N, other=0)[None, :]
    if zw_p is not None:
        zw = tl.load(zw_p + n, mask=n < N, other=0).to(tl.int32)
        acc -= tl.load(qsum_p + m, mask=m < M, other=0)[:, None] * zw[None, :]
    return acc


@triton.jit
def scaled(acc, m, n, M, N, sx_p, sw_p):
    """Sums times the scales of their row and column, fp32."""
    sx = tl.load(sx_p + m, mask=m < M, other=0.0)
    return acc.to(tl.float32) * sx[:, None] * tl.load(sw_p + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def epilogue(
    acc, m, n, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
    GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """From sums to output."""
    y = scaled(correct(acc, m, n, M, N, zx_p, wsum_p, zw_p, qsum_p), m, n, M, N, sx_p, sw_p)
    finish(y, m, n, M, N, R, bias_p, xd_p, up_p, out_p, GELU, CHUNKS, CHUNK)


@triton.jit
def epilogues(
    acc, m, pn, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
    BM: tl.constexpr, BN: tl.constexpr, GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`epilogue` of a tile, of wide ones a half at a time: whole, their fp32 copies would not fit in registers."""
    if BM * BN >= 128 * 256:
        H: tl.constexpr = BN // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, H)), (0, 2, 1)))
        n = pn * BN + tl.arange(0, H)
        epilogue(
            left, m, n, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
            GELU, CHUNKS, CHUNK,
        )  # fmt: skip
        epilogue(
            right, m, n + H, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
            GELU, CHUNKS, CHUNK,
        )  # fmt: skip
    else:
        epilogue(
            acc, m, pn * BN + tl.arange(0, BN), M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p,
            bias_p, xd_p, up_p, out_p, GELU, CHUNKS, CHUNK,
        )  # fmt: skip


@triton.jit
def pointed_sums(
    a_p, b_p, m, n, M, N, K, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr, FP8: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """Sums of one tile (BM, BN), read through pointers: int32, of e4m3 fp32. RAGGED: K is no multiple of BK."""
    k = tl.arange(0, BK)
    a_row = tl.where(m < M, m, 0).to(tl.int64) * pitch  # rows past the end read the first one and are not stored
    b_row = tl.where(n < N, n, 0).to(tl.int64) * K
    a_at, b_at = a_p + a_row[:, None] + k[None, :], b_p + b_row[None, :] + k[:, None]
    kind: tl.constexpr = tl.float32 if FP8 else tl.int32
    acc = tl.zeros((BM, BN), dtype=kind)
    for start in range(0, K, BK):
        if RAGGED:
            a = tl.load(a_at, mask=k[None, :] < K - start, other=0.0)
            b = tl.load(b_at, mask=k[:, None] < K - start, other=0.0)
        else:
            a, b = tl.load(a_at), tl.load(b_at)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=SHORT, out_dtype=kind)
        a_at += BK
        b_at += BK
    return acc


@triton.jit
def described_sums(
    a, b, pm, pn, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FP8: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, which read 0 outside of the matrices."""
    kind: tl.constexpr = tl.float32 if FP8 else tl.int32
    acc = tl.zeros((BM, BN), dtype=kind)
    for start in range(0, K, BK):
        q, w = a.load([pm * BM, start]), b.load([pn * BN, start])
        acc = tl.dot(q, w.T, acc, max_num_imprecise_acc=SHORT, out_dtype=kind)
    return acc


@triton.jit
def gemm(
    a_p, b_p, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p, M, N, K, R, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    FP8: tl.constexpr, SHORT: tl.constexpr, GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """See the module."""
    pm, pn = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    acc = pointed_sums(a_p, b_p, m, n, M, N, K, pitch, BM, BN, BK, RAGGED, FP8, SHORT)
    epilogues(
        acc, m, pn, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p,
        BM, BN, GELU, CHUNKS, CHUNK,
    )  # fmt: skip


@triton.jit
def gemm_tma(
    a, b, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, xd_p, up_p, out_p, M, N, K, R,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FP8: tl.constexpr, SHORT: tl.constexpr, GELU: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """a, b: descriptors of q and w with blocks (BM, BK) and (BN, BK)."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=False):
        pm, pn = grouped(t, rows, columns, GROUP)
        acc = described_sums(a, b, pm, pn, K, BM, BN, BK, FP8, SHORT)
        epilogues(
            acc, pm * BM + tl.arange(0, BM), pn, M, N, R, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p,
            bias_p, xd_p, up_p, out_p, BM, BN, GELU, CHUNKS, CHUNK,
        )  # fmt: skip
