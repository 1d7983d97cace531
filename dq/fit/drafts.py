"""The layers while they are fitted: float weights rounded in every forward, differentiable in all their tensors.

    y = Q(W) Q(z) + up (down z) + bias,    z = (x * smooth) R

W is already divided by `smooth`, rotated, permuted, and has the low-rank branch taken out. Shapes as in `layers.py`; a
draft and the layer it packs into give the same output, up to the compute dtype's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq.formats.base import Scales
from dq.kernels import Conv, Tensors, dense, reference
from dq.layers import PACKED, encode, geometry, hadamard, inherit, per_channel
from dq.plan import LayerPlan


class DraftLinear(nn.Module):
    """A linear being fitted: x (..., in) -> (..., out).

    weight (out, in), bias (out,), smooth (in,), proj_down (rank, in), proj_up (out, rank), act_scale (steps, parts):
    fp32 Parameters, None where the plan lacks it. Starts with the given smooth (else 1), branch 0, act_scale 1
    and the layer's own weight. scales: weight scales of each part, None to follow the weight's range.
    permute (in,): the order that the input's channels are put in, None for their own.
    start_in (in,): the first token whose output is stored, None to store none; it counts only in the packed layer.
    soft: gives the weight (as `rounded_weight` does) while its rounding is being learned; None otherwise.
    tried: how many candidates were weighed up for this layer, for the report.
    """

    op = "linear"
    clock: Any  # a Clock

    def __init__(
        self,
        module: Any,
        plan: LayerPlan,
        smooth: torch.Tensor | None = None,
        permute: torch.Tensor | None = None,
    ):
        super().__init__()
        self.plan, self.permute = plan, permute if plan.permute else None
        inherit.hooks(self, module)
        self.source = [module]
        self.clock = None  # a list hides the source from named_modules
        self.smooth = self._new(torch.ones, plan.shape[1]) if plan.smooth else None
        if smooth is not None:
            self.smooth.data.copy_(smooth)
        self.weight = nn.Parameter(self.unrounded().clone())
        self.scales: list[Scales] | None = None
        self.start_in: torch.Tensor | None = None
        self.soft: Callable[[], torch.Tensor] | None = None
        self.tried = 0
        self.bias = None if module.bias is None else nn.Parameter(module.bias.detach().float().clone())
        self.proj_down = self._new(torch.zeros, plan.rank, plan.columns) if plan.rank else None
        self.proj_up = self._new(torch.zeros, plan.rows, plan.rank) if plan.rank else None
        stored = plan.act is not None and plan.act.scale != "dynamic"
        self.act_scale = self._new(torch.ones, plan.steps, len(plan.parts)) if stored else None
        self._round = input_rounder(plan)

    def _new(self, fill, *shape: int) -> nn.Parameter:
        return nn.Parameter(fill(shape, device=self.source[0].weight.device))

    def unrounded(self) -> torch.Tensor:
        """The layer's own weight as it meets the transformed input: fp32, full shape, divided by smooth, rotated."""
        weight = self.source[0].weight.detach().float()
        if self.smooth is not None:
            weight = weight / self.smooth.detach().reshape(1, -1, *[1] * (weight.dim() - 2))
        weight = hadamard.rotate(weight, self.plan.rotate, 1) if self.plan.rotate else weight
        return weight if self.permute is None else weight[:, self.permute]

    def rounded_weight(self) -> torch.Tensor:
        """The weight as the packed layer will hold it: fp32, full shape, straight-through gradient."""
        if self.soft is not None:
            return self.soft()
        spec, grain = self.plan.weight.spec, self.plan.weight.grain
        rows = self.weight.reshape(self.plan.rows, -1)
        given = self.scales or [()] * len(self.plan.parts)
        pairs = zip(self.plan.parts, given, strict=True)
        parts = [spec.fake(rows[:, first:last], grain, *scale) for (first, last), scale in pairs]
        return torch.cat(parts, 1).reshape(self.plan.shape)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is rounded: smoothed, rotated and permuted."""
        if self.smooth is not None:
            x = x * per_channel(self.smooth, x, self.op == "conv")
        dim = 1 if self.op == "conv" else -1
        x = hadamard.rotate(x, self.plan.rotate, dim) if self.plan.rotate else x
        return x if self.permute is None else x.index_select(dim, self.permute)

    def forward(self, input: torch.Tensor, phase: torch.Tensor | None = None) -> torch.Tensor:
        """phase (n,) int64 of each row or map of the input, where the plan has several; None: that of the clock."""
        wide = self.transform(self.padded(input.float()))
        stored = self.act_scale
        if stored is not None:
            stored = stored.index_select(0, self.clock.to(stored.device))[0] if self.plan.steps > 1 else stored[0]
        if phase is None and self.plan.late:
            phase = self.clock.phase_on(wide.device).expand(len(wide))
        y = self.product(self._round(wide, stored, phase), self.rounded_weight())
        if self.proj_up is not None:
            branch = Tensors(self.weight, self.weight, down=self.proj_down, up=self.proj_up)
            y = y + dense.low_rank(wide, branch, self.plan, self._conv())
        return y.to(input.dtype)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """The input with the layer's own padding."""
        return x

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer's own product of a padded input and a weight (full shape), and its bias."""
        return F.linear(x, weight, self.bias)

    def _conv(self) -> Conv | None:
        return None

    @torch.no_grad()
    def pack(self, compute_dtype: torch.dtype) -> nn.Module:
        """The packed layer that ships in this one's place."""
        device = self.weight.device
        packed = PACKED[self.plan.kind].like(self.source[0], self.plan, compute_dtype, str(device))
        for name, value in encode(self.weight.reshape(self.plan.rows, -1), self.plan, self.scales).items():
            packed.put(name, value)
        for name in ("smooth", "act_scale"):
            if getattr(self, name) is not None:
                packed.put(name, getattr(self, name).detach().clone())
        for name in ("bias", "proj_down", "proj_up"):
            if getattr(self, name) is not None:
                packed.put(name, getattr(self, name).detach().to(compute_dtype))
        if self.permute is not None:
            packed.put("permute", self.permute.int())
        if self.start_in is not None:
            packed.put("start_in", self.start_in.to(compute_dtype))
            packed.put("start_out", self.source[0](self.start_in.to(self.source[0].weight.dtype)).to(compute_dtype))
        packed.clock = self.clock
        packed.bind(device)
        return packed.train(self.source[0].training)


