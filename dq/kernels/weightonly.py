"""Plans with rounded activations, run with the weights decoded and the activations left in floating point, on GPUs.

A card without a unit for an activation format gains nothing by emulating it: rounding costs time and accuracy. Plan
and bytes stay what they are. Smoothing and rotation come before a kernel and are folded into the weights: they hold;
shifts, stored scales, step tables and zero points of activations only say how to round them, so they are not used;
splits still part the weights, and the low-rank branch always saw unrounded activations.

Convolutions are preferred this way on GPUs: as a product of int8 patches they move several times the bytes. Where that
is faster all the same, measurements say so. Emulation is asked for with dq.set_backend("dense") or "reference". A CPU
emulates: dq's own kernels serve most formats there, and studies of formats run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dq.kernels import Conv, Tensors, dense
from dq.plan import LayerPlan

RANK = 85  # before `dense`, which would emulate
CONV_RANK = 40  # before `torchops`, which multiplies patches
STATUS = "experimental"  # no GPU was at hand


def rank(op: str, plan: LayerPlan, device: str) -> int:
    """Behind `dense` where it refuses: nothing is lost there, so nobody is told."""
    if why_not(op, plan, device) is not None:
        return dense.RANK + 1
    return CONV_RANK if op == "conv" else RANK


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when it may run the layer on that device type; else why not, in one line."""
    if plan.act is None:
        return "activations are in floating point by plan"
    if device in ("cpu", "meta"):
        return f"activations are left in floating point on GPUs only, this is {device}"
    return None


def label(op: str, plan: LayerPlan) -> str:
    return f"{dense.label(op, _floating(plan))}, activations in floating point"


def weight_only(op: str, plan: LayerPlan) -> bool:
    """Whether the plan's activations are left in floating point."""
    return True


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring."""
    return dense.build(op, _floating(plan), conv)


def _floating(plan: LayerPlan) -> LayerPlan:
    return replace(plan, act=None, late=(), steps=1)
