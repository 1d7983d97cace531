"""6Bit-Diffusion: 4-bit weights, and inputs of 4 or 8 bits as each block's last change decides. arXiv 2603.18742.

    y = Q(W R) Q_s(x R) + b,   Q_s: 8 bits where  slope Gamma_(s-1) + offset > threshold,  else 4
    Gamma_s = |block(x_s) - x_s|_1 / |x_s|_1     x (tokens, in), W (out, in), R Hadamard blocks of up to 128 channels

Weights are rounded once, to nearest. The rule is fitted to the calibration's runs (`dq/fit/routes.py`) and followed
while the model runs (`dq/sampler/routing.py`): mean bits of inputs are BITS there. `+deltacache` adds the system's
second half, blocks left out while their change hardly moves (`dq/sampler/caches/deltacache.py`). `+sixbit` adds the
rule to other recipes with 4-bit inputs. Option `follow`: False fits rules of slope 0, which choose layers once and for
all by their mean error: the control. Deviations: a rotation has to leave a smaller error than none at its layer
(option `rotate`: False for none at all); convolutions have 8-bit inputs in all steps; the paper's NVFP4 is
`sixbit-nvfp4`, `sixbit-int4` has integers, which processors multiply.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import groups, smooth, weights
from dq.fit.drafts import DraftLinear
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=2048, hat=False)
FEW_CALLS = True
BITS = 6.0

RECIPES = tuple(
    Recipe(
        name,
        (weight, weight),
        (weight, "int8a/tensor"),
        method="sixbit",
        late=("int8/token",),
        route=BITS,
        status="experimental",
        options={"rotate": True, "follow": True},
    )
    for name, weight in (("sixbit-int4", "int4/group:64"), ("sixbit-nvfp4", "nvfp4"))
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made = {}
    for shared in groups.shared(unit, seen):
        turned = options["rotate"] and shared.plan.kind == "linear" and shared.plan.act is not None
        wish = smooth.SmoothSearch(alphas=(), rotations=smooth.orders(shared.plan)) if turned else None
        made |= groups.fit(shared, seen, wish, dict.fromkeys(shared.plans, weights.WeightWish(rounding="nearest")))
    return made


def smooths(options: Mapping) -> bool:
    """No layer gains a smoothing vector."""
    return False
