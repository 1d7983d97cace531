"""QVGen: all weights trained as they are rounded, beside a help that fades to nothing. ICLR 2026, arXiv 2505.11497.

    y^ = (q(W) + up diag(gamma_t) down) q(x) + b,    up down = the best rank-32 part of W - q(W) at the start

The help keeps gradients small while weights are far from what rounding lets them be; it is halved phase by phase and
gone after three quarters of the updates (dq/fit/auxiliary.py): what is shipped has the bytes and the kernels of plain
training. The start is plain: weights and each token to nearest. Deviations: symmetric grids without learned zero
points; activations cover the whole range of their token, where the paper learns shares of it by step; a step's codes
move along when it is learned; recorded runs of the pipeline in place of videos. Options `tune` as `dq.Tune`: without
"aux" among its parts it is LSQ's training (1902.08153), the control.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=64, hat=False)
PLAIN = ["weights", "scales", "bias"]  # the control
TUNE = {"parts": [*PLAIN, "aux"], "rank": 32, "full": True, "minutes": 20.0}
RECIPES = tuple(
    Recipe(name, linear, conv, method="qvgen", options={"tune": TUNE}, status="experimental")
    for name, linear, conv in (
        ("qvgen-w4a4", ("int4/channel", "int4/token"), ("int4/channel", "int4/tensor")),
        ("qvgen-w3a3", ("int3/channel", "int3/token"), ("int3/channel", "int3/tensor")),
    )
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """No draft: rounding to nearest is where the tuning begins."""
    return {}


def smooths(options: Mapping) -> bool:
    """Inputs are rounded as they come."""
    return False
