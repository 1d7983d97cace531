"""EfficientDM: all layers learn from full-precision runs by updates of low rank. He et al., arXiv 2310.03270.

    y^ = q(W + B A; s_w) q(z; s_z[t]) + bias      W (rows, columns), B (rows, r), A (r, columns), s_z (steps,)

The start is plain: weights to nearest, an activation range a layer and step by its rounding error. Then the recipe's
own tuning trains A and B, which are merged before rounding, the steps of weights, and the table of activation steps
(TALSQ). Rates of B and A count in steps of each layer (scale-aware). Deviations: the table has a row for each
recorded timestep from the start, where the paper copies one range to all; recorded runs in place of live ones;
embedders and final layers as everywhere in dq; a shortcut is rounded like any layer. Options `tune` as `dq.Tune`:
`aware` False is the control with one rate for all weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=512, steps=True, gram=True, absmax=True, hat=False)
START = static.StaticWish(smooth=False, shift=False, rotate=False, margins=(1.0,), round="nearest")
TUNE = {"parts": ["lowrank", "scales", "act"], "rank": 32, "minutes": 20.0}
RECIPES = tuple(
    Recipe(name, formats, formats, method="efficientdm", options={"tune": TUNE}, status="experimental")
    for name, formats in (
        ("efficientdm-w4a4", ("int4/channel", "int4/tensor/table")),
        ("efficientdm-w4a8", ("int4/channel", "int8/tensor/table")),
    )
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with a table of ranges and weights to nearest; the tuning comes after all."""
    return static.layers(unit, seen, START)


def smooths(options: Mapping) -> bool:
    """Inputs are rounded as they come."""
    return False
