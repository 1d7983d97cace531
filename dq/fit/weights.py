"""Branch and rounded weight of one layer under a given input transform: low rank and GPTQ in turn.

    L_0 = SVD_r(W'),   Q_k = GPTQ(W' - L_k),   L_(k+1) = SVD_r(W' - Q_k),   W' = W / s R        (rows, columns)

SVD_r is the best rank-r matrix in the norm of the input's second moments, and GPTQ's moments include the noise of the
rounded input. SVDQuant (arXiv 2411.05007) alternates plain SVDs and nearest rounding.
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


@dataclass(frozen=True)
class WeightWish:
    """rank of the branch, 0 for none; rounding "nearest" or "gptq"; iterations of branch and rounding in turn."""

    rank: int = 0
    rounding: str = "gptq"
    iterations: int = 2


@torch.no_grad()
def fit(made: DraftLinear, module: nn.Module, seen: LayerSeen, wish: WeightWish) -> list[float]:
    """Set weight, scales and branch of a draft (smoothed and rotated already, branch empty).

    -> error of each variant tried, as a share of the output's power; the best one stays. Nearest rounding of the
    transformed weight is one of them, so the result is never worse than that on the sampled rows.
    """
    x, hat = smooth.sample(seen, made.plan)
    target = module(x.to(module.weight.dtype)).float()
    power = target.square().sum().clamp(min=1e-30)
    errors, best = [], None
    for variant in list(_variants(made, seen, wish)):
        _put(made, *variant)
        errors.append(float((made(hat) - target).square().sum() / power))
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
    gram = moments.transformed(seen, made)
    met = gram + moments.noise(seen, made).diag()

    def round_(rest: torch.Tensor) -> tuple[torch.Tensor, list[Scales]]:
        return rounding.gptq(rest, plan, met) if wish.rounding == "gptq" else rounding.nearest(rest, plan)

    def error(value: torch.Tensor) -> float:
        return rounding.error(value, weight, gram)

    if wish.rank:
        yield lowrank.refine(weight, wish.rank, round_, gram, error, wish.iterations)
    else:
        yield *round_(weight), *nothing


def _put(made: DraftLinear, rounded: torch.Tensor, scales: list[Scales], down: torch.Tensor, up: torch.Tensor) -> None:
    smooth.put_branch(made, down, up, rounded)
    made.scales = scales
