"""HiF8 fine-tuned: weights learn to be right as 8-bit tapered floats. OSP-Next; format: arXiv 2409.16626.

    y^ = W^ x^ + b,   W^ = hif8(W / s) s,   s = max|W_row| / 15,   x^ likewise, a scale a token

Tapered floats have three bits of mantissa near their scale and fewer far from it; training moves weights so that what
rounding does to them adds up to less. The start is recipe `hif8`, which is the control. Deviations: scales a row and a
token where the paper has one a tensor; gradients in fp32, where the paper rounds them too, for its chips; the answers
of the full-precision model, where the paper trains on videos. Options `tune` as `dq.Tune`.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=64, hat=False)
TUNE = {"parts": ["weights", "scales", "bias"], "minutes": 20.0}
RECIPES = (
    Recipe(
        "hif8-tuned",
        ("hif8/channel", "hif8/token"),
        ("hif8/channel", "hif8/tensor"),
        method="hif8",
        options={"tune": TUNE},
        status="experimental",
    ),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """No draft: rounding to nearest is where the tuning begins."""
    return {}


def smooths(options: Mapping) -> bool:
    """Inputs are rounded as they come."""
    return False
