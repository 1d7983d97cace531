"""Learned rounding: each weight goes to the grid point below or above it, chosen by gradient. AdaRound, 2004.10568.

    Ŵ = low + h (high - low),   h = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1),   penalty = sum(1 - |2h - 1|^beta)

W, V (rows, columns); low, high: neighbours of W on the grid of its scale block, whatever the grid's spacing, so that
the point above a binade's last is the next binade's first. On floating grids gaps differ by powers of two; with V over
the gap in place of V (scale-aware, FP4DiT, 2503.15465) a step of the optimiser moves every weight as far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dq.formats.base import Scales
from dq.plan import LayerPlan

ZETA, GAMMA = 1.1, -0.1  # h reaches 0 and 1 at a finite V
NEAR = 0.45  # of a gap: how far from the grid point it is held at a weight may start


class Rounding(nn.Module):
    """The rounding of one weight matrix under fixed scales, learnable in `choice` (V). Starts at the weight itself.

    Weights beyond the grid's end start at the end.
    held         (rows, columns) on the grid: start there, at most NEAR of the gap towards the weight, and go nowhere
                 but to the next point on the weight's side
    scale_aware  V counts in gaps, as shares of the mean one
    """

    unit: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        plan: LayerPlan,
        scales: Sequence[Scales],
        held: torch.Tensor | None = None,
        scale_aware: bool = False,
    ):
        super().__init__()
        made = []
        for (first, last), scale in zip(plan.parts, scales, strict=True):
            at = None if held is None else held[:, first:last].float()
            made.append(_neighbours(weight.detach()[:, first:last].float(), plan, scale, at))
        low, high, share = (torch.cat(part, 1) for part in zip(*made, strict=True))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.register_buffer("unit", _shares(high - low) if scale_aware else torch.ones(()), persistent=False)
        self.choice = nn.Parameter(self.unit * torch.logit((share - GAMMA) / (ZETA - GAMMA)))

    def share(self) -> torch.Tensor:
        """h (rows, columns): 0 at the grid point below, 1 at the one above."""
        return (torch.sigmoid(self.choice / self.unit) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self) -> torch.Tensor:
        """The differentiable weight (rows, columns), between grid points."""
        return self.low + self.share() * (self.high - self.low)

    def regulariser(self, beta: float) -> torch.Tensor:
        """Scalar, 0 once every weight has decided; large beta (20) forgives the undecided, small (2) does not."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> torch.Tensor:
        """The decided weight (rows, columns), exactly on the grid."""
        return torch.where(self.choice >= 0, self.high, self.low)


def _shares(gap: torch.Tensor) -> torch.Tensor:
    """Gaps as shares of their mean; 1 where a block of zeros has none."""
    return torch.where(gap > 0, gap / gap.mean().clamp(min=torch.finfo(gap.dtype).tiny), 1.0)


def _neighbours(
    part: torch.Tensor, plan: LayerPlan, scales: Scales, held: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """-> grid points below and above each weight, in real units, and its place between them (0 to 1).

    held: the points are that one and the next on the weight's side, whose gap need not be that of the other side.
    """
    spec, grain = plan.weight.spec, plan.weight.grain
    rows, columns = part.shape

    def each(blocks: torch.Tensor) -> torch.Tensor:
        return blocks.repeat_interleave(grain.width(columns), 1)[:, :columns].expand(rows, -1)

    step = each(spec.step(scales.scale, scales.scale_global))
    zero = 0.0 if scales.zero is None else each(scales.zero.float())
    points = spec.of(scales.table).grid().to(part.device)
    points = points.expand(rows, -1).contiguous()
    divisor, ends = step.masked_fill(step == 0, torch.inf), (points[:, :1], points[:, -1:])
    units = (part / divisor + zero).clamp(*ends)
    below = _below(points, units)
    if held is not None:
        at = _nearest(points, (held / divisor + zero).clamp(*ends))
        below = torch.where(units < points.gather(1, at), at - 1, at).clamp(0, points.shape[1] - 2)
    low, high = points.gather(1, below), points.gather(1, below + 1)
    gap = (high - low).clamp(min=torch.finfo(torch.float32).tiny)  # a table may repeat its last value
    share = (units - low) / gap
    if held is not None:
        start = (at - below).float()  # 1 where it is held at the upper of the two
        share = torch.minimum(torch.maximum(share, start - NEAR), start + NEAR).clamp(0, 1)
    return (low - zero) * step, (high - zero) * step, share


def _below(points: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Index (rows, n) of a row's grid point at or below each value; of the last but one for the last point."""
    return (torch.searchsorted(points, units.contiguous(), right=True) - 1).clamp(0, points.shape[1] - 2)


def _nearest(points: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Index (rows, n) of the grid point that each value is, up to rounding errors."""
    below = _below(points, units)
    low, high = points.gather(1, below), points.gather(1, below + 1)
    return below + (units - low > high - units).long()