def input_rounder(plan: LayerPlan) -> Callable[..., torch.Tensor]:
    """-> round(z, act_scale, phase): quantize and decode rows (n, in) or maps (n, in, *space), each as in its phase.

    act_scale as in `reference.input_rounder`; phase (n,) int64, None where the plan has one phase.
    """
    rounders = [reference.input_rounder(each, -1 if plan.kind == "linear" else 1) for each in plan.phases]

    def rounded(z: torch.Tensor, act_scale: torch.Tensor | None = None, phase: torch.Tensor | None = None):
        if len(rounders) == 1:
            return rounders[0](z, act_scale)
        assert phase is not None, "a trace tells the phase of every row"
        out = z.clone()
        for index in phase.unique().tolist():
            out[phase == index] = rounders[index](z[phase == index], None)
        return out

    return rounded


class DraftConv2d(DraftLinear):
    """A convolution of one to three dimensions being fitted: x (batch, in, *space) -> (batch, out, *space)."""

    op = "conv"

    def __init__(self, module: Any, plan: LayerPlan, *transform: torch.Tensor | None):
        super().__init__(module, plan, *transform)
        self._geometry, self._pad, self._pad_mode = geometry(module)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._pad is None else F.pad(x, self._pad, mode=self._pad_mode)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.CONVS[len(self.plan.shape) - 2](x, weight, self.bias, *self._geometry)

    def _conv(self) -> Conv:
        return self._geometry


def draft(
    module: nn.Module, plan: LayerPlan, smooth: torch.Tensor | None = None, permute: torch.Tensor | None = None
) -> DraftLinear:
    """The draft of a full-precision layer under a plan, smoothed by `smooth` (in,) and with its input in the order of
    `permute` (in,), with an empty low-rank branch."""
    return (DraftLinear if plan.kind == "linear" else DraftConv2d)(module, plan, smooth, permute)
