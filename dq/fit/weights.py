"""Branch and rounded weight of one layer under a given input transform: low rank and rounding in turn.

    L = SVD_r(W - Q) in the norm H, from Q = 0;   Q = GPTQ(W - L) on H + D      W, L, Q (rows, columns), z = (x * s) R

W smoothed and rotated, H = E[z z^T], q(z) = z + noise, D = E[noise^2]. SVDQuant (arXiv 2411.05007) alternates plain
SVDs and nearest rounding. With `noise` all of the layer's error is brought down, not that of its weight alone:

    E|W z - L z - Q q(z)|^2 = |W - L - Q|_H^2 + |Q|_D^2,   |A|_H^2 = tr(A H A^T)
    Q = GPTQ((W - L) H (H + D)^-1) on H + D,   SVD_r in the norm (H^-1 + D^-1)^-1

For a given L the unrounded Q of least error is (W - L) H (H + D)^-1, which lets go of directions in which noise is
louder than signal, as a Wiener filter does and, for language models, Qronos (arXiv 2505.11695); what that leaves is
W - L in the other norm. Directions that the calibration never saw would go, too: H has a ridge (dq/fit/moments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dq.fit import lowrank, moments, rounding, smooth
from dq.fit.drafts import DraftLinear
from dq.formats.base import Scales
from dq.trace.seen import LayerSeen

DAMP, SOLVED_DAMP = 0.01, 0.001  # of GPTQ; solved moments have a ridge and the noise on their diagonal


@dataclass(frozen=True)
class WeightWish:
    """What a weight becomes.

    rank       of the branch, 0 for none; iterations of branch and rounding in turn
    rounding   "nearest", "gptq" or "comq" in so many `sweeps`
    noise      of linears the best weight for the rounded input is rounded; else W - L, and the norm is H
    """

    rank: int = 0
    rounding: str = "gptq"
    iterations: int = 2
    sweeps: int = 0
    noise: bool = False


@torch.no_grad()
def fit(made: DraftLinear, module: nn.Module, seen: LayerSeen, wish: WeightWish) -> list[float]:
    """Set weight, scales and branch of a draft (smoothed and rotated already, branch empty).

    -> error of each variant tried, as a share of the output's power; the best one stays. Nearest rounding of the
    transformed weight is one of them, so the result is never worse than that on the sampled rows.
    """
    x, hat, phase = smooth.sample(seen, made.plan)
    target = module(x.to(module.weight.dtype)).float()
    power = target.square().sum().clamp(min=1e-30)
    errors, best = [], None
    for variant in list(_variants(made, seen, wish)):
        _put(made, *variant)
        errors.append(float((made(hat, phase) - target).square().sum() / power))
        best = variant if errors[-1] <= min(errors) else best
    _put(made, *best)
    return errors


def _variants(made: DraftLinear, seen: LayerSeen, wish: WeightWish) -> Iterator[tuple]:
    """(rounded weight, its scales, down, up): to nearest without a branch, then what is wished for."""
    plan, weight = made.plan, made.weight.data.reshape(made.plan.rows, -1).clone()
    nothing = (weight[:0], weight[:, :0])
    yield *rounding.nearest(weight, plan), *nothing
    if seen.gram is None or (wish.rounding == "nearest" and not wish.rank):
        return
    met = moments.met(seen, made, wish.noise)

    def round_(rest: torch.Tensor) -> tuple[torch.Tensor, list[Scales]]:
        wanted = met.target(rest)
        if wish.rounding == "comq":
            return rounding.coordinate_descent(wanted, plan, met.rounded, wish.sweeps)
        if wish.rounding == "gptq":
            return rounding.gptq(wanted, plan, met.rounded, DAMP if met.inverse is None else SOLVED_DAMP)
        return rounding.nearest(wanted, plan)

    def error(rounded: torch.Tensor, branch: torch.Tensor) -> float:
        return met.error(rounded, weight - branch - rounded)

    if wish.rank:
        yield lowrank.refine(weight, wish.rank, round_, met.lost(), error, wish.iterations)
    else:
        yield *round_(weight), *nothing


def _put(made: DraftLinear, rounded: torch.Tensor, scales: list[Scales], down: torch.Tensor, up: torch.Tensor) -> None:
    smooth.put_branch(made, down, up, rounded)
    made.scales = scales
