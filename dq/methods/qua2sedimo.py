"""Qua2SeDiMo: which way of rounding suits which operation, learned from random plans. Mills et al., arXiv 2412.14628.

    minimise sum_l E[l, c_l]   subject to   mean bits of all weights, tables and scales included <= target
    c_l in {4, 3 bits} x {uniform, k-means a row, k-means a tensor},   E fitted to the errors of PLANS random plans

Operations and models differ in what suits them: uniform steps, or values where the weights are. The predictor tells
for each operation and way (`dq.budget.sampled`); `python -m eval.experiments.insights` writes it down. Weights only,
rounded to nearest; nothing sees data but the predictor. Deviations:
- The paper fits a graph network to the FID of 500 plans; here a regression starts from gradients of the pictures, with
  a factor for each layer and for each operation and way, fitted to where whole runs end.
- One integer program over all layers in place of the best variant of each block.
- Uniform scales are searched by squared error (the paper: power 2.4); tables hold bytes (dq.formats.lookup).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dq.fit import levels, rounding
from dq.fit.drafts import DraftLinear, draft
from dq.formats.base import Scales
from dq.plan import LayerPlan, Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=256, hat=False)  # for the report
FEW_CALLS = True
PLANS = 96
UNIFORM = ("int4a/channel", "int3a/channel")
WAYS = ("lut4/channel", UNIFORM[0], "lut4/tensor", "lut3/channel", UNIFORM[1], "lut3/tensor")
RECIPES = tuple(
    Recipe(
        name,
        (UNIFORM[0], None),
        (UNIFORM[0], None),
        method="qua2sedimo",
        status="experimental",
        options={"bits": bits, "choices": WAYS, "metric": "sampled", "plans": PLANS},
    )
    for name, bits in {"qua2sedimo-w4": 4.0, "qua2sedimo-w3.7": 3.7}.items()
)


def smooths(options: Mapping) -> bool:
    return False


@torch.no_grad()
def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data, rounded the way that was chosen."""
    made = {name: draft(unit.layer(name), plan) for name, plan in unit.layers.items() if name in seen.layers}
    for each in made.values():
        each.scales = start(each.weight.data.reshape(each.plan.rows, -1), each.plan)
    return made


def start(weight: torch.Tensor, plan: LayerPlan) -> list[Scales]:
    """Scales of each part of a weight (rows, columns): tables by k-means, or those of the least squared error."""
    return levels.tables(weight, plan) if plan.weight.spec.tabled else rounding.mse_scales(weight, plan)
