"""TFMQ-DM: temporal layers fitted by themselves, ranges per step. Huang et al., CVPR 2024, arXiv 2311.16503.

    min_V E_t |g^(e_t; W^(V)) - g(e_t)|^2 + penalty(V),   y^ = q(W) q(z; s[bucket]) + bias

g is a modulation layer (time projection of a residual block, adaLN linear), e_t (samples, in) its input, W (out, in).
TIAR learns the rounding of those weights against their own outputs over all t, never against pictures; a later block
reconstruction (4 bits) leaves them alone. FSC gives every other activation a table of ranges, one row per step bucket.
Deviations: the timestep embedder stays in full precision and the modulation layers' activations in floating point, so
that the layers are independent and TIAR runs one by one; a few hundred steps from GPTQ's rounding; `tfmq-w8a8` has
smoothing, shift and GPTQ by measured output error, as `ptq4dm` has. Options: those of `qdiffusion` but `static`;
`temporal` False fits modulation layers like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from dq.families import Family, concatenations
from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.methods import qdiffusion
from dq.plan import LayerPlan, Plan, Recipe
from dq.trace.seen import LayerSeen, Needs, Seen, Unit, UnitCall

NEEDS = Needs(rows=512, steps=True, gram=True, absmax=True, calls=True, hat=True)
_A8, _A6 = "int8/tensor/table", "int6/tensor/table"
RECIPES = (
    Recipe("tfmq-w8a8", ("int8/channel", _A8), ("int8/channel", _A8), method="tfmq"),
    *(
        Recipe(name, formats, formats, modulation="int4/channel", method="tfmq", status=status)
        for name, formats, status in (
            ("tfmq-w4a8", ("int4/channel", _A8), "stable"),
            ("tfmq-w4a6", ("int4/channel", _A6), "experimental"),
        )
    ),
)
LEARNED_BITS = 6  # weights of more bits gain nothing from learned rounding


def prepare(model: nn.Module, plan: Plan, family: Family, options: Mapping) -> Plan:
    """Cut concatenated inputs."""
    return concatenations.apply(plan, model, family) if options.get("splits", True) else plan


def temporal(plan: LayerPlan) -> bool:
    """Whether a layer sees one token per sample: it depends on the timestep (and pooled conditions) alone."""
    return plan.role == "time"


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts: temporal layers by themselves, the others with tables, and at few bits learned on the unit's output."""
    made, targets = {}, {}
    for name, plan in unit.layers.items():
        if name not in seen.layers:
            continue
        layer, module = seen.layers[name], unit.layer(name)
        if temporal(plan) and options.get("temporal", True):
            made[name] = aligned(module, plan, layer, seen, options)
        elif plan.act is not None and plan.weight.spec.bits > LEARNED_BITS:
            made[name] = static.fit(module, plan, layer, seen, static.StaticWish())
        else:
            made[name], targets[name] = qdiffusion.rounded(module, plan, layer, seen, options)
    few = {name: target for name, target in targets.items() if _few(made[name].plan)}
    qdiffusion.learn(unit, seen, made, few, options)
    return made


def _few(plan: LayerPlan) -> bool:
    return plan.weight.spec.bits <= LEARNED_BITS


def aligned(module: nn.Module, plan: LayerPlan, layer: LayerSeen, seen: Seen, options: Mapping) -> DraftLinear:
    """TIAR: a layer's rounding learned against its own outputs at all timesteps seen."""
    made, target = qdiffusion.rounded(module, plan, layer, seen, options)
    if _few(plan):
        alone = Unit("temporal", module, {"temporal": plan})
        calls = partial(_sheets, module, layer)
        sheet = replace(seen, layers={"temporal": layer}, calls=calls)
        qdiffusion.learn(alone, sheet, {"temporal": made}, {"temporal": target}, options)
    return made


@torch.no_grad()
def _sheets(module: nn.Module, layer: LayerSeen, stream: str, count: int = 10) -> Iterator[UnitCall]:
    """The rows a layer saw as calls of the layer: `count` interleaved parts, so that each spans all timesteps."""
    dtype = module.weight.dtype
    order = torch.argsort(layer.bucket, stable=True)
    for first in range(min(count, len(order))):
        rows = order[first::count]
        yield UnitCall((layer.hat[rows].to(dtype),), {}, module(layer.x[rows].to(dtype)), 0)
