"""Integer and fp8 matrix units through ops that PyTorch ships: `_int_mm`, `_scaled_mm` and oneDNN's int8 convolution.

    y[m, n] = (sum_k q[m, k] w[n, k] - z[m] sum_k w[n, k]) * sx[m] * sw[n] + bias[n]      q, w int8; sums exact in int32

z is the zero point of affine activations. A linear gets sum_k w from one more row of ones in its matrix product. A
convolution has one activation scale and zero point per sample: the int8 kernel runs with scale 1 on codes padded with
their sample's zero point, and the result is scaled after.
Under autograd a layer whose input needs gradients runs `dense`, which is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dq.formats import SCALE_FLOOR, Format
from dq.formats.integer import Integer
from dq.kernels import Conv, Tensors, dense
from dq.kernels.reference import PER_ROW, scale_columns
from dq.plan import LayerPlan

RANK = 50


def why_not(op: str, plan: LayerPlan, device: str) -> str | None:
    """None when one of the kernels here runs the layer on `device`; else why not, in one line."""
    if plan.act is None:
        return "weight-only: activations stay in floating point"
    if plan.act.format == plan.weight.format == "fp8":
        return _why_not_fp8(op, plan, device)
    if not isinstance(plan.act.spec, Integer) or not _symmetric(plan.weight.spec):
        return f"torch has no {plan.weight.format} x {plan.act.format} kernel"
    if plan.act.scale != "dynamic" and plan.act.spec.affine:
        return "stored activation scales come without zero points"
    if plan.weight.grain.kind == "group":
        return "torch's int8 kernels take one weight scale per output channel, not per group"
    if plan.act.shift:
        return "torch's int8 kernels have no fixed activation shift"
    per_token = op == "linear" or plan.act.granularity == "token"
    return _why_not_linear(plan, device) if per_token else _why_not_conv(plan, device)


def _symmetric(spec: Format) -> bool:
    return isinstance(spec, Integer) and not spec.affine


def _why_not_fp8(op: str, plan: LayerPlan, device: str) -> str | None:
    if op != "linear" or device != "cuda":
        return f"torch's fp8 matrix product is for linears on CUDA, this is a {op} on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "fp8 tensor cores need compute capability 8.9"
    if plan.shape[0] % 16 or plan.shape[1] % 16 or plan.splits or plan.act.scale != "dynamic":
        return f"_scaled_mm needs both sizes in multiples of 16 and one dynamic scale per row, got {plan.shape}"
    return None if plan.weight.granularity == "channel" else "_scaled_mm needs one weight scale per output channel"


def _why_not_linear(plan: LayerPlan, device: str) -> str | None:
    if device == "cuda" and any(size % 8 for size in (plan.shape[0], *(b - a for a, b in plan.parts))):
        return f"_int_mm on CUDA needs sizes in multiples of 8, got {plan.shape}"
    return None if device in ("cpu", "cuda", "meta") else f"_int_mm is not available on {device}"


def _why_not_conv(plan: LayerPlan, device: str) -> str | None:
    if device != "cpu":
        return f"torch has an int8 convolution for the CPU only, not for {device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI; oneDNN's int8 convolution would saturate"
    return "an input split needs one convolution per part" if plan.splits else None


def label(op: str, plan: LayerPlan) -> str:
    if plan.weight.format == "fp8":
        return "torch._scaled_mm fp8 x fp8"
    pair = f"{plan.weight.format} x {plan.act.format}"
    per_token = op == "linear" or plan.act.granularity == "token"
    return f"torch._int_mm {pair}" if per_token else f"onednn qconv{len(plan.shape) - 2}d {pair}"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring."""
    if op == "linear":
        fast = _fp8_linear if plan.weight.format == "fp8" else _int_linear
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
    if spec.affine:
        e = spec.encode(x, PER_ROW)
        return e.codes, e.scale, e.zero
    top = spec.max_code
    if scale is not None:
        return (x.float() / scale).round_().clamp_(-top, top).to(torch.int8), scale.reshape(1, 1), None
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (torch.maximum(high, -low).float() / top).clamp_(min=SCALE_FLOOR)
    return (x.float() / scale).round_().to(torch.int8), scale, None


