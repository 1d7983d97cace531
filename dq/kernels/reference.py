"""The truth: every op in every format, decoded to fp32 and computed by plain torch. Slow, differentiable, everywhere.

    y = Q(x * smooth) W^T + (x * smooth) down^T up^T + bias        x (tokens, in), W (out, in)

Activations are quantized and decoded again (straight-through gradient), weights are decoded to fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from dq.formats.base import Encoded, Granularity, Scales
from dq.kernels import Conv, Tensors
from dq.plan import LayerPlan, TensorPlan

RANK = 1000
STATUS = "stable"
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PER_ROW = Granularity("token")


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    return None


def label(op: str, plan: LayerPlan) -> str:
    return f"reference {plan.weight.format} decoded to fp32" + (f", {plan.act.format} emulated" if plan.act else "")


def scale_columns(plan: LayerPlan) -> list[tuple[int, int]]:
    """Column ranges [start, stop) of the scale matrix that belong to each part of the weight."""
    grain, ranges, start = plan.weight.grain, [], 0
    for first, last in plan.parts:
        count = -(-(last - first) // grain.size) if grain.kind == "group" else 1
        ranges.append((start, start + count))
        start += count
    return ranges


def out_sizes(space: Sequence[int], kernel: Sequence[int], conv: Sequence) -> list[int]:
    """Sizes of a convolution's output. conv: stride, padding and dilation, and what may follow them."""
    sizes = zip(space, kernel, *conv[:3], strict=True)
    return [(size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, taps, step, pad, gap in sizes]


def encode(weight: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales] | None = None) -> dict[str, torch.Tensor]:
    """Round a float matrix (rows, columns) to the packed tensors `weight`, `scale` and what else the format has.

    scales  of each part of the plan; without them they are fitted to the weight's range
    """
    spec, grain = plan.weight.spec, plan.weight.grain
    given = scales or [()] * len(plan.parts)
    pairs = zip(plan.parts, given, strict=True)
    parts = [spec.encode(weight[:, first:last], grain, *scale) for (first, last), scale in pairs]
    out = {"weight": spec.pack(torch.cat([part.codes for part in parts], 1).contiguous())}
    for name, dim in (("scale", 1), ("zero", 1), ("scale_global", 1 if grain.two_level else 0), ("table", 1)):
        if getattr(parts[0], name) is not None:
            out[name] = torch.cat([getattr(part, name) for part in parts], dim).contiguous()
    return out


