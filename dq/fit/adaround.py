"""Learned rounding: each weight goes to the grid point below or above it, chosen by gradient. AdaRound, 2004.10568.

    Ŵ = low + h (high - low),   h = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1),   penalty = sum(1 - |2h - 1|^beta)

W, V (rows, columns); low, high: neighbours of W on the grid of its scale block, whatever the grid's spacing, so that
the point above a binade's last is the next binade's first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dq.formats.base import Scales
from dq.plan import LayerPlan

ZETA, GAMMA = 1.1, -0.1  # h reaches 0 and 1 at a finite V


class Rounding(nn.Module):
    """The rounding of one weight matrix under fixed scales, learnable in `choice` (V). Starts at the weight itself.

    Weights beyond the grid's end start at the end.
    """

    def __init__(self, weight: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales]):
        super().__init__()
        ends = zip(plan.parts, scales, strict=True)
        made = [_neighbours(weight.detach()[:, first:last].float(), plan, scale) for (first, last), scale in ends]
        low, high, share = (torch.cat(part, 1) for part in zip(*made, strict=True))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.choice = nn.Parameter(torch.logit((share - GAMMA) / (ZETA - GAMMA)))

    def share(self) -> torch.Tensor:
        """h (rows, columns): 0 at the grid point below, 1 at the one above."""
        return (torch.sigmoid(self.choice) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

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


def _neighbours(part: torch.Tensor, plan: LayerPlan, scales: Scales) -> tuple[torch.Tensor, ...]:
    """-> grid points below and above each weight, in real units, and its place between them (0 to 1)."""
    spec, grain = plan.weight.spec, plan.weight.grain
    rows, columns = part.shape

    def each(blocks: torch.Tensor) -> torch.Tensor:
        return blocks.repeat_interleave(grain.width(columns), 1)[:, :columns].expand(rows, -1)

    step = each(spec.step(scales.scale, scales.scale_global))
    zero = 0.0 if scales.zero is None else each(scales.zero.float())
    points = spec.of(scales.table).grid().to(part.device)
    points = points.expand(rows, -1).contiguous()
    units = (part / step.masked_fill(step == 0, torch.inf) + zero).clamp(points[:, :1], points[:, -1:])
    below = (torch.searchsorted(points, units.contiguous(), right=True) - 1).clamp(max=points.shape[1] - 2)
    low, high = points.gather(1, below), points.gather(1, below + 1)
    gap = (high - low).clamp(min=torch.finfo(torch.float32).tiny)  # a table may repeat its last value
    share = (units - low) / gap
    return (low - zero) * step, (high - zero) * step, share
