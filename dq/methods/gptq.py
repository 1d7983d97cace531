"""GPTQ: weights rounded one column at a time, the rest moved to make up for it. Frantar et al., arXiv 2210.17323.

    w_j <- w_j - (w_i - q(w_i)) / U_ii U_ij  for all j > i,   U^T U = (E[z z^T] + damp I)^-1      W (out, in), z (in,)

The second moments are those of inputs as the quantized units before give them, with the noise of rounded activations.
All grids, floats included; groups keep scales fixed beforehand; columns in order of falling second moment.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import groups, weights
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, hat=True)
FEW_CALLS = True
OPTIONS = {"noise": False}  # the weight that is rounded serves the rounded input best (dq/fit/weights.py)
RECIPES = (
    Recipe("gptq-int4-weight", ("int4/group:64", None), ("int4/group:64", None), method="gptq"),
    Recipe(
        "gptq-w4a8",
        ("int4/group:64", "int8/token"),
        ("int4/group:64", "int8a/tensor"),
        method="gptq",
        options=OPTIONS,
    ),
)


def smooths(options: Mapping) -> bool:
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made, wish = {}, weights.WeightWish(noise={**OPTIONS, **options}["noise"])
    for shared in groups.shared(unit, seen):
        made |= groups.fit(shared, seen, None, dict.fromkeys(shared.plans, wish))
    return made
