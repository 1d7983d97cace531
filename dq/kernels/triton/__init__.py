"""Triton kernels for GPUs: int8, fp8, 4-bit and nvfp4 linears.

Importing this package imports neither triton nor any kernel: that happens when a layer asks for a kernel on a CUDA
device. A CPU says no, unless TRITON_INTERPRET=1 asks for Triton's interpreter (tests; a thousand times slower).

    elements  rounding and minifloats      quantize  activations -> codes     gemm    8-bit products, their epilogue
    packed    4-bit weights                nvfp4     block-scaled products    ops     torch.library operators
    configs   tile sizes per architecture  routes    which layers             linear  a layer from its kernels
    chips     matrix units, and which release of Triton reaches them
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from dq import kernels
from dq.kernels import Conv, Tensors
from dq.kernels.triton import chips
from dq.kernels.triton.routes import REGISTER_ROWS, Route, rounds_again, route
from dq.plan import LayerPlan

RANK = 30
STATUS = "experimental"  # no GPU was at hand


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when a kernel here runs the layer on `device`; else why not, in one line."""
    missing = _missing_device(device) or (_missing_triton() if kernels.machine() is None else None)
    if missing:
        return missing
    if op != "linear":
        return "no Triton convolution: torch multiplies its patches"
    found = route(plan)
    return found if isinstance(found, str) else _missing_unit(found, device)


def _missing_device(device: str) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device != "cuda":
        return f"Triton kernels run on GPUs, this is {device}"
    return None if kernels.architecture() else "no CUDA device is visible"


@cache
def version() -> str | None:
    """Of the module: wheels of several names bring it (triton-rocm, triton-windows). None without one.

    Raises whatever a broken one raises.
    """
    if find_spec("triton") is None:
        return None
    import triton

    return getattr(triton, "__version__", None)  # a folder of that name has none


@cache
def _missing_triton() -> str | None:
    try:
        found = version()
    except Exception as error:  # a build for another Python or driver: dq does without
        return f"triton does not load: {' '.join(str(error).split())[:120]}"
    return "triton is not installed" if found is None else chips.too_old(found)


def _missing_unit(found: Route, device: str) -> str | None:
    """Whether the GPU has the matrix unit of a route and this Triton reaches it; the interpreter has them all."""
    if device == "cpu":
        return None
    from dq.kernels.triton import configs

    arch = kernels.architecture()
    if configs.nearest(arch) not in configs.ARCHITECTURES:
        return f"no Triton tile sizes for {arch}, only for {', '.join(configs.ARCHITECTURES)}"
    release = chips.release(version() or "") if kernels.machine() is None else None
    return chips.missing(found.unit, arch, release)


def label(op: str, plan: LayerPlan) -> str:
    return route(plan).label


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See `dq.kernels`."""
    from dq.kernels.triton import linear

    return linear.build(plan)


def rerounded(op: str, plan: LayerPlan) -> int | None:
    """See `dq.kernels`."""
    return REGISTER_ROWS + 1 if op == "linear" and rounds_again(plan) else None


def build_gelu(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor] | None:
    """See `dq.kernels`: GELU in the epilogue, None for weight-only layers, whose product is torch's."""
    from dq.kernels.triton import linear

    return None if plan.act is None else linear.build(plan, gelu=True)