def _int_product(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """q (rows, k) int8 @ w (n, k) int8 transposed -> int32 (rows, n). CUDA wants more than 16 rows."""
    if q.is_cuda and q.shape[0] <= 16:
        return torch._int_mm(F.pad(q, (0, 0, 0, 32 - q.shape[0])), w.t())[: q.shape[0]]
    return torch._int_mm(q, w.t())


def _int_linear(plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    spec, columns, act = plan.weight.spec, plan.columns, plan.act.spec
    parts = list(zip(plan.parts, scale_columns(plan), strict=True))

    def part(rows: torch.Tensor, codes: torch.Tensor, stored: torch.Tensor | None) -> torch.Tensor:
        q, scale, zero = quantize_rows(rows, act, stored)
        if zero is None:
            return _int_product(q, codes).float().mul_(scale)
        product = _int_product(torch.cat([q, torch.ones_like(q[:1])]), codes)
        return (product[:-1] - zero.int() * product[-1:]).float().mul_(scale)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        rows = x.reshape(-1, columns)
        codes = spec.unpack(t.weight, columns)
        y = None
        for i, ((first, last), (left, right)) in enumerate(parts):
            stored = None if t.act_scale is None else t.act_scale[i]
            z = part(rows[:, first:last], codes[:, first:last], stored).mul_(t.scale[:, left:right].t())
            y = z if y is None else y.add_(z)
        if t.bias is not None:
            y = y.add_(t.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    return run


def _fp8_linear(plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    columns, top = plan.columns, torch.finfo(torch.float8_e4m3fn).max

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        rows = x.reshape(-1, columns).float()
        scale = (rows.abs().amax(-1, keepdim=True) / top).clamp_(min=SCALE_FLOOR)
        q = (rows / scale).clamp(-top, top).to(torch.float8_e4m3fn)
        w = t.weight.view(torch.float8_e4m3fn).t()
        y = torch._scaled_mm(q, w, scale_a=scale, scale_b=t.scale.reshape(1, -1), out_dtype=torch.bfloat16)
        y = y.to(x.dtype) if t.bias is None else y.to(x.dtype) + t.bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], -1)

    return run


@torch.library.custom_op("dq::conv_w8a8", mutates_args=(), device_types="cpu")
def conv_w8a8(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """q (batch, in, *space) uint8 = code + 128, weight (out, in / groups, *kernel) int8, scale (out,) -> fp32, oneDNN."""
    geometry, space = (stride, padding, dilation, groups), q.dim() - 2
    laid = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 128, *geometry, None)
    op = (torch.ops.onednn.qconv1d_pointwise, torch.ops.onednn.qconv2d_pointwise, torch.ops.onednn.qconv3d_pointwise)
    zero = torch.zeros(scale.numel(), dtype=torch.int64)
    run = op[space - 1].default
    y = run(q, 1.0, 128, laid, scale, zero, None, *geometry, 1.0, 0, torch.float32, "none", [], "")
    return y.contiguous()


@conv_w8a8.register_fake
def _(q, weight, scale, stride, padding, dilation, groups):
    shape = [q.shape[0], weight.shape[0]]
    for i, size in enumerate(q.shape[2:]):
        shape.append((size + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1)
    return q.new_empty(shape, dtype=torch.float32)


def _pixelwise(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """A pointwise convolution is a linear over channels, with one activation scale per pixel."""
    linear = _int_linear(plan, None)
    return lambda x, t: linear(x.movedim(1, -1), t).movedim(-1, 1)


def _padded(codes: torch.Tensor, zero: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """codes (batch, in, *space) int8 with `padding` on both sides of each dimension, filled with zero (batch, 1)."""
    space = [size + 2 * pad for size, pad in zip(codes.shape[2:], padding, strict=True)]
    out = zero.reshape(-1, *[1] * (codes.dim() - 1)).expand(*codes.shape[:2], *space).contiguous()
    inner = out
    for dim, (size, pad) in enumerate(zip(codes.shape[2:], padding, strict=True)):
        inner = inner.narrow(2 + dim, pad, size)
    inner.copy_(codes)
    return out


def _int_conv(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    spec, columns, shape, act = plan.weight.spec, plan.columns, plan.shape, plan.act.spec
    padding = [0] * len(conv.padding) if act.affine else list(conv.padding)
    geometry = (list(conv.stride), padding, list(conv.dilation), conv.groups)
    ones = [1] * (len(shape) - 2)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        stored = None if t.act_scale is None else t.act_scale[0]
        q, sx, zero = quantize_rows(x.reshape(x.shape[0], -1), act, stored)
        weight, scale = spec.unpack(t.weight, columns), t.scale.expand(shape[0], 1).reshape(-1)
        q = q.reshape(x.shape) if zero is None else _padded(q.reshape(x.shape), zero, conv.padding)
        codes = q.view(torch.uint8) ^ 128  # code + 128
        y = conv_w8a8(codes, weight.reshape(shape), scale.contiguous(), *geometry)
        if zero is not None:
            y = y.sub_((zero.float() * (weight.sum(1) * scale)).reshape(*y.shape[:2], *ones))
        y = y.mul_(sx.reshape(-1, 1, *ones))
        if t.bias is not None:
            y = y.add_(t.bias.reshape(1, -1, *ones))
        return y.to(x.dtype)

    return run
