"""Temporal Dynamic Quantization: activation steps from a small network of the timestep. So et al., NeurIPS 2023.

    y^ = q(W) q(z; s(t)) + bias,   s(t) = softplus(MLP(t)) s_0      z (rows, in), W (out, in), s (buckets,)

The network learns by the straight-through gradient of the step size and is tabulated afterwards: one row per step
bucket, no network at run time. Deviations: post-training, layer by layer, on the input's weighted rounding error (the
paper also trains weights); e(t) is t itself instead of Fourier features; s_0 comes from a range search, not from mean
and deviation; smoothing, shift and GPTQ by measured output error, as in `ptq4dm`. The table has rows for timesteps
between the calibrated ones, too, up to 64 in all: what a network knows more than a range for each step.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=512, steps=True, between=True, gram=True, absmax=True, hat=False)
RECIPES = tuple(
    Recipe(name, formats, formats, method="tdq", status=status)
    for name, formats, status in (
        ("tdq-w8a8", ("int8/channel", "int8/tensor/table"), "stable"),
        ("tdq-w8a6", ("int8/channel", "int6/tensor/table"), "experimental"),
        ("tdq-w4a6", ("int4/channel", "int6/tensor/table"), "experimental"),
    )
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with a table of ranges; weight-only layers are left to plain rounding."""
    return static.layers(unit, seen, static.wish({"ranges": "network", **options}))
