"""A backend proves itself before it serves: one small problem in a layer's own formats, beside `reference`.

    |ours - truth| <= 2 |torch - truth| + eps |truth|        norms over each row and each column of the output

truth is `reference` in fp32, torch its own product of the rounded operands in the dtype of x. Sizes leave a tail in
every tile and have the remainders of the layer's own, on which backends decide what they take. The input is rounded
before, so that rounding it again gives the same codes whatever order a kernel computes the scale in. A backend that
rounds weights once more for many rows is held to `reference` of those weights there: what that costs is not a fault of
a kernel but arithmetic, at most half a step of 127 in a row's largest weight.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from dq import kernels
from dq.formats.base import Granularity
from dq.kernels import Conv, Tensors, dense, reference
from dq.plan import LayerPlan

ROWS = (5, 37)  # of the inputs of a linear; kernels for few rows are others
SIDES = (7, 9, 5)  # of the images of a convolution, at least
OUTPUTS = 64  # and at most 16 more
UNIT = 32  # columns of a part are twice this or the group's size, and at most as many more
MOST_RANK = 32
LEAST = 1e-5  # of the norm, in fp32
MOST_LETTERS = 160
# what surrounds a kernel is not its own
ALONE: dict = {"smooth": False, "rotate": 0, "permute": False, "start": False, "steps": 1}


def why_wrong(name: str, op: str, plan: LayerPlan, conv: Conv | None, x: torch.Tensor) -> str | None:
    """Why a backend must not run layers of these formats; None if it is right. x: an empty tensor like the inputs."""
    small, geometry = miniature(plan, conv)
    if kernels.backends()[name].why_not(op, small, x.device.type, geometry) is not None:  # then one of its own size
        small, geometry = replace(plan, **ALONE), conv
    many = getattr(kernels.backends()[name], "rerounded", lambda op, plan: None)(op, small)
    for rows in (*(ROWS if op == "linear" else ROWS[:1]), *([many] if many else [])):
        given, t = _problem(op, small, geometry, x, rows)
        judged = reference.rerounded(small, t) if rows == many else (small, t)
        truth, theirs = _truth_and_torch(op, judged[0], geometry, given, judged[1])
        try:
            ours = kernels.backends()[name].build(op, small, geometry)(given, t)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a kernel or its compiler raises
            return failed(error)
        if (reason := _why_off(ours, truth, theirs, given.dtype)) is not None:
            return f"wrong on a small problem: {reason}"
    return None


def failed(error: Exception) -> str:
    """The reason that an exception is, in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"failed when it was tried: {type(error).__name__}: {text}"[:MOST_LETTERS]


def miniature(plan: LayerPlan, conv: Conv | None) -> tuple[LayerPlan, Conv | None]:
    """A small layer of the same formats: remainders of its sizes, number of parts and geometry are the layer's."""
    rows, rank = OUTPUTS + (plan.rows % 16 or 16), min(plan.rank, MOST_RANK - plan.rank % 2)
    if conv is not None and conv.groups > 1:
        conv = conv._replace(groups=min(conv.groups, 4))
        rows = conv.groups * (OUTPUTS // 4 + 1)
    sizes = [each.grain.size or 1 for each in (plan.weight, plan.act) if each and each.grain.kind == "group"]
    unit = math.lcm(*sizes) if sizes and plan.kind == "linear" else UNIT
    edges = [0, *plan.splits, plan.shape[1]]
    widths = [min(b - a, 2 * unit + (b - a) % unit) for a, b in pairwise(edges)]
    splits = tuple(sum(widths[: i + 1]) for i in range(len(widths) - 1))
    shape = (rows, sum(widths), *plan.shape[2:])
    return replace(plan, shape=shape, splits=splits, rank=rank, **ALONE), conv


def _problem(op: str, plan: LayerPlan, conv: Conv | None, like: torch.Tensor, rows: int):
    """-> x, tensors: bias and branch as large as the product, so that neither can be left out unseen."""
    dice = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice)

    packed = reference.encode(normal(plan.rows, plan.columns) * (0.5 + torch.rand(plan.rows, 1, generator=dice)), plan)
    down = up = act_scale = None
    if plan.rank:
        down, up = normal(plan.rank, plan.columns), normal(plan.rows, plan.rank) / math.sqrt(plan.rank)
    if conv is None:
        x = normal(rows, plan.shape[1])
    else:
        space = [
            max(side, gap * (taps - 1) + 1)
            for side, gap, taps in zip(SIDES, conv.dilation, plan.shape[2:], strict=False)
        ]
        x = normal(2, plan.shape[1] * conv.groups, *space)
    if plan.act is not None and plan.act.scale != "dynamic":
        act_scale = plan.act.spec.fit(x.reshape(1, -1), Granularity("tensor")).scale.reshape(1).repeat(len(plan.parts))
    bias = normal(plan.rows) * math.sqrt(plan.columns)
    floats = {"bias": bias, "down": down, "up": up}
    given: dict = packed | {key: value.to(like.dtype) for key, value in floats.items() if value is not None}
    given |= {} if act_scale is None else {"act_scale": act_scale}
    t = Tensors(**{key: value.to(like.device) for key, value in given.items()})
    x = reference.input_rounder(plan, -1 if op == "linear" else 1)(x.to(like.device), t.act_scale)
    return x.to(like.dtype), t


def _truth_and_torch(op: str, plan: LayerPlan, conv: Conv | None, x: torch.Tensor, t: Tensors):
    """-> the fp32 reference, and torch with the same rounded operands in the dtype of x; both fp32."""
    truth = reference.build(op, plan, conv)(x.float(), t).float()
    rounded = reference.input_rounder(plan, -1 if op == "linear" else 1)(x.float(), t.act_scale).to(x.dtype)
    weight = reference.weight_decoder(plan)(t).reshape(plan.shape).to(x.dtype)
    run: Any = F.linear if op == "linear" else reference.CONVS[len(plan.shape) - 2]
    y = run(rounded, weight, t.bias, *(conv or ()))
    return truth, (y if t.down is None else y + dense.low_rank(x, t, plan, conv)).float()


def _why_off(ours: torch.Tensor, truth: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The rule of the module docstring; rows and columns much smaller than the others are measured by those."""
    if ours.shape != truth.shape or ours.dtype != dtype:
        return f"got {tuple(ours.shape)} in {ours.dtype}, expected {tuple(truth.shape)} in {dtype}"
    ours, truth, theirs = (
        y.movedim(1, -1).reshape(-1, y.shape[1]) if y.dim() > 2 else y for y in (ours, truth, theirs)
    )
    for dim in (0, 1):
        size = truth.norm(dim=dim)
        size = size.clamp(min=0.1 * float(size.square().mean().sqrt()))
        off, usual = ((y.float() - truth).norm(dim=dim) / size for y in (ours, theirs))
        room = 2 * float(usual.max()) + max(torch.finfo(dtype).eps, LEAST)
        if not bool((off <= room).all()):  # NaN is off, too
            return f"off by {float(off.max()):.2g} of its size where torch's own rounding is {float(usual.max()):.2g}"
    return None
