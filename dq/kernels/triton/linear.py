"""A linear layer from the kernels: quantize rows, multiply, everything else in the epilogue.

    y = s_x s_w (q w - zero points) + (x down^T) up^T + bias,    shifted inputs: bias' = bias - shift sum_k W[n, k]

Sums of weights, which shifts and zero points need, are taken anew in each call: they read the weight once, and a kept
copy would have to follow every load, LoRA fusion and move. int4 weights are unpacked in registers for few rows, where
the product waits for memory, and to an int8 workspace for many, where one pass over the weight is a few percent.
Under autograd a layer whose input needs gradients runs `dense`, which is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dq.kernels import Tensors, dense
from dq.kernels.triton import ops
from dq.kernels.triton.routes import route
from dq.plan import LayerPlan

REGISTER_ROWS = 512  # rows up to which int4 weights are unpacked in registers; an estimate, no GPU was at hand
SPLIT = 128  # columns that `w4a8` reads at a time

Run = Callable[[torch.Tensor, Tensors], torch.Tensor]


def build(plan: LayerPlan, gelu: bool = False) -> Run:
    """-> run(x (..., K), tensors) -> y (..., N) in x's dtype; with `gelu` its tanh GELU (not weight-only)."""
    kind = route(plan).kind
    makers = {"w8": _integer, "w4": _integer, "groups": _groups, "fp8": _fp8, "nvfp4": _nvfp4}
    run, differentiable = (
        makers[kind](plan, gelu) if kind in makers else _decode(plan),
        dense.build("linear", plan, None),
    )
    outputs, inputs = plan.shape

    def choose(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y = differentiable(x, t)
            return F.gelu(y, approximate="tanh") if gelu else y
        return run(x.reshape(-1, inputs), t).reshape(*x.shape[:-1], outputs)

    return choose


def _low_rank(x: torch.Tensor, t: Tensors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """-> (x down^T, up) of the low-rank branch, or (None, None)."""
    return (None, None) if t.down is None else (F.linear(x, t.down.to(x.dtype)), t.up)


def _column_scale(plan: LayerPlan, t: Tensors) -> torch.Tensor:
    """One fp32 weight scale an output channel."""
    return t.scale.reshape(-1) if t.scale.shape[0] == plan.rows else t.scale.reshape(1).expand(plan.rows).contiguous()


def _quantizer(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors, int, bool], tuple[torch.Tensor, ...]]:
    """-> quantize(x, tensors, split, sums) -> (q, s, zero or None, sums or None), integer activations."""
    spec, group, shift = plan.act.spec, plan.act.grain.size or 0, plan.act.shift
    top, affine = spec.max_code, spec.affine

    def quantize(x: torch.Tensor, t: Tensors, split: int, sums: bool) -> tuple[torch.Tensor, ...]:
        stored = None if t.act_scale is None else t.act_scale.reshape(-1)[:1]
        q, s, zero, total = ops.quant_rows(x, None, stored, top, group, split, False, affine, False, shift, sums)
        return q, s, zero if affine and top == 127 else None, total if sums else None

    return quantize


def _integer(plan: LayerPlan, gelu: bool) -> Run:
    """int8 or int4 weights with one scale an output channel."""
    bits, columns, shift = plan.weight.spec.bits, plan.columns, plan.act.shift
    quantize, affine_weight = _quantizer(plan), plan.weight.spec.affine
    needs_sums = bool(shift) or (plan.act.spec.affine and plan.act.spec.max_code == 127)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        in_registers = bits == 4 and x.shape[0] <= REGISTER_ROWS
        q, sx, zx, total = quantize(x, t, SPLIT if in_registers else 0, affine_weight)
        scale, bias = _column_scale(plan, t), t.bias
        zw = t.zero.expand(plan.rows, 1).reshape(-1) if affine_weight else None
        wsum = ops.weight_sums(t.weight, columns, None, bits, 0) if needs_sums else None
        if shift:
            whole = wsum.float() if zw is None else wsum.float() - columns * zw.float()
            offset = (-shift) * whole * scale
            bias = offset if bias is None else bias.float() + offset
        xd, up = _low_rank(x, t)
        rest = (zx, wsum if zx is not None else None, zw, total, bias, xd, up, None, None)
        if in_registers:
            return ops.w4a8_gemm(q, t.weight, sx, scale, *rest, 0, 1, gelu, x.dtype)
        weight = t.weight if bits == 8 else ops.w4_to_s8(t.weight, columns, None, None, 0)
        return ops.w8a8_gemm(q, weight, sx, scale, *rest, 1, gelu, x.dtype)

    return run


def _groups(plan: LayerPlan, gelu: bool) -> Run:
    """int4 weights with a scale a group, activations with one scale a row or the same groups."""
    columns, size, shift = plan.columns, plan.weight.grain.size, plan.act.shift
    quantize = _quantizer(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        q, sx, _, _ = quantize(x, t, size, False)
        bias = t.bias
        if shift:
            offset = (-shift) * ops.weight_sums(t.weight, columns, t.scale, 4, size)
            bias = offset if bias is None else bias.float() + offset
        rest = (None, None, None, None, bias, *_low_rank(x, t), None, None)
        return ops.w4a8_gemm(q, t.weight, sx, t.scale, *rest, size, 1, gelu, x.dtype)

    return run


def _fp8(plan: LayerPlan, gelu: bool) -> Run:
    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        q, sx, _, _ = ops.quant_rows(x, None, None, 448, 0, 0, True, False, False, 0.0, False)
        weight, rest = t.weight.view(ops.E4M3), (None, None, None, None, t.bias, *_low_rank(x, t), None, None)
        return ops.w8a8_gemm(q, weight, sx, _column_scale(plan, t), *rest, 1, gelu, x.dtype)

    return run


def _nvfp4(plan: LayerPlan, gelu: bool) -> Run:
    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        q, sx, gx = ops.nvfp4_quant(x)
        rest = (t.bias, *_low_rank(x, t), None, None)
        return ops.nvfp4_gemm(
            q, t.weight, sx, ops.tile_scales(t.scale), gx, t.scale_global, *rest, 1, gelu, x.dtype
        )  # fmt: skip

    return run


def _decode(plan: LayerPlan) -> Run:
    """Weight-only 4 bits: the weight in the compute dtype for the time of the call."""
    form, size, columns = plan.weight.format.removesuffix("a"), plan.weight.grain.size or 0, plan.columns

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        weight = ops.w4_to_float(t.weight, columns, t.scale, t.zero, t.scale_global, form, size, x.dtype)
        y = F.linear(x, weight, None if t.bias is None else t.bias.to(x.dtype))
        return y if t.down is None else y + dense.low_rank(x, t, plan, None)

    return run
