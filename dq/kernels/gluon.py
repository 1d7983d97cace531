"""The int8 product of Hopper whose sums stay in flight (`triton.flight`), a candidate beside Triton's own.

It never ran on a card. By rank it is never chosen; where kernels are chosen by measurement it proves itself first, and
serves a layer only if it was more than 5 % faster there. Layers with an int8 weight, one scale a row, no branch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dq import kernels
from dq.kernels import Conv, Tensors, triton
from dq.kernels.triton import chips
from dq.kernels.triton.routes import route
from dq.plan import LayerPlan

RANK = 35
STATUS = "experimental"  # no GPU was at hand
ARCHITECTURE = "sm_90"
RELEASES = ((3, 6), (3, 9))  # of Triton, first and last whose Gluon compiles it; its names change without notice


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """See `dq.kernels`."""
    if device != "cuda":
        return f"Gluon kernels run on GPUs, this is {device}"
    if kernels.architecture() != ARCHITECTURE:
        return f"the Gluon product is of {ARCHITECTURE}, this is {kernels.architecture() or 'no GPU'}"
    reason = triton.why_not(op, plan, device, conv)
    if reason:
        return reason
    found = route(plan)
    if plan.act is None or isinstance(found, str) or found.kind != "w8":
        return f"the Gluon product takes int8 weights and activations, got {plan.weight} x {plan.act}"
    if plan.rank or plan.columns % 16:
        return "the Gluon product takes inputs in multiples of 16 and no low-rank branch"
    return _other_release() if kernels.machine() is None else None


def _other_release() -> str | None:
    found, (first, last) = chips.release(triton.version() or ""), RELEASES
    if first <= found <= last:
        return None
    return f"Gluon of triton {chips.dotted(found)} was not tried, {chips.dotted(first)} to {chips.dotted(last)} were"


def label(op: str, plan: LayerPlan) -> str:
    return f"Gluon gemm {plan.weight.format} x int8"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See `dq.kernels`."""
    from dq.kernels.triton import flight, linear

    return linear.build(plan, product=flight.flight_gemm)


def build_gelu(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor] | None:
    """See `dq.kernels`."""
    from dq.kernels.triton import flight, linear

    return linear.build(plan, gelu=True, product=flight.flight_gemm)
