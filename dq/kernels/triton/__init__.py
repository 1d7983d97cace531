"""Triton kernels for GPUs: int8, fp8, 4-bit and nvfp4 linears.

Importing this package imports neither triton nor any kernel: that happens when a layer asks for a kernel on a CUDA
device. A CPU says no, unless TRITON_INTERPRET=1 asks for Triton's interpreter (tests; a thousand times slower).

    elements  rounding and minifloats      quantize  activations -> codes     gemm    8-bit products, their epilogue
    packed    4-bit weights                nvfp4     block-scaled products    ops     torch.library operators
    configs   tile sizes per architecture  routes    which layers             linear  a layer from its kernels
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from dq import kernels
from dq.kernels import Conv, Tensors
from dq.kernels.triton.routes import Route, route
from dq.plan import LayerPlan

RANK = 30
STATUS = "experimental"  # no GPU was at hand
OLDEST = (3, 6)  # of triton
# gfx942 has an fp8 of its own, and gfx950 block scales that are powers of two
WITHOUT = {
    "fp8": ("sm_80", "sm_86", "sm_87", "gfx942"),
    "nvfp4": ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "gfx942", "gfx950"),
}


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
def _missing_triton() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    return None if numbers >= OLDEST else f"triton {found} is older than {'.'.join(map(str, OLDEST))}"


def _missing_unit(found: Route, device: str) -> str | None:
    """Whether the GPU has the matrix unit of a route; the interpreter has them all."""
    if device == "cpu":
        return None
    from dq.kernels.triton import configs

    arch = kernels.architecture()
    if configs.architecture() not in configs.ARCHITECTURES:
        return f"no Triton tile sizes for {arch}, only for {', '.join(configs.ARCHITECTURES)}"
    return f"{arch} has no {found.unit} matrix unit" if arch in WITHOUT.get(found.unit, ()) else None


def label(op: str, plan: LayerPlan) -> str:
    return route(plan).label


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See `dq.kernels`."""
    from dq.kernels.triton import linear

    return linear.build(plan)


def build_gelu(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor] | None:
    """See `dq.kernels`: GELU in the epilogue, None for weight-only layers, whose product is torch's."""
    from dq.kernels.triton import linear

    return None if plan.act is None else linear.build(plan, gelu=True)
