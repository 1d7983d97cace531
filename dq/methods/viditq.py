"""ViDiT-Q: a scale for each token while it runs, smoothing and rotation against uneven channels. arXiv 2406.02540.

    y = Q(W / s R) Q((x * s) R) + b,   s_c = max_row |W_rc|^(1-alpha) / max |x_c|^alpha     x (tokens, in), W (out, in)

Dynamic scales take the variation over tokens, steps and guidance branches away; smoothing takes the static part of the
imbalance between channels, Hadamard rotation the rest. The maxima are those of the earliest (noisiest) quarter of
steps, where the imbalance is worst. ViDiT-Q-MP gives each layer 8, 6 or 4 bits under a mean of MEAN_BITS.
Weights are symmetric, as in the newer released code: kernels for convolutions take no zero points.
Deviations: alpha (the paper: one per model) and whether to smooth or rotate at all are chosen for each input by output
error; rotation is in blocks of at most 128 channels; convolutions are smoothed only; bits are chosen by gradients
through the whole run and an integer program (the paper: groups of layers, each sorted by a metric of its own).
`viditq-mp-w4a6` also gives each layer's input 8, 6 or 4 bits in each third of the steps, under a mean of MEAN_ACT_BITS
(the paper: in quarters of them; there the weights' bits change as well, which would take a second copy of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dq.fit import groups, smooth, weights
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import LayerSeen, Needs, Seen, Unit

NEEDS = Needs(rows=2048, absmax=True, hat=False)
FEW_CALLS = True
MEAN_BITS = 5.5
MEAN_ACT_BITS = 6.0
WEIGHTS = ("int8/channel", "int6/channel", "int4/channel")
EARLY = 0.25  # share of the steps whose maxima are used

RECIPES = (
    Recipe("viditq-w8a8", ("int8/channel", "int8/token"), ("int8/channel", "int8a/tensor"), method="viditq"),
    Recipe(
        "viditq-w4a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="viditq",
    ),
    Recipe(
        "viditq-mp-w4a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="viditq",
        status="experimental",
        options={"bits": MEAN_BITS, "choices": WEIGHTS},
    ),
    Recipe(
        "viditq-mp-w4a6",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="viditq",
        status="experimental",
        options={
            "bits": MEAN_BITS,
            "choices": WEIGHTS,
            "acts": ("int8/token", "int6/token", "int4/token"),
            "act_bits": MEAN_ACT_BITS,
            "thirds": True,
        },
    ),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made = {}
    for shared in groups.shared(unit, seen):
        shared.seen = _early(shared.seen, seen.rising)
        rotations = smooth.orders(shared.plan) if shared.plan.kind == "linear" and shared.plan.act else ()
        wish = smooth.SmoothSearch(betas=("1-alpha",), rotations=rotations) if shared.plan.act else None
        made |= groups.fit(shared, seen, wish, dict.fromkeys(shared.plans, weights.WeightWish(rounding="nearest")))
    return made


def _early(seen: LayerSeen, rising: bool) -> LayerSeen:
    """Channel maxima of the noisiest quarter of the steps that were recorded; `rising` as in Seen."""
    assert seen.absmax is not None  # NEEDS asks for it
    known = seen.absmax[seen.absmax.flatten(1).amax(1) > 0]
    if not len(known):
        return seen
    count = max(1, round(len(known) * EARLY))
    return replace(seen, absmax=known[:count] if rising else known[-count:])
