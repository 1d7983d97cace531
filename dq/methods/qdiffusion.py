"""Q-Diffusion: learned rounding block by block, U-Net shortcuts in two halves. Li et al., ICCV 2023, arXiv 2302.04304.

    min_V E|f(hat; W^(V)) - y|^2 / E|y|^2 + penalty(V),   conv(cat(h, skip)) = W_1^ q(h; s_1) + W_2^ q(skip; s_2) + b

f is a residual or transformer block (any pytree in and out), W^ (out, in) on the int4 grid of its output channel, h
(batch, c, ...) and skip (batch, in - c, ...) the two halves. The calibration set is `dq.Calibration(policy=
"stratified")`. Deviations: a few hundred steps of Adam from GPTQ's rounding instead of 20 000 from the nearest one;
activations get dynamic scales, per token (linears) or per sample (convolutions), where the paper learns one range for
all steps (option `static`). Attention's products, of 8-bit queries, keys and values, are added by
`+qdiffusion-attention`, with 8-bit shares (the paper: 16). One part of the paper is left out: there is no second pass,
which learns the activations' steps once the weights are rounded: scales that are found in every call leave it nothing
to learn. Options: `splits`, `static`, `start` ("gptq" or "nearest"), `steps`, `lr`, `batch`, `strength`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from dq.families import Family, concatenations
from dq.fit import moments, reconstruct, rounding, static
from dq.fit.drafts import DraftLinear, draft
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from dq.trace.seen import LayerSeen, Needs, Seen, Unit

NEEDS = Needs(rows=4096, gram=True, absmax=True, calls=True, hat=True)
RECIPES = (
    Recipe("qdiffusion-w4a8", ("int4/channel", "int8/token"), ("int4/channel", "int8a/tensor"), method="qdiffusion"),
)
STEPS, LEARNING_RATE, BATCH, STRENGTH = 200, 0.3, 1, 1e4


def prepare(model: nn.Module, plan: Plan, family: Family, options: Mapping) -> Plan:
    """Cut concatenated inputs, and give stored ranges to all activations if asked to."""
    plan = concatenations.apply(plan, model, family) if options.get("splits", True) else plan
    if options.get("static"):
        plan = replace(plan, layers={name: _stored(layer) for name, layer in plan.layers.items()})
    return plan


def _stored(layer: LayerPlan) -> LayerPlan:
    return layer if layer.act is None else replace(layer, act=TensorPlan("int8", "tensor", "static"))


def smooths(options: Mapping) -> bool:
    """Only for the sake of stored ranges."""
    return bool(options.get("static"))


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers: rounded one by one, then all together on the unit's output."""
    made, targets = {}, {}
    for name, plan in unit.layers.items():
        if name in seen.layers:
            made[name], targets[name] = rounded(unit.layer(name), plan, seen.layers[name], seen, options)
    learn(unit, seen, made, targets, options)
    return made


def rounded(
    module: nn.Module, plan: LayerPlan, layer: LayerSeen, seen: Seen, options: Mapping
) -> tuple[DraftLinear, torch.Tensor]:
    """A draft whose weight is rounded by itself, and the weight (rows, columns) before that."""
    stored = plan.act is not None and plan.act.scale != "dynamic"
    made = static.fit(module, plan, layer, seen, static.StaticWish(round="nearest")) if stored else draft(module, plan)
    return made, onto_grid(made, layer, options)


def onto_grid(made: DraftLinear, layer: LayerSeen, options: Mapping) -> torch.Tensor:
    """Round the weight of a draft by itself; -> the weight (rows, columns) before that."""
    start = made.unrounded().reshape(made.plan.rows, -1)
    if options.get("start", "gptq") == "gptq" and layer.gram is not None:
        weight, made.scales = rounding.gptq(start, made.plan, moments.rounded(layer, made), search=True)
    else:
        made.scales = rounding.mse_scales(start, made.plan)
        weight = rounding.on_grid(start, made.plan, made.scales)
    made.weight.data.copy_(weight.reshape(made.plan.shape))
    return start


def learn(unit: Unit, seen: Seen, made: Mapping[str, DraftLinear], targets: Mapping, options: Mapping) -> None:
    """Learned rounding of the drafts that have a target, on the unit's output; kept if calls held out gain."""
    steps = options.get("steps", STEPS)
    if not targets or not steps:
        return
    learned = {name: made[name] for name in targets}
    strength, aware = options.get("strength", STRENGTH), options.get("scale_aware", False)
    learning = reconstruct.AdaRound(learned, targets, strength, aware)
    settings = reconstruct.Settings(steps, options.get("lr", LEARNING_RATE), options.get("batch", BATCH))
    reconstruct.reconstruct(unit, seen, made, learning.parameters, settings, learning)
