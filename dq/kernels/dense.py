"""Decode to the compute dtype, then torch's own matmul or convolution: every format, on every device, no integer unit.

Serves weight-only layers, whose activations are floating point, and activations whose format has no kernel here; those
are rounded exactly as an integer kernel would and the label says `emulated`.

fp16 ends at 65504, so there every product has the size of the layer's output or input: weights are scaled before the
sum, and factors of a branch balanced. bf16 and fp32 have the range to do it afterwards, which saves time.
A processor without bf16 units multiplies bf16 five times slower than fp32: there bf16 goes in and out, and the product
is fp32's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dq import kernels
from dq.kernels import Conv, Tensors
from dq.kernels.reference import CONVS, input_rounder, weight_decoder
from dq.plan import LayerPlan

RANK = 90
STATUS = "stable"
HAS_BF16 = kernels.bf16()  # here, because the question cannot be traced


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    return None


def label(op: str, plan: LayerPlan) -> str:
    name = "F.linear" if op == "linear" else f"F.conv{len(plan.shape) - 2}d"
    return f"decode {plan.weight.format} + {name}" + (f", {plan.act.format} emulated" if plan.act else "")


def factors(t: Tensors, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """down (rank, columns) and up (out, rank) in a dtype; in fp16 so that no entry of down x is larger than one of x.

    By |down_r x| <= |down_r| sqrt(columns) max|x|; powers of two go from one factor to the other, rounding nothing.
    """
    if dtype is not torch.float16:
        return t.down.to(dtype), t.up.to(dtype)  # pyright: ignore[reportOptionalMemberAccess]
    range_, down, up = torch.finfo(dtype), t.down.float(), t.up.float()  # pyright: ignore[reportOptionalMemberAccess]
    wanted = down.norm(dim=1).clamp(min=range_.tiny).log2() + 0.5 * math.log2(down.shape[1])
    room = (range_.max / up.abs().amax(0).clamp(min=range_.tiny)).log2().floor()
    power = torch.exp2(torch.minimum(wanted.ceil(), room).clamp(min=0))
    return (down / power[:, None]).to(dtype), (up * power).to(dtype)


def scaled(t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """int8 codes (rows, columns) times a scale a row, in one pass: 1 byte read and a number of `dtype` written each.

    A product of bf16 codes scaled afterwards, then with its bias, would read and write the output twice more.
    """
    out = torch.empty(t.weight.shape, dtype=dtype, device=t.weight.device)
    return torch.mul(t.weight, t.scale, out=out)


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """The decoded weight of a convolution, channels last on GPUs: there their matrix units read it so."""
    if weight.device.type == "cpu" or weight.dim() == 3:
        return weight
    return weight.contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)


def computed(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that its device multiplies fastest without losing digits: fp32 for bf16 without units."""
    return x.float() if x.dtype is torch.bfloat16 and x.device.type == "cpu" and not HAS_BF16 else x


def low_rank(x: torch.Tensor, t: Tensors, plan: LayerPlan, conv: Conv | None) -> torch.Tensor:
    """The low-rank branch up(down(x)) of a linear or convolution, in the dtype of x."""
    return _low_rank(computed(x), t, plan, conv).to(x.dtype)


def _low_rank(x: torch.Tensor, t: Tensors, plan: LayerPlan, conv: Conv | None) -> torch.Tensor:
    down, up = factors(t, x.dtype)
    if conv is None:
        return F.linear(F.linear(x, down), up)
    space = len(plan.shape) - 2
    low = CONVS[space](x, down.reshape(-1, *plan.shape[1:]), None, *conv[:3])
    return CONVS[space](low, up.reshape(*up.shape, *[1] * space))


def emulated(op: str, plan: LayerPlan) -> bool:
    """Whether the plan's activations are rounded and then multiplied in floating point."""
    return plan.act is not None


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring."""
    decode, rounded = weight_decoder(plan), input_rounder(plan, -1 if op == "linear" else 1)
    one_scale_a_row = plan.weight.format == "int8" and plan.weight.granularity == "channel" and not plan.splits

    def matmul(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        bias = None if t.bias is None else t.bias.to(x.dtype)
        if one_scale_a_row and x.device.type != "cpu":
            return F.linear(x, scaled(t, x.dtype), bias)
        if one_scale_a_row and x.dtype is not torch.float16:  # int8 codes are exact in bf16: saves a pass over them
            y = F.linear(x, t.weight.to(x.dtype)) * t.scale.reshape(-1).to(x.dtype)
            return y if bias is None else y + bias
        return F.linear(x, decode(t).to(x.dtype), bias)

    def linear(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        wide = computed(x)
        y = matmul(rounded(wide, t.act_scale), t)
        return (y if t.down is None else y + _low_rank(wide, t, plan, None)).to(x.dtype)

    def convolve(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        wide = computed(x)
        weight = laid_out(decode(t).reshape(plan.shape).to(wide.dtype))
        bias = None if t.bias is None else t.bias.to(wide.dtype)
        run: Any = CONVS[len(plan.shape) - 2]
        y = run(rounded(wide, t.act_scale), weight, bias, *(conv or ()))
        return (y if t.down is None else y + _low_rank(wide, t, plan, conv)).to(x.dtype)

    return linear if op == "linear" else convolve
