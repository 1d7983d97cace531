"""QuEST: few layers are tuned so that what they hand on can be rounded. Wang et al., ICCV 2025, arXiv 2402.03666.

    min |e(x_t, t)|^2 / |y|^2 + mean_l |W_l x - W_l^ x^|^2 / |W_l x|^2,    l the layers that are tuned

First the layers that see the timestep alone (projections of it in residual blocks, adaLN), a fifth of the updates;
then the feed-forward layers, with the activation ranges of all layers, a table of one for each recorded step. e is the
error of the prediction, W_l x the outputs in full precision. Everything else stays what the start made of it: GPTQ's
rounding, ranges by least rounding error. Deviations: GPTQ where the paper has AdaRound; ranges a tensor where W4A4 of
the paper has one a channel, which no integer product can use; recorded runs; weights move in whole steps of their
layer, biases and ranges at the rates of every tuning; embedders and final layers as everywhere in dq. Options `tune`
as `dq.Tune`: one stage in which all layers move is the control, `local` 0 leaves the layers' own errors out.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=512, steps=True, gram=True, absmax=True, hat=False)
START = static.StaticWish(smooth=False, shift=False, rotate=False, margins=(1.0,), round="gptq")
TIME = {"role:time": ["weights", "bias", "act"]}
SENSITIVE = {r".*\.ff\.net\.": ["weights", "bias"], r".*\.ffn\.": ["weights", "bias"], "role:block": ["act"]}
STAGES = [{"share": 0.2, "moves": TIME}, {"share": 0.8, "moves": SENSITIVE}]
EVERYWHERE = [{"share": 1.0, "moves": {"": ["weights", "bias", "act"]}}]  # the control
TUNE = {"stages": STAGES, "local": 1.0, "minutes": 20.0}
RECIPES = tuple(
    Recipe(
        name,
        formats,
        formats,
        modulation="int4/channel",
        method="quest",
        options={"tune": TUNE},
        status="experimental",
    )
    for name, formats in (
        ("quest-w4a4", ("int4/channel", "int4/tensor/table")),
        ("quest-w4a8", ("int4/channel", "int8/tensor/table")),
    )
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with a table of ranges; the tuning comes after all."""
    return static.layers(unit, seen, START)


def smooths(options: Mapping) -> bool:
    """Inputs are rounded as they come."""
    return False
