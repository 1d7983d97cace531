"""Integer matrix units through the op that PyTorch ships: `_int_mm`.

    y[m, n] = (sum_k q[m, k] w[n, k] - z[m] sum_k w[n, k]) * sx[m] * sw[n] + bias[n]     q, w int8, sums exact

Of two-level weight scales w is the code times the multiplier of its group, and sw the scale of the row; of tables w is
the table's value.
z is the zero point of affine activations; sum_k w comes from one more row of ones in the matrix product. A
convolution is the product of its int8 patches (im2col) with its weight, one activation scale and zero point a sample;
padding is the zero point. oneDNN's int8 convolution is 1.1-1.3 times as fast once its weight is laid out, but laying
it out costs as much as the convolution, on every call or as a second copy of the weight.
Under autograd a layer whose input needs gradients runs `dense`, which is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F

from dq import kernels
from dq.formats.base import SCALE_FLOOR, Format
from dq.formats.integer import Integer
from dq.kernels import Conv, Tensors, dense, rows
from dq.kernels.reference import PER_ROW, out_sizes, row_codes, row_scale
from dq.kernels.triton import chips
from dq.plan import LayerPlan

RANK = 50
STATUS = "stable"


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when one of the kernels here runs the layer on `device`; else why not, in one line."""
    if plan.act is None:
        return "weight-only: activations stay in floating point"
    if not isinstance(plan.act.spec, Integer) or not _symmetric(plan.weight.spec):
        return f"torch has no {plan.weight.format} x {plan.act.format} kernel"
    if plan.act.scale != "dynamic" and plan.act.spec.affine:
        return "stored activation scales come without zero points"
    if plan.weight.grain.kind == "group" and not plan.weight.grain.two_level:
        return "torch's int8 kernels take one weight scale per output channel, not per group"
    if plan.act.grain.kind == "group":
        return "torch's int8 kernels take one activation scale per token, not per group"
    if plan.act.shift:
        return "torch's int8 kernels have no fixed activation shift"
    if plan.act.clip != 1:
        return "torch's int8 kernels cover the whole range of activations"
    if conv is not None and conv.groups > 1:
        return "a grouped convolution is one small product per group"
    if op == "conv" and plan.splits and plan.act.granularity != "token":
        return "an input split needs one convolution per part"
    if device == "cuda" and any(size % 8 for size in (plan.shape[0], *(b - a for a, b in plan.parts))):
        return f"_int_mm on CUDA needs sizes in multiples of 8, got {plan.shape}"
    if device == "cuda" and (missing := chips.missing("int8", kernels.architecture())):
        return missing
    if device == "cpu" and not kernels.vnni():  # a plain loop there: 660 ms for 1024 x 1152 x 1152 where fp32 takes 32
        return "torch._int_mm takes 20 times as long as fp32 on a processor without VNNI, and its sums may saturate"
    return None if device in ("cpu", "cuda", "meta") else f"_int_mm is not available on {device}"


def _symmetric(spec: Format) -> bool:
    return spec.tabled or (isinstance(spec, Integer) and not spec.affine)


