"""Attention on 8-bit queries and keys, and the kernels that make them from a projection. SageAttention, 2410.02367.

    s[i, j] = (sum_d q8[i, d] k8[j, d]) sq[i] sk[j] / sqrt(D),   o[i] = sum_j softmax(s)[i, j] v[j]

q8, k8: int8 after RMSNorm and rotary embedding, one fp32 scale a token and head; sq carries log2(e) / sqrt(D), so that
the kernel works in powers of two. A constant vector taken off every key of a head changes no softmax: `k_sums` gives
the mean key, which is most of what keys have in common. Probabilities and values are multiplied in fp16, or in e4m3
with probabilities times 448 and one scale per channel of v, whose transpose is stored (8-bit products want both
operands contiguous along the sum). Head sizes that are no power of two are padded by masks.
"""

import triton
import triton.language as tl

from dq.kernels.triton.elements import E4M3_MAX, clip, dot16, narrow, rne, to_e4m3
from dq.kernels.triton.quantize import scale_zero, span


@triton.jit
def place_of():
    """-> (head, block of rows) of a program."""
    return tl.program_id(1).to(tl.int64), tl.program_id(0)


@triton.jit
def rotated(
    x_p, weight_p, cos_p, sin_p, row, t, inside, d, D: tl.constexpr, eps, HALF: tl.constexpr
):  # fmt: skip
    """RMSNorm (if weight_p) and rotary embedding (if cos_p) of a tile of heads (BM, BD), fp32.

    HALF: pairs are (d, d + D / 2), else neighbours. cos, sin: (tokens, D) fp32.
    """
    if HALF:
        other, sign = (d + D // 2) % D, tl.where(d < D // 2, -1.0, 1.0)
    else:
        other, sign = d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
    x = tl.load(x_p + row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 + row * 0.0
    if weight_p is not None:
        r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        x = x * r[:, None] * tl.load(weight_p + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if cos_p is not None:
        y = tl.load(x_p + row[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight_p is not None:
            y = y * r[:, None] * tl.load(weight_p + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
        place = (t * D)[:, None] + d[None, :]
        cos = tl.load(cos_p + place, mask=inside, other=1.0)
        sin = tl.load(sin_p + place, mask=inside, other=0.0)
        x = x * cos + sign[None, :] * y * sin
    return x


@triton.jit
def k_sums(
    x_p, weight_p, cos_p, sin_p, out_p, L, H, batch_pitch, token_pitch, eps,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Sums over BM tokens of normed and rotated keys: x (B, L, H, D) -> out (B * H, ceil(L / BM), D) fp32."""
    bh, part = place_of()
    t, d = part * BM + tl.arange(0, BM), tl.arange(0, BD)
    row = bh // H * batch_pitch + t.to(tl.int64) * token_pitch + bh % H * D
    inside = (t < L)[:, None] & (d < D)[None, :]
    x = rotated(x_p, weight_p, cos_p, sin_p, row, t, inside, d, D, eps, HALF)
    place = (bh * tl.cdiv(L, BM) + part) * D
    tl.store(out_p + place + d, tl.sum(tl.where(inside, x, 0.0), 0), mask=d < D)


@triton.jit
def qk_norm_rope_quant(
    x_p, weight_p, cos_p, sin_p, mean_p, q_p, s_p, L, H, batch_pitch, token_pitch, eps, factor,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x (B, L, H, D), any pitches -> q (B * H, L, D) int8, s (B * H, L) fp32 times factor; mean (B * H, D) off."""
    bh, part = place_of()
    t, d = part * BM + tl.arange(0, BM), tl.arange(0, BD)
    row = bh // H * batch_pitch + t.to(tl.int64) * token_pitch + bh % H * D
    inside = (t < L)[:, None] & (d < D)[None, :]
    x = rotated(x_p, weight_p, cos_p, sin_p, row, t, inside, d, D, eps, HALF)
    if mean_p is not None:
        x = x - tl.load(mean_p + bh * D + d, mask=d < D, other=0.0)[None, :]
    x = tl.where(inside, x, 0.0)
    low, high, bad = span(x, False)
    s, _ = scale_zero(low, high, bad, 127.0, False)
    q = rne(clip(tl.div_rn(x, s[:, None]), -127.0, 127.0)).to(tl.int8)
    tl.store(q_p + (bh * L + t)[:, None] * D + d[None, :], q, mask=inside)
    tl.store(s_p + bh * L + t, s * factor, mask=t < L)


@triton.jit
def v_fp8(
    x_p, s_p, out_p, L, LP, H, batch_pitch, token_pitch,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """x (B, L, H, D) -> e4m3 of x / s, transposed: out (B * H, D, LP), 0 from L on. s (B * H, D)."""
    bh, part = place_of()
    t, d = part * BM + tl.arange(0, BM), tl.arange(0, BD)
    row = bh // H * batch_pitch + t.to(tl.int64) * token_pitch + bh % H * D
    x = tl.load(x_p + row[:, None] + d[None, :], mask=(t < L)[:, None] & (d < D)[None, :], other=0.0)
    s = tl.load(s_p + bh * D + d, mask=d < D, other=1.0)
    v = to_e4m3(clip(tl.div_rn(x.to(tl.float32), s[None, :]), -E4M3_MAX, E4M3_MAX))
    place = ((bh * D + d) * LP)[:, None] + t[None, :]
    tl.store(out_p + place, v.T, mask=(d < D)[:, None] & (t < LP)[None, :])


@triton.jit
def attn_i8(
    q_p, k_p, v_p, sq_p, sk_p, sv_p, o_p, L, LK, LP, H,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PV8: tl.constexpr,
):  # fmt: skip
    """q (B * H, L, D), k (B * H, LK, D) int8 with scales sq, sk -> o (B, L, H, D).

    v: fp16 (B * H, LK, D), or with PV8 e4m3 (B * H, D, LP) and sv (B * H, D). Keys from LK on do not count.
    """
    bh, part = place_of()
    m, d, j = part * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
    q_in = (m < L)[:, None] & (d < D)[None, :] if D < BD else (m < L)[:, None]
    q = tl.load(q_p + (bh * L + m)[:, None] * D + d[None, :], mask=q_in, other=0)
    sq = tl.load(sq_p + bh * L + m, mask=m < L, other=0.0)
    top, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for start in range(0, LK, BN):
        n = start + j
        k_in = (n < LK)[None, :] & (d < D)[:, None] if D < BD else (n < LK)[None, :]
        k = tl.load(k_p + (bh * LK + n)[None, :] * D + d[:, None], mask=k_in, other=0)
        sk = tl.load(sk_p + bh * LK + n, mask=n < LK, other=0.0)
        s = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * sq[:, None] * sk[None, :]
        s = tl.where((n < LK)[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total, top = total * shrink + tl.sum(p, 1), new
        acc = acc * shrink[:, None]
        if PV8:
            v_in = (n < LP)[:, None] & (d < D)[None, :] if D < BD else (n < LP)[:, None]
            v = tl.load(v_p + (bh * D + d)[None, :] * LP + n[:, None], mask=v_in, other=0.0)
            acc = tl.dot(to_e4m3(p * E4M3_MAX), v, acc)
        else:
            v_in = (n < LK)[:, None] & (d < D)[None, :] if D < BD else (n < LK)[:, None]
            v = tl.load(v_p + (bh * LK + n)[:, None] * D + d[None, :], mask=v_in, other=0.0)
            acc = dot16(p.to(tl.float16), v, acc)
    o = acc / total[:, None]
    if PV8:
        o = o * (tl.load(sv_p + bh * D + d, mask=d < D, other=0.0) / E4M3_MAX)[None, :]
    place = ((bh // H * L + m) * H + bh % H)[:, None] * D + d[None, :]
    tl.store(o_p + place, narrow(o, o_p.dtype.element_ty), mask=q_in)
