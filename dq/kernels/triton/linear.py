"""A linear layer from the kernels: quantize rows, multiply, everything else in the epilogue.

    y = s_x s_w (q w - zero points) + (x down^T) up^T + bias,    shifted inputs: bias' = bias - shift sum_k W[n, k]

Sums of weights, which shifts and zero points need, are taken once for a weight (`stored.sums`). int4 weights are
unpacked in registers for few rows, where the product waits for memory, and to an int8 workspace for many, where one
pass over the weight is a few percent. In groups, where every group would be scaled by itself, those of many rows are
rounded once more, to int8 with one scale a row, unless activations come in groups, too (`stored.rerounded`).
Weight-only products of few rows read the stored weight in the kernel; those of many are torch's.
Under autograd a layer whose input needs gradients runs `dense`, which is differentiable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from dq.errors import DQError
from dq.formats.integer import Integer
from dq.kernels import Tensors, dense, rows
from dq.kernels.triton import ops, stored
from dq.kernels.triton.ops import Blocks, Codes, Epilogue, RowFormat
from dq.kernels.triton.routes import REGISTER_ROWS, rounds_again, route
from dq.plan import LayerPlan, TensorPlan

SPLIT = 128  # columns that `w4a8` reads at a time

Run = Callable[[torch.Tensor, Tensors], torch.Tensor]
Product = Callable[[Codes, Codes, Epilogue], torch.Tensor]


def build(plan: LayerPlan, gelu: bool = False, product: Product | None = None) -> Run:
    """-> run(x (..., K), tensors) -> y (..., N) in x's dtype; with `gelu` its tanh GELU (not weight-only).

    product  of int8 codes in place of `ops.w8a8_gemm`, for a layer of the route "w8"
    """
    kind = route(plan).kind
    makers = {"w8": _integer, "w4": _integer, "two-level": _two_level, "groups": _groups, "fp8": _fp8, "nvfp4": _nvfp4}
    if product is None:
        run = makers[kind](plan, gelu) if kind in makers else _decode(plan)
    else:
        run = _integer(plan, gelu, product)
    differentiable = dense.build("linear", plan, None)
    outputs, inputs = plan.shape

    def choose(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y = differentiable(x, t)
            return F.gelu(y, approximate="tanh") if gelu else y
        return run(x.reshape(-1, inputs), t).reshape(*x.shape[:-1], outputs)

    return choose


def _epilogue(x: torch.Tensor, t: Tensors, bias: torch.Tensor | None, gelu: bool) -> Epilogue:
    """What follows the product of a layer with input x."""
    if t.down is None:
        return Epilogue(x.dtype, bias, None, None, gelu)
    down, up = dense.factors(t, x.dtype) if x.dtype is torch.float16 else (t.down.to(x.dtype), t.up)
    return Epilogue(x.dtype, bias, F.linear(x, down), up, gelu)


def _column_scale(plan: LayerPlan, t: Tensors) -> torch.Tensor:
    """One fp32 weight scale an output channel."""
    return t.scale.reshape(-1) if t.scale.shape[0] == plan.rows else t.scale.reshape(1).expand(plan.rows).contiguous()


def _row_format(plan: LayerPlan, split: int = 0) -> RowFormat:
    """Of integer activations, stored in the order that a kernel wants."""
    spec = plan.act.spec
    return RowFormat(spec.max_code, spec.affine, plan.act.grain.size or 0, split, plan.act.shift, plan.act.clip)


def _stored(t: Tensors) -> torch.Tensor | None:
    """The stored activation scale (1,), None when scales are dynamic."""
    return None if t.act_scale is None else t.act_scale.reshape(-1)[:1]


def _rounded(x: torch.Tensor, form: RowFormat, given: torch.Tensor | None = None, sums: bool = False) -> Codes:
    """Codes of rows by the kernel; while traced in aten where a row is rounded as a whole, so that what comes before
    is fused with it, and one input that several layers round is rounded in one place."""
    whole = not (form.group or form.split or form.shift or sums) and form.clip == 1 and given is None
    whole &= not form.affine or form.top == ops.INT8_TOP
    if not (torch.compiler.is_compiling() and whole):
        return ops.quant_rows(x, form, given=given, sums=sums)
    if form.top == ops.FP8_TOP:
        q, scale = rows.e4m3(x)
    elif form.affine:
        q, scale, zero = rows.affine(x)
        return Codes(q, scale.reshape(-1), zero.reshape(-1).int())
    else:
        q, scale = rows.symmetric(x, form.top)
    return Codes(q, scale.reshape(-1))


def _integer(plan: LayerPlan, gelu: bool, eight: Product | None = None) -> Run:
    """int8 or int4 weights with one scale an output channel."""
    bits, columns, shift = plan.weight.spec.bits, plan.columns, plan.act.shift
    plain, split, affine_weight = _row_format(plan), _row_format(plan, SPLIT), plan.weight.spec.affine
    needs_sums = bool(shift) or (plan.act.spec.affine and plan.act.spec.max_code == ops.INT8_TOP)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        in_registers = bits == 4 and x.shape[0] <= REGISTER_ROWS
        codes = _rounded(x, split if in_registers else plain, _stored(t), affine_weight)
        scale, bias = _column_scale(plan, t), t.bias
        zero = t.zero.expand(plan.rows, 1).reshape(-1) if affine_weight else None
        sums = stored.sums(t.weight, k=columns, bits=bits) if needs_sums else None
        if shift:
            whole = sums.float() if zero is None else sums.float() - columns * zero.float()
            offset = (-shift) * whole * scale
            bias = offset if bias is None else bias.float() + offset
        in_workspace = bits == 4 and not in_registers
        weight = ops.w4_to_s8(t.weight, k=columns) if in_workspace else t.weight
        product = ops.w4a8_gemm if in_registers else eight or ops.w8a8_gemm
        epilogue = _epilogue(x, t, bias, gelu)
        return product(codes, Codes(weight, scale, zero, sums if codes.zero is not None else None), epilogue)

    return run


def _two_level(plan: LayerPlan, gelu: bool) -> Run:
    """int4 weights under two-level scales: int8 weights with one scale an output channel, in a workspace."""
    codes = replace(plan, weight=TensorPlan("int8", "channel"))
    run, columns, size = _integer(codes, gelu), plan.columns, plan.weight.grain.size

    def unpacked(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        weight = ops.w4_to_s8(t.weight, k=columns, times=t.scale, group=size)
        return run(x, t._replace(weight=weight, scale=t.scale_global, scale_global=None))

    return unpacked


def _groups(plan: LayerPlan, gelu: bool) -> Run:
    """int4 weights with a scale a group, activations with one scale a row or the same groups."""
    columns, size, shift = plan.columns, plan.weight.grain.size, plan.act.shift
    rows, rerounds = _row_format(plan, size), rounds_again(plan)
    many = _integer(replace(plan, weight=TensorPlan("int8", "channel")), gelu)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if rerounds and x.shape[0] > REGISTER_ROWS:
            return many(x, rounded_again(plan, t))
        codes, bias = ops.quant_rows(x, rows, given=_stored(t)), t.bias
        if shift:
            offset = (-shift) * stored.sums(t.weight, k=columns, bits=4, scale=t.scale, group=size)
            bias = offset if bias is None else bias.float() + offset
        return ops.w4a8_groups_gemm(codes, Codes(t.weight, t.scale), size, _epilogue(x, t, bias, gelu))

    return run


def rounded_again(plan: LayerPlan, t: Tensors) -> Tensors:
    """The tensors of the same layer with int8 weights, one scale a row."""
    codes = stored.rerounded(t.weight, t.scale, plan.columns, plan.weight.grain.size)
    return t._replace(weight=codes.q, scale=codes.scale[:, None])


def exact_sums() -> bool:
    """Whether DQ_FP8_SUMS asks for fp32 sums of fp8 products on Hopper, whose units keep 14 bits."""
    wanted = os.environ.get("DQ_FP8_SUMS", "fast")
    if wanted not in ("fast", "exact"):
        raise DQError(f"DQ_FP8_SUMS: got {wanted!r}, expected 'fast' or 'exact'")
    return wanted == "exact"


def _fp8(plan: LayerPlan, gelu: bool) -> Run:
    form, exact = RowFormat(top=ops.FP8_TOP), exact_sums()

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        weight = Codes(t.weight.view(ops.E4M3), _column_scale(plan, t))
        return ops.w8a8_gemm(_rounded(x, form), weight, _epilogue(x, t, t.bias, gelu), exact)

    return run


def _nvfp4(plan: LayerPlan, gelu: bool) -> Run:
    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        weight = Blocks(t.weight, ops.tile_scales(t.scale), t.scale_global)
        return ops.nvfp4_gemm(ops.nvfp4_quant(x), weight, _epilogue(x, t, t.bias, gelu))

    return run


def _decode(plan: LayerPlan) -> Run:
    """Weight-only: few rows in one kernel; for more, 4 bits in the compute dtype for the time of the call."""
    few, many = _few_rows(plan), _dense(plan) if plan.weight.spec.bits == 8 else _unpacked(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        return few(x, t) if few and x.shape[0] <= stored.FEW else many(x, t)

    return run


def _dense(plan: LayerPlan) -> Run:
    return dense.build("linear", plan, None)


def _few_rows(plan: LayerPlan) -> Run | None:
    """Of at most `stored.FEW` rows; None for formats that it does not read."""
    if not isinstance(plan.weight.spec, Integer):
        return None
    spec, grain = plan.weight.spec, plan.weight.grain
    affine = spec.affine

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if grain.two_level:
            t = t._replace(scale=spec.step(t.scale, t.scale_global), scale_global=None)
        scale = t.scale.reshape(-1, t.scale.shape[-1]).expand(plan.rows, -1)
        zero = t.zero.expand(plan.rows, -1) if affine else None
        y = stored.few_rows(x, t.weight, scale, zero=zero, bias=t.bias, bits=spec.bits, group=grain.size or 0)
        return y if t.down is None else y + dense.low_rank(x, t, plan, None)

    return run


def _unpacked(plan: LayerPlan) -> Run:
    form, size, columns = plan.weight.format.removesuffix("a"), plan.weight.grain.size or 0, plan.columns
    spec, two_level = plan.weight.spec, plan.weight.grain.two_level

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if two_level:
            t = t._replace(scale=spec.step(t.scale, t.scale_global), scale_global=None)
        weight = ops.w4_to_float(t, columns, form, size, x.dtype)
        y = F.linear(x, weight, None if t.bias is None else t.bias.to(x.dtype))
        return y if t.down is None else y + dense.low_rank(x, t, plan, None)

    return run
