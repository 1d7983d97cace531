"""MixDQ: bits by sensitivity, for models of few steps, where no later step repairs an error. Zhao et al., 2405.17873.

    minimise sum_l E[l, b_l]   subject to   mean over weights of bits b_l <= target,   b_l in {8, 4, 2}

Weights are rounded to nearest, one scale per output channel; nothing is learned. Deviations:
- The paper measures attention to text and feed-forward layers by the SSIM of pictures, all others by the SQNR of the
  prediction, solves each group by itself, and looks for the best split of the bits among some candidates by making
  pictures. Here both are measured on one scale, by gradients of the pictures (dq.fit.trajectory), and solved at once.
- Activations have one scale per token (convolutions: per sample) that is found in every call. The paper's fixed scale
  per tensor would be ruled by the text's start token, which it therefore computes apart; with a scale of its own that
  token harms no other.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.drafts import DraftLinear
from dq.plan import Recipe
from dq.seen import Needs, Seen, Unit

NEEDS = Needs(rows=256, hat=False)  # for the report
FEW_CALLS = True
WEIGHTS = ("int8/channel", "int4/channel", "int2/channel")

RECIPES = (
    Recipe(
        "mixdq-w5a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="mixdq",
        options={"bits": 5.25, "choices": WEIGHTS},  # 5 bits and the scales
    ),
    Recipe(
        "mixdq-w4a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="mixdq",
        options={"bits": 4.25, "choices": WEIGHTS},
    ),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Nothing beyond the formats that were chosen: every layer is rounded to nearest."""
    return {}
