"""Low-bitwidth floating point: formats and ranges searched, FP4 rounding learned. Chen et al., arXiv 2408.06995.

    y^ = q(W; f_W, s_W) q(z; f_z, s_z) + bias,   min_V E|f(hat; W^(V)) - y|^2 / E|y|^2 + penalty(V)

W (out, in), z (rows, in) or (batch, in, *space); f the split eXmY of 4 or 8 bits, s the scale, which is an exponent
bias of any real value: one a row of W, one stored for z. Both are those of least error on recorded inputs. Weights of
4 bits learn their rounding on the block's output, those of 8 bits go to the nearest value; concatenated inputs are cut
as in Q-Diffusion. Deviations: format and range are judged at the layer's output (the paper's text was not at hand:
this is LLM-FP4's search); a few hundred steps from GPTQ's rounding. Emulated: no chip that dq knows multiplies them.
Options: `formats` False keeps e2m1 and e3m4, `steps` 0 learns no rounding; `splits`, `start`, `lr`, `batch`,
`strength` as of `qdiffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dq.families import Family, concatenations
from dq.fit import formats, static
from dq.fit.drafts import DraftLinear
from dq.fit.smooth import Shared
from dq.methods import qdiffusion
from dq.plan import LayerPlan, Plan, Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=4096, gram=True, absmax=True, calls=True, hat=True)
OPTIONS = {"formats": True, "lr": 0.1, "batch": 4}  # of one call, gradients are mostly noise
ACT = "e3m4/tensor/static"
RANGES = static.StaticWish(smooth=False, shift=False, rotate=False, round="nearest")
LEARNED_BITS = 4  # weights of more bits are rounded to nearest, as published
RECIPES = tuple(
    Recipe(name, (weight, ACT), (weight, ACT), method="lowbitfp", options=OPTIONS, status="experimental")
    for name, weight in {"lowbitfp-w4a8": "fp4/channel", "lowbitfp-w8a8": "e3m4/channel"}.items()
)


def prepare(model: nn.Module, plan: Plan, family: Family, options: Mapping) -> Plan:
    """Cut concatenated inputs."""
    return concatenations.apply(plan, model, family) if options.get("splits", True) else plan


def smooths(options: Mapping) -> bool:
    """No layer gains a smoothing vector."""
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with rounded activations; weight-only layers are left to plain rounding."""
    made, targets, options = {}, {}, {**OPTIONS, **options}
    for name, plan in unit.layers.items():
        if plan.act is None or name not in seen.layers:
            continue
        made[name] = ranged(unit.layer(name), name, plan, seen, options)
        few = made[name].plan.weight.spec.bits <= LEARNED_BITS
        target = qdiffusion.onto_grid(made[name], seen.layers[name], options if few else {"start": "nearest"})
        targets |= {name: target} if few else {}
    qdiffusion.learn(unit, seen, made, targets, options)
    return made


def ranged(module: nn.Module, name: str, plan: LayerPlan, seen: Seen, options: Mapping) -> DraftLinear:
    """A draft in the formats of least error, the range of its activations stored, its weight not yet rounded."""
    assert plan.act is not None
    layer, acts = seen.layers[name], (plan.act.format,)
    if options["formats"]:
        plan = formats.choose(Shared({name: plan}, {name: module}, layer), seen)[name]
        acts = formats.splits(plan.act.spec)  # pyright: ignore[reportOptionalMemberAccess]
    return formats.stored(module, plan, layer, seen, RANGES, acts)
