"""FP4DiT: floating-point weights whose format follows the layer, rounding that knows the gap. arXiv 2503.15465.

    min_V E|f(hat; W^(V)) - y|^2 / E|y|^2 + penalty(h),   W^ = low + h(V / d) d,   d = high - low     W, V (out, in)

f is a block (any pytree in and out), W^ on a 4-bit floating grid with one scale for 128 neighbours; d, the gap at each
weight, takes part in V, so that large and small weights move at one pace (scale-aware AdaRound). Activations are
rounded as they come, a scale a token: e2m3 or e3m4. Deviations: the paper names a format per role and model (e3m0 for
the linear before GELU, elsewhere e2m1 or e1m2); here each layer of each block gets the one of the three that leaves
the least error at its output. A few hundred steps from GPTQ's rounding in place of 2 500 from the nearest one.
Convolutions have a scale a sample. Emulated: no chip that dq knows multiplies these. Options: `formats` False keeps
e2m1 everywhere, `scale_aware` False trains V itself; `start`, `steps`, `lr`, `batch`, `strength` as of `qdiffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping

from dq.fit import formats, groups
from dq.fit.drafts import DraftLinear, draft
from dq.methods import qdiffusion
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=2048, gram=True, calls=True, hat=True)
OPTIONS = {"formats": True, "scale_aware": True, "lr": 0.1, "batch": 4}  # of one call, gradients are mostly noise
WEIGHT = "fp4/group:128"
RECIPES = tuple(
    Recipe(
        name,
        (WEIGHT, f"{act}/token"),
        (WEIGHT, f"{act}/tensor"),
        method="fp4dit",
        options=OPTIONS,
        status="experimental",
    )
    for name, act in {"fp4dit-w4a6": "fp6_e2m3", "fp4dit-w4a8": "e3m4"}.items()
)


def smooths(options: Mapping) -> bool:
    """No layer gains a smoothing vector."""
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers: in their formats, rounded one by one, then all together on the unit's output."""
    made, targets, options = {}, {}, {**OPTIONS, **options}
    for shared in groups.shared(unit, seen):
        plans = formats.choose(shared, seen, acts=False) if options["formats"] else shared.plans
        for name, plan in plans.items():
            made[name] = draft(shared.modules[name], plan)
            targets[name] = qdiffusion.onto_grid(made[name], seen.layers[name], options)
    qdiffusion.learn(unit, seen, made, targets, options)
    return made
