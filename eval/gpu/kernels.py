"""8-bit kernels that take in what stands before or after a product: norms, rotations, GELU; gates and residuals.

    adaln_quant  q, s of ((norm(x) weight + bias) (1 + scale) + shift) * smooth
    had_quant    q, s of (x * smooth) R with Hadamard blocks R          gelu_quant  q, s of gelu(x * smooth) + shift
    gated_gemm   residual[m, n] + gate[b, n] ((sum_k q[m, k] w[n, k]) sx[m] sw[n] + bias[n]),    b = m // tokens

Rounding and sums are those of `dq.kernels.triton`; dq itself runs none of these yet.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import dot16, gelu_tanh, grouped, narrow
from dq.kernels.triton.gemm import described_sums, pointed_sums, scaled
from dq.kernels.triton.quantize import code, put, scale_zero, span


@triton.jit
def adaln_quant(
    x_p, weight_p, bias_p, scale_p, shift_p, smooth_p, y_p, q_p, s_p, M, K, KP, tokens, pitch, eps,
    TOP: tl.constexpr, FP8: tl.constexpr, RMS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = norm(x) * weight + bias, modulated: y (1 + scale[b]) + shift[b], b = row // tokens; q, s of y * smooth.

    x (M, K) contiguous; scale, shift (batch, K) with rows `pitch` apart; q (M, KP); y_p: optional copy of y * smooth
    in its own dtype for a low-rank branch. RMS: root mean square instead of mean and variance. BK >= KP.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    real, used = m < M, column < K
    inside = real[:, None] & used[None, :]
    x = tl.load(x_p + (m * K)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        x = tl.where(inside, x - (tl.sum(x, 1) / K)[:, None], 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    if weight_p is not None:
        y = y * tl.load(weight_p + column, mask=used, other=0.0).to(tl.float32)[None, :]
    if bias_p is not None:
        y = y + tl.load(bias_p + column, mask=used, other=0.0).to(tl.float32)[None, :]
    batch = (m // tokens * pitch)[:, None] + column[None, :]
    if scale_p is not None:
        y = y * (1.0 + tl.load(scale_p + batch, mask=inside, other=0.0).to(tl.float32))
    if shift_p is not None:
        y = y + tl.load(shift_p + batch, mask=inside, other=0.0).to(tl.float32)
    if smooth_p is not None:
        y = y * tl.load(smooth_p + column, mask=used, other=0.0).to(tl.float32)[None, :]
    y = tl.where(inside, y, 0.0)
    if y_p is not None:
        tl.store(y_p + (m * K)[:, None] + column[None, :], narrow(y, y_p.dtype.element_ty), mask=inside)
    low, high, bad = span(y, False)
    s, zero = scale_zero(low, high, bad, TOP, False)
    q = code(y, s, zero, TOP, FP8, False)
    place = (m * KP)[:, None] + column[None, :]
    put(q_p, s_p, None, None, q, s, zero, place, m, real, real[:, None] & (column[None, :] < KP))


@triton.jit
def had_quant(
    x_p, h_p, smooth_p, q_p, s_p, M, K, norm,
    TOP: tl.constexpr, FP8: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """q, s of (x * smooth) R: R has blocks h * norm, h (H, H) of +-1 in x's dtype, norm = 1 / sqrt(H). K % H == 0.

    Rotated rows are computed twice, for the range and for the codes: the products are cheaper than a trip to memory.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.arange(0, H)
    real = m < M
    inside = real[:, None] & (j >= 0)[None, :]
    h = tl.load(h_p + j[:, None] * H + j[None, :])
    high, bad = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.int32)
    for k in range(0, K, H):
        z = turned(x_p, smooth_p, h, m * K, k + j, inside, norm)
        _, some_high, some_bad = span(z, False)
        high, bad = tl.maximum(high, some_high), bad + some_bad
    s, none = scale_zero(high, high, bad, TOP, False)
    for k in range(0, K, H):
        z = turned(x_p, smooth_p, h, m * K, k + j, inside, norm)
        q = code(z, s, none, TOP, FP8, False)
        tl.store(q_p + (m * K)[:, None] + (k + j)[None, :], q, mask=inside)
    tl.store(s_p + m, s, mask=real)


@triton.jit
def turned(x_p, smooth_p, h, row, column, inside, norm):
    """One block of columns of (x * smooth) R, fp32."""
    x = tl.load(x_p + row[:, None] + column[None, :], mask=inside, other=0.0)
    if smooth_p is not None:
        x = smoothed(x, tl.load(smooth_p + column))
    return dot16(x, h, tl.zeros(x.shape, tl.float32)) * norm


@triton.jit
def gelu_quant(
    x_p, smooth_p, q_p, s_p, M, K, KP, pitch, shift,
    TOP: tl.constexpr, FP8: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q (M, KP), s of gelu(x * smooth) + shift; x * smooth is rounded to x's dtype, as unfused layers do. BK >= KP."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    real = m < M
    inside = real[:, None] & (column < K)[None, :]
    x = tl.load(x_p + (m * pitch)[:, None] + column[None, :], mask=inside, other=0.0)
    if smooth_p is not None:
        x = smoothed(x, tl.load(smooth_p + column, mask=column < K, other=1.0))
    z = tl.where(inside, gelu_tanh(x.to(tl.float32)) + shift, 0.0)
    low, high, bad = span(z, False)
    s, zero = scale_zero(low, high, bad, TOP, False)
    q = code(z, s, zero, TOP, FP8, False)
    place = (m * KP)[:, None] + column[None, :]
    put(q_p, s_p, None, None, q, s, zero, place, m, real, real[:, None] & (column[None, :] < KP))


@triton.jit
def smoothed(x, smooth):
    """x (rows, columns) * smooth (columns,), rounded to x's dtype."""
    return narrow(x.to(tl.float32) * narrow(smooth.to(tl.float32), x.dtype).to(tl.float32)[None, :], x.dtype)


@triton.jit
def gated(acc, m, n, M, N, tokens, gate_pitch, sx_p, sw_p, bias_p, gate_p, res_p, out_p):
    """From sums to output."""
    y = scaled(acc, m, n, M, N, sx_p, sw_p)
    if bias_p is not None:
        y += tl.load(bias_p + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    m = m.to(tl.int64)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = (m * N)[:, None] + n[None, :]
    gate = tl.load(gate_p + (m // tokens * gate_pitch)[:, None] + n[None, :], mask=inside, other=0.0)
    y = y * gate.to(tl.float32) + tl.load(res_p + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_p + place, narrow(y, out_p.dtype.element_ty), mask=inside)


@triton.jit
def gated_gemm(
    a_p, b_p, sx_p, sw_p, bias_p, gate_p, res_p, out_p, M, N, K, tokens, gate_pitch, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """`gemm.gemm` with a gate and a residual."""
    pm, pn = grouped(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    acc = pointed_sums(a_p, b_p, m, n, M, N, K, pitch, BM, BN, BK, RAGGED, FP8, None)
    gated(acc, m, n, M, N, tokens, gate_pitch, sx_p, sw_p, bias_p, gate_p, res_p, out_p)


@triton.jit
def gated_gemm_tma(
    a, b, sx_p, sw_p, bias_p, gate_p, res_p, out_p, M, N, K, tokens, gate_pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """`gemm.gemm_tma` with a gate and a residual."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=False):
        pm, pn = grouped(t, rows, columns, GROUP)
        acc = described_sums(a, b, pm, pn, K, BM, BN, BK, FP8, None)
        m, n = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
        gated(acc, m, n, M, N, tokens, gate_pitch, sx_p, sw_p, bias_p, gate_p, res_p, out_p)
