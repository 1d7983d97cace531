"""PTQ4DM: one stored activation range per layer for all steps. Shang et al., CVPR 2023, arXiv 2211.15736.

    s = argmin_f mean |z - q(z; f |z|max / 127)|^2 |W_c|^2,   y^ = q(W) q(z; s) + bias       z (rows, in), W (out, in)

The calibration set is the full-precision model's own trajectory, timesteps normal and skewed to the clean end:
`dq.Calibration(policy="normal")`; any other policy works too. Deviations: the error that ranges minimise is squared
and weighed by the weight's columns where the paper takes a power of 2.4; inputs are smoothed, rotated or shifted
where that leaves less error at the layer's output on other calls; weights are rounded by GPTQ where that does. On
tiny-pixart (16 prompts, 128 stratified calls, PSNR against full precision) minimum and maximum give 44.4 dB, this
49.0, scales measured in every call 50.4. Options: `plain` gives minimum and maximum and nothing else; `smooth`,
`rotate`, `shift` and `round` turn single ones off.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=4096, gram=True, absmax=True, hat=False)
FORMATS = ("int8/channel", "int8/tensor/static")
LOWER = ("int6/channel", "int6/tensor/static")
RECIPES = (
    Recipe("ptq4dm-w8a8", FORMATS, FORMATS, method="ptq4dm"),
    Recipe("ptq4dm-w6a6", LOWER, LOWER, method="ptq4dm", status="experimental"),
)
BASELINE = Recipe("ptq4dm-w8a8-minmax", FORMATS, FORMATS, method="ptq4dm", options={"plain": True})
PLAIN = static.StaticWish("minmax", smooth=False, shift=False, rotate=False, margins=(1.0,), round="nearest")


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with stored ranges; weight-only layers are left to plain rounding."""
    asked = {key: value for key, value in options.items() if key != "plain"}
    return static.layers(unit, seen, PLAIN if options.get("plain") else static.wish(asked))