def weight_decoder(plan: LayerPlan) -> Callable[[Tensors], torch.Tensor]:
    """-> decode(tensors) -> fp32 (rows, columns)."""
    spec, grain, columns = plan.weight.spec, plan.weight.grain, plan.columns
    ranges, table = list(zip(plan.parts, scale_columns(plan), strict=True)), tables(plan)
    span = spec.span

    def decode(t: Tensors) -> torch.Tensor:
        codes = spec.unpack(t.weight, columns)
        parts = []
        for i, ((first, last), (left, right)) in enumerate(ranges):
            zero = t.zero[:, left:right] if t.zero is not None else None
            whole = t.scale_global
            if whole is not None:
                whole = whole[:, i : i + 1] if grain.two_level else whole[i : i + 1]
            encoded = Encoded(codes[:, first // span : last // span], t.scale[:, left:right], zero, whole, table(t, i))
            parts.append(spec.decode(encoded, grain))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return decode


def tables(plan: LayerPlan) -> Callable[[Tensors, int], torch.Tensor | None]:
    """-> table(tensors, part) -> int8 (rows | 1, table_width), None for formats without tables."""
    count = plan.weight.spec.table_width
    return lambda t, part: None if t.table is None else t.table[:, part * count : (part + 1) * count]


def row_codes(plan: LayerPlan) -> Callable[[Tensors], torch.Tensor]:
    """-> codes(tensors) -> int8 (rows, columns) of symmetric integers, for products with one scale a row and part.

    Codes under two-level scales come times their multipliers, those of tables as the table's values. `row_scale` gives
    the scales.
    """
    spec, grain, columns = plan.weight.spec, plan.weight.grain, plan.columns
    size = grain.size or columns
    if spec.tabled:
        table = tables(plan)

        def looked_up(t: Tensors) -> torch.Tensor:
            found, bounds = spec.unpack(t.weight, columns), enumerate(plan.parts)
            cuts = ((i, found[:, first // spec.span : last // spec.span]) for i, (first, last) in bounds)
            parts = [spec.of(table(t, i)).values_of(part) for i, part in cuts]
            return torch.cat(parts, 1).to(torch.int8)

        return looked_up
    if not grain.two_level:
        return lambda t: spec.unpack(t.weight, columns)
    ranges = list(zip(plan.parts, scale_columns(plan), strict=True))

    def codes(t: Tensors) -> torch.Tensor:
        times = [
            t.scale[:, left:right].repeat_interleave(size, 1)[:, : last - first]
            for (first, last), (left, right) in ranges
        ]
        return spec.unpack(t.weight, columns) * (times[0] if len(times) == 1 else torch.cat(times, 1))

    return codes


def row_scale(plan: LayerPlan) -> Callable[[Tensors], torch.Tensor]:
    """-> scale(tensors) -> fp32 (rows | 1, parts), of what `row_codes` gives."""
    two_level = plan.weight.grain.two_level
    return lambda t: t.scale_global if two_level else t.scale  # pyright: ignore[reportReturnType]


def input_rounder(plan: LayerPlan, dim: int) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """-> round(x, act_scale): quantize and decode x, split along `dim` (1 for convolutions, -1 for linears).

    Dynamic scales of a convolution: granularity `tensor` is one per sample and part, so that no scale crosses batch
    entries; `token` is one per pixel and part.
    """
    act = plan.act
    spec, act_grain = (None, None) if act is None else (act.spec, act.grain)  # looked up here: torch.compile cannot
    edges = [0, *plan.splits, plan.shape[1]]

    def one(x: torch.Tensor, act: TensorPlan, scale: torch.Tensor | None) -> torch.Tensor:
        per_sample = dim == 1 and act.granularity == "tensor"
        rows = x.reshape(x.shape[0], -1) if per_sample else x.movedim(dim, -1).reshape(-1, x.shape[dim])
        grain = PER_ROW if per_sample else act_grain
        if scale is not None:
            scale, grain = scale.reshape(1, 1), Granularity("tensor")
        shifted, whole, zero = rows + act.shift, None, None
        if act.clip != 1:
            covered = act.spec.fit(shifted.detach().float() * act.clip, grain)
            scale, zero = covered.scale, covered.zero
        if spec.global_bytes:  # one tensor-wide scale per row, so that no row depends on another
            whole = spec.fit_global(shifted.detach(), per_row=True)
        rounded = spec.fake(shifted, grain, scale=scale, zero=zero, scale_global=whole) - act.shift
        return rounded.reshape(x.shape) if per_sample else rounded.reshape(x.movedim(dim, -1).shape).movedim(-1, dim)

    def rounded(x: torch.Tensor, act_scale: torch.Tensor | None) -> torch.Tensor:
        if act is None:
            return x
        parts = [x.narrow(dim, a, b - a) for a, b in pairwise(edges)] if plan.splits else [x]
        scales = [None] * len(parts) if act_scale is None else list(act_scale.unbind(0))
        parts = [one(part, act, scale) for part, scale in zip(parts, scales, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    return rounded


def emulated(op: str, plan: LayerPlan) -> bool:
    """Whether the plan's activations are rounded and then multiplied in floating point."""
    return plan.act is not None


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring."""
    decode = weight_decoder(plan)
    rounded = input_rounder(plan, -1 if op == "linear" else 1)
    shape = plan.shape

    def linear(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        wide = x.float()
        y = F.linear(rounded(wide, t.act_scale), decode(t), None if t.bias is None else t.bias.float())
        if t.down is not None:
            y = y + F.linear(F.linear(wide, t.down.float()), t.up.float())
        return y.to(x.dtype)

    def convolve(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        wide, run = x.float(), CONVS[len(shape) - 2]
        bias = None if t.bias is None else t.bias.float()
        y = run(rounded(wide, t.act_scale), decode(t).reshape(shape), bias, *conv)
        if t.down is not None:
            low = run(wide, t.down.float().reshape(-1, *shape[1:]), None, *conv[:3])
            y = y + run(low, t.up.float().reshape(*t.up.shape, *[1] * (len(shape) - 2)))
        return y.to(x.dtype)

    return linear if op == "linear" else convolve


def rerounded(plan: LayerPlan, t: Tensors) -> tuple[LayerPlan, Tensors]:
    """A layer of int4 weights in groups with int8 weights of one scale S a row, rounded once more.

    |difference| <= S / 2 for every weight, S = 8 / 127 of the row's largest group scale: at most 0.032 of that scale,
    where rounding to int4 had cost up to half of it.
    """
    size = plan.weight.grain.size or plan.columns
    row = (t.scale.amax(1, keepdim=True) * (8 / 127)).clamp(min=torch.finfo(torch.float32).tiny)
    times = (t.scale / row).repeat_interleave(size, 1)[:, : plan.columns]
    codes = (plan.weight.spec.unpack(t.weight, plan.columns) * times).round().to(torch.int8)
    return replace(plan, weight=TensorPlan("int8", "channel")), t._replace(weight=codes, scale=row)