def label(op: str, plan: LayerPlan) -> str:
    assert plan.act is not None
    pair = f"{plan.weight.format} x {plan.act.format}"
    patches = " on patches" if op == "conv" and plan.act.granularity != "token" else ""
    return f"torch._int_mm {pair}{patches}"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring."""
    assert plan.act is not None  # `why_not` asked for it
    if op == "linear":
        fast: Callable = _int_linear
    else:
        fast = _pixelwise if plan.act.granularity == "token" else _int_conv
    run, differentiable = fast(plan, conv), dense.build(op, plan, conv)

    def choose(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return differentiable(x, t)
        y = run(x, t)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return choose


def quantize_rows(x: torch.Tensor, spec: Integer, scale: torch.Tensor | None = None):
    """x (rows, columns) -> int8 codes, fp32 scale (rows, 1), zero point (rows, 1) or None. A stored scale is kept."""
    if torch.compiler.is_compiling():  # with nothing in place, so that it is fused into what comes before
        if spec.affine:
            return rows.affine(x, spec.bits)
        codes = rows.symmetric(x, spec.max_code) if scale is None else rows.stored(x, scale, spec.max_code)
        return *codes, None
    if spec.affine:
        e = spec.encode(x, PER_ROW)
        return e.codes, e.scale, e.zero
    top = spec.max_code
    if scale is not None:
        return (x.float() / scale).round_().clamp_(-top, top).to(torch.int8), scale.reshape(1, 1), None
    absmax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))  # aminmax is 20 times slower
    scale = (absmax.float() / top).clamp_(min=SCALE_FLOOR)
    return (x.float() / scale).round_().to(torch.int8), scale, None


def _int_product(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """q (rows, k) int8 @ w (n, k) int8 transposed -> int32 (rows, n). CUDA wants more than 16 rows."""
    if q.is_cuda and not w.is_contiguous():  # a part of an input split: cuBLASLt asks for aligned rows
        w = w.contiguous()
    if q.is_cuda and q.shape[0] <= 16:
        return torch._int_mm(F.pad(q, (0, 0, 0, 32 - q.shape[0])), w.t())[: q.shape[0]]
    return torch._int_mm(q, w.t())


def _int_linear(plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    assert plan.act is not None
    columns, act = plan.columns, plan.act.spec
    assert isinstance(act, Integer)
    parts, decode, row = plan.parts, row_codes(plan), row_scale(plan)

    def part(z: torch.Tensor, codes: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
        q, scale, zero = quantize_rows(z, act, stored)
        if zero is None:
            return _int_product(q, codes).float().mul_(scale)
        product = _int_product(torch.cat([q, torch.ones_like(q[:1])]), codes)
        return (product[:-1] - zero.int() * product[-1:]).float().mul_(scale)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        flat = x.reshape(-1, columns)
        codes, y = decode(t), None
        for i, (first, last) in enumerate(parts):
            stored = None if t.act_scale is None else t.act_scale[i]
            z = part(flat[:, first:last], codes[:, first:last], stored).mul_(row(t)[:, i : i + 1].t())
            y = z if y is None else y.add_(z)
        if t.bias is not None:
            y = y.add_(t.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], plan.shape[0])

    return run


def _pixelwise(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """A pointwise convolution is a linear over channels, with one activation scale per pixel."""
    linear = _int_linear(plan, None)
    return lambda x, t: _like(linear(x.movedim(1, -1), t).movedim(-1, 1), x)


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the memory order a convolution of x would have: callers take views of it."""
    return y.contiguous() if x.is_contiguous() else y


def _patches(q: torch.Tensor, zero: torch.Tensor | None, kernel: tuple[int, ...], conv: Conv) -> torch.Tensor:
    """q (batch, in, *space) int8 -> (pixels + 1, taps * in): a row per output pixel, and a last row of ones.

    Padded with `zero` (batch, 1), or 0 without zero points.
    """
    batch, channels = q.shape[:2]
    space = [size + 2 * pad for size, pad in zip(q.shape[2:], conv.padding, strict=True)]
    x = q.new_zeros(batch, *space, channels)
    if zero is not None:
        x += zero.reshape(-1, *[1] * (x.dim() - 1))
    inner = x
    for dim, (size, pad) in enumerate(zip(q.shape[2:], conv.padding, strict=True)):
        inner = inner.narrow(1 + dim, pad, size)
    inner.copy_(q.movedim(1, -1))
    out = out_sizes(q.shape[2:], kernel, conv)
    steps = [n * step for n, step in zip(x.stride()[1:-1], conv.stride, strict=True)]
    taps = [n * step for n, step in zip(x.stride()[1:-1], conv.dilation, strict=True)]
    windows = x.as_strided((batch, *out, *kernel, channels), (x.stride(0), *steps, *taps, 1))
    rows = q.new_ones(batch * prod(out) + 1, prod(kernel) * channels)
    rows[:-1].view(windows.shape).copy_(windows)
    return rows


def _int_conv(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    assert plan.act is not None
    act, kernel, decode, row = plan.act.spec, plan.shape[2:], row_codes(plan), row_scale(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        stored = None if t.act_scale is None else t.act_scale[0]
        q, sx, zero = quantize_rows(x.reshape(x.shape[0], -1), act, stored)
        weight = decode(t).reshape(plan.shape).movedim(1, -1).reshape(plan.shape[0], -1)
        product = _int_product(_patches(q.reshape(x.shape), zero, kernel, conv), weight)
        y = product[:-1].reshape(x.shape[0], -1, plan.shape[0])
        if zero is not None:
            y = y - zero.int()[:, :, None] * product[-1]
        y = y.float().mul_(sx[:, :, None]).mul_(row(t).reshape(-1))
        if t.bias is not None:
            y = y.add_(t.bias)
        return _like(
            y.to(x.dtype).transpose(1, 2).reshape(x.shape[0], plan.shape[0], *out_sizes(x.shape[2:], kernel, conv)), x
        )

    return run
