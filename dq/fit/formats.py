"""Floating-point formats of one layer: the split into exponent and mantissa that leaves the least error at its output.

    argmin over eXmY of W and of z   sum |Q(W / s) Q(x * s) - W x|^2 / sum |W x|^2,   1 + X + Y = bits

x (rows, in), W (out, in), s (in,). Errors are measured on recorded inputs, with both roundings in place, weights and
activations in turn as in LLM-FP4 (arXiv 2310.16836). An exponent bias that is any real number is a scale, so that
ranges are searched as scales: for every format of a weight the ones that cover each block and the ones of least
squared error, columns weighed by their inputs; of stored activation scales those of `dq.fit.static`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dq.fit import moments, rounding, static
from dq.fit.drafts import DraftLinear, draft
from dq.fit.smooth import Shared, sample
from dq.formats.base import Format
from dq.formats.floating import MiniFloat
from dq.plan import LayerPlan
from dq.trace.seen import LayerSeen, Seen

# the published candidates by bits; e1m2 has the values of symmetric int4
SPLITS = {4: ("fp4", "e1m2", "e3m0"), 6: ("fp6_e2m3", "fp6_e3m2"), 8: ("e3m4", "e2m5", "fp8", "fp8_e5m2")}
ROUNDS = 3  # of weights and activations in turn, as published


def splits(form: Format) -> tuple[str, ...]:
    """Names of the floating formats that take the place of this one; its own where it is none or has no others."""
    return SPLITS.get(form.bits, (form.name,)) if isinstance(form, MiniFloat) else (form.name,)


class _Errors:
    """Errors of plans of the layers of one input, under given smoothing (in,); each measured once."""

    def __init__(self, shared: Shared, seen: Seen, smooth: torch.Tensor | None):
        self.shared, self.seen, self.smooth = shared, seen, smooth
        self.x, self.hat, self.phase = sample(shared.seen, shared.plan)
        self.known: dict[tuple, float] = {}

    @torch.no_grad()
    def __call__(self, name: str, plan: LayerPlan) -> float:
        """Share of the output's power that the layer misses, with the better of both weight ranges."""
        key = (name, plan.weight.format, plan.act)
        if key not in self.known:
            module = self.shared.modules[name]
            act = plan.act if plan.act is not None and plan.act.scale == "dynamic" else None
            late = () if act is None else plan.late
            made = draft(
                module, replace(plan, act=act, late=late, steps=1, smooth=self.smooth is not None), self.smooth
            )
            target = module(self.x.to(module.get_parameter("weight").dtype)).float()
            missed = []
            for scales in _ranges(made, self.seen.layers[name]):
                made.scales = scales
                missed.append(float((made(self.hat, self.phase) - target).square().sum()))
            self.known[key] = min(missed) / max(float(target.square().sum()), 1e-30)
        return self.known[key]


def _ranges(made: DraftLinear, layer: LayerSeen) -> list:
    weight = made.weight.data.reshape(made.plan.rows, -1)
    found = [rounding.fit_scales(weight, made.plan)]
    if layer.gram is not None:
        found.append(rounding.mse_scales(weight, made.plan, moments.transformed(layer, made).diagonal()))
    return found


def choose(shared: Shared, seen: Seen, smooth: torch.Tensor | None = None, acts: bool = True) -> dict[str, LayerPlan]:
    """Plans of the layers of one input: each weight in its best format, the input in the one best for all of them.

    smooth (in,) multiplies the input. acts: whether its format may change. Stored ranges are taken as unrounded here.
    """
    error, plans = _Errors(shared, seen, smooth), dict(shared.plans)
    for _ in range(ROUNDS):
        before = plans
        plans = {name: _weight(name, plan, error) for name, plan in plans.items()}
        plans = _act(plans, error) if acts else plans
        if plans == before:
            break
    return plans


def _weight(name: str, plan: LayerPlan, error: _Errors) -> LayerPlan:
    names = splits(plan.weight.spec)
    tried = [replace(plan, weight=replace(plan.weight, format=each)) for each in names]
    return plan if len(tried) < 2 else min(tried, key=lambda plan: error(name, plan))


def _act(plans: Mapping[str, LayerPlan], error: _Errors) -> dict[str, LayerPlan]:
    act = next(iter(plans.values())).act
    if act is None or act.scale != "dynamic":
        return dict(plans)
    tried = [
        {key: replace(plan, act=replace(act, format=each)) for key, plan in plans.items()} for each in splits(act.spec)
    ]
    if len(tried) < 2:
        return dict(plans)
    return min(tried, key=lambda plans: sum(error(key, plan) for key, plan in plans.items()))


def stored(
    module: nn.Module, plan: LayerPlan, layer: LayerSeen, seen: Seen, wish: static.StaticWish, acts: Sequence[str]
) -> DraftLinear:
    """The draft of a layer with stored activation scales, its activations in the one of `acts` that errs least."""
    assert plan.act is not None  # only layers with stored scales are fitted here
    tried = [replace(plan, act=replace(plan.act, format=name)) for name in acts]
    made = [static.fit(module, each, layer, seen, wish) for each in tried]
    if len(made) == 1:
        return made[0]
    missed = [static.Layer(module, each, layer, seen).error(one) for each, one in zip(tried, made, strict=True)]
    return made[missed.index(min(missed))]
