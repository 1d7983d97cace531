"""The arithmetic of the nunchaku-lite operators on packed tensors, in torch: in tests, in place of the Hub's.

    q = clamp(rne(x / smooth * rcp(s))),  s = absmax of 64 neighbours / 7, kept in the dtype of x
    y = sum_g (q_g . w_g) * (s_g * sw_g)  + bias,  one group after the other, rounded to the dtype of x each time
    y = y + up (down x),  summed in fp32, `down x` rounded to the dtype of x before the second product

What passes from one operator to the other is theirs; here it lies in rows.
"""

from __future__ import annotations

import sys
import types

import torch

from dq.formats.base import unpack_bits
from dq.kernels.nunchaku import layout

GROUP, MOST = 64, 7


def weight_codes(laid: torch.Tensor) -> torch.Tensor:
    """Codes (out, in) of a weight as diffusers holds it, (out, in / 2) bytes."""
    out, half = laid.shape
    packed = layout.weight_back(laid.reshape(out // 128, half // 32, 8, 8, 4, 16))
    return unpack_bits(packed, 4, 2 * half, signed=True)


def quantize_w4a4_act_fuse_lora(x, output, oscales, lora_down, lora_act_out, smooth, fuse_glu, fp4):
    """Fills output (rows to 256, in / 2) uint8, oscales (in / 64, rows), lora_act_out (rows, rank)."""
    assert not fuse_glu and not fp4 and x.is_contiguous() and output.shape[0] % 256 == 0
    assert output.dtype is torch.uint8 and oscales.dtype == smooth.dtype == lora_down.dtype == x.dtype
    rows, columns = x.shape
    assert columns % 128 == 0 and output.shape[1] == columns // 2 and lora_down.shape[0] == columns
    z = (x.float() / layout.vector_back(smooth).float()).to(x.dtype).float().reshape(rows, -1, GROUP)
    scale = z.abs().amax(-1, keepdim=True) * (1 / torch.tensor(float(MOST)))
    q = (z * (1 / scale)).round().clamp(-MOST - 1, MOST).nan_to_num(0).to(torch.int8).reshape(rows, columns)
    output.fill_(0xEE), oscales.fill_(torch.nan)  # rows of the padding hold anything
    output[:rows] = ((q[:, ::2] & 15) | (q[:, 1::2] << 4)).view(torch.uint8)
    oscales[:, :rows] = scale[..., 0].T.to(x.dtype)
    lora_act_out.zero_()
    lora_act_out[:rows] = x.float() @ layout.down_back(lora_down).float().T


def gemm_w4a4(act, wgt, out, qout, ascales, wscales, oscales, poolout, lora_act_in, lora_up, *rest):
    """Writes out (rows, outputs)."""
    bias, (unsigned, scales, silu, fp4) = rest[5], rest[9:13]
    others = (qout, oscales, poolout, *rest[:5], *rest[6:9], *rest[13:18])  # of other fusions
    assert len(rest) == 19 and not any(each is not None for each in others) and rest[18] == 0
    assert not unsigned and not silu and not fp4 and scales == [1.0] * (lora_up.shape[1] // 16)
    (rows, outputs), dtype = out.shape, out.dtype
    assert act.shape[0] % 256 == 0 and wgt.shape[0] % 128 == 0 and wscales.dtype == lora_up.dtype == dtype
    q = unpack_bits(act[:rows].view(torch.int8), 4, 2 * act.shape[1], signed=True).float()
    w = weight_codes(wgt).float()
    steps = layout.scale_back(wscales.reshape(outputs // 128, -1, 8, 4, 2, 2))
    y = torch.zeros(rows, outputs, dtype=dtype)
    for g in range(steps.shape[1]):
        part = slice(g * GROUP, (g + 1) * GROUP)
        whole = (q[:, part] @ w[:, part].T).to(dtype).float()
        factor = (ascales[g, :rows, None].float() * steps[:, g].float()).to(dtype).float()
        y = (whole * factor + y.float()).to(dtype)
    if bias is not None:
        y = (y.float() + layout.vector_back(bias).float()).to(dtype)
    low = lora_act_in[:rows].to(dtype).float() @ layout.up_back(lora_up).float().T
    out.copy_((y.float() + low).to(dtype))


def gemv_awq(x, qweight, wscales, wzeros, m, n, k, group_size):
    """x (m, k) by a weight-only int4 weight (n, k): decoded in the dtype of x, summed in fp32."""
    assert x.shape == (m, k) and m <= 8 and group_size == GROUP and wscales.shape == wzeros.shape == (k // GROUP, n)
    codes = (layout.words_back(qweight).float() + layout.ZERO).reshape(n, -1, GROUP)
    weight = (codes * wscales.T[..., None].float() + wzeros.T[..., None].float()).to(x.dtype)
    return (x.float() @ weight.reshape(n, k).float().T).to(x.dtype)


def awq_gemm_w4a16_g64_int32(x, qweight, wscales, wzeros):
    n = wscales.shape[1]
    codes = (layout.words_back(qweight).float() + layout.ZERO).reshape(n, -1, GROUP)
    weight = (codes * wscales.T[..., None].float() + wzeros.T[..., None].float()).to(x.dtype)
    return (x.float() @ weight.reshape(n, -1).float().T).to(x.dtype)


OPS = types.SimpleNamespace(
    quantize_w4a4_act_fuse_lora=quantize_w4a4_act_fuse_lora,
    gemm_w4a4=gemm_w4a4,
    gemv_awq=gemv_awq,
    awq_gemm_w4a16_g64_int32=awq_gemm_w4a16_g64_int32,
)


def stand_in(monkeypatch, ops=OPS) -> list[tuple]:
    """A `kernels` package that gives these operators, allowed by the user; -> what was asked of it."""
    asked: list[tuple] = []

    def get_kernel(*args, **kwargs):
        asked.append((args, kwargs))
        return types.SimpleNamespace(ops=ops)

    package = types.ModuleType("kernels")
    package.get_kernel, package.__version__ = get_kernel, "0.14.0"
    package.__spec__ = types.SimpleNamespace(name="kernels", origin=None, loader=None)
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setenv("DIFFUSERS_TRUST_REMOTE_KERNELS", "true")
    return asked
