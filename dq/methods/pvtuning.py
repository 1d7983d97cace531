"""PV-Tuning: codebooks and codes trained on the whole model's prediction. Malinovskii et al., arXiv 2405.14852.

    minimise over book, code   E |ŷ - y|^2,    Ŵ_v = book[code_v]

y, ŷ: the prediction of the denoiser in full precision and quantized, on recorded runs of the pipeline. The start is
VPTQ's (dq/methods/vptq.py); entries then follow Adam, and a few of the codes an update may be others:
dq/fit/vectors.py. The paper starts from AQLM's or from k-means, its codebooks have 2^8 to 2^16 entries of 8 values.
Options: `compensate` as in `vptq`; `tune` as `dq.Tune`: without "weights" among its parts codes stay and entries alone
are tuned, the control.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit.drafts import DraftLinear
from dq.methods import vptq
from dq.methods.vptq import prepare, smooths
from dq.plan import Recipe
from dq.trace.seen import Seen, Unit

__all__ = ["FEW_CALLS", "NEEDS", "RECIPES", "fit", "prepare", "smooths"]
NEEDS, FEW_CALLS = vptq.NEEDS, vptq.FEW_CALLS
CODES_KEPT = ["scales", "bias"]  # the control
TUNE = {"parts": ["weights", *CODES_KEPT], "minutes": 20.0}
RECIPES = (
    Recipe(
        "pvtuning-w2",
        ("vq256x4", None),
        ("vq256x4", None),
        method="pvtuning",
        status="experimental",
        options={"tune": TUNE},
    ),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """VPTQ's drafts: what is tuned comes after."""
    return vptq.fit(unit, seen, {key: value for key, value in options.items() if key != "tune"})
