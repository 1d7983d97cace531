"""Layers of a unit that share one input: found, fitted together, and the rank a branch may have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dq.fit import smooth, weights
from dq.fit.drafts import DraftLinear
from dq.fit.smooth import Shared
from dq.plan import LayerPlan
from dq.trace.seen import Seen, Unit


def shared(unit: Unit, seen: Seen) -> Iterator[Shared]:
    """The unit's layers that saw data, those with the very same input and activation format together."""
    groups: dict[tuple, list[str]] = {}
    for name, plan in unit.layers.items():
        if name in seen.layers:
            formats = (plan.act, plan.late, plan.splits)
            groups.setdefault((seen.layers[name].source or name, plan.kind, *formats), []).append(name)
    for names in groups.values():
        plans = {name: unit.layers[name] for name in names}
        yield Shared(plans, {name: unit.layer(name) for name in names}, seen.layers[names[0]])


def fit(
    shared: Shared, seen: Seen, search: smooth.SmoothSearch | None, wishes: Mapping[str, weights.WeightWish]
) -> dict[str, DraftLinear]:
    """One transform for all layers of an input (none without a search), then each layer's branch and weight."""
    found = smooth.search(shared, search) if search is not None else smooth.NOTHING
    drafts = {}
    for name, module in shared.modules.items():
        made = drafts[name] = smooth.transformed(module, shared.plans[name], found.best)
        weights.fit(made, module, seen.layers[name], wishes[name])
        made.plan, made.tried = replace(made.plan, reason=found.reason or made.plan.reason), found.tried
    return drafts


def affordable_rank(plan: LayerPlan, most: int, share: float, element_bytes: int) -> int:
    """The largest rank up to `most` whose factors take at most `share` of the layer's packed bytes."""
    per_rank = element_bytes * (plan.rows + plan.columns)
    return min(most, int(plan.packed_bytes * share / (1 - share) / per_rank))
