"""COMQ: one weight after the other to its best grid point, the rest as they are. Zhang et al., arXiv 2403.07134.

    w_k = Q(w_k + sum over j != k of e_j H_jk / H_kk),  e = w - q,  H = E[z z^T]        w (in,) a row of W, z (in,)

Columns of large |w_k| H_kk^1/2 first, several sweeps, and after each the least-squares scale of every group. Nothing
is factored, inverted or damped; a later sweep never raises the error. Moments as in `gptq`. Deviations: one order for
all rows, first scales by a search. `sweeps` 0 rounds to nearest under the searched scales, the control.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import groups, rounding, weights
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, hat=True)
FEW_CALLS = True
OPTIONS = {"sweeps": rounding.SWEEPS}
RECIPES = tuple(
    Recipe(name, *pairs, method="comq", status="experimental", options=OPTIONS)
    for name, pairs in {
        "comq-int4-weight": (("int4/group:64", None), ("int4/group:64", None)),
        "comq-w4a8": (("int4/group:64", "int8/token"), ("int4/group:64", "int8a/tensor")),
    }.items()
)


def smooths(options: Mapping) -> bool:
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made, wish = {}, weights.WeightWish(rounding="comq", sweeps={**OPTIONS, **options}["sweeps"])
    for shared in groups.shared(unit, seen):
        made |= groups.fit(shared, seen, None, dict.fromkeys(shared.plans, wish))
    return made
