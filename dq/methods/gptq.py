"""GPTQ: weights rounded one column at a time, the rest moved to make up for it. Frantar et al., arXiv 2210.17323.

    w_j <- w_j - (w_i - q(w_i)) / U_ii U_ij  for all j > i,   U^T U = (E[z z^T] + damp I)^-1      W (out, in), z (in,)

The second moments are those of inputs as the quantized units before give them, with the noise of rounded activations.
All grids, floats included; groups keep scales fixed beforehand; columns in order of falling second moment.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.drafts import DraftLinear
from dq.fit import smooth, weights
from dq.plan import Recipe
from dq.seen import Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, hat=True)
FEW_CALLS = True
RECIPES = (
    Recipe("gptq-int4-weight", ("int4/group:64", None), ("int4/group:64", None), method="gptq"),
    Recipe("gptq-w4a8", ("int4/group:64", "int8/token"), ("int4/group:64", "int8a/tensor"), method="gptq"),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made = {}
    for name in unit.layers:
        if name in seen.layers:
            made[name] = smooth.transformed(unit.layer(name), unit.layers[name], smooth.Transform())
            weights.fit(made[name], unit.layer(name), seen.layers[name], weights.Wish(rank=0))
    return made
