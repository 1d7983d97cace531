"""Layers of a unit that share one input, and the rank a branch may have."""

from __future__ import annotations

from collections.abc import Iterator

from dq.fit.smooth import Shared
from dq.plan import LayerPlan
from dq.seen import Seen, Unit


def shared(unit: Unit, seen: Seen) -> Iterator[Shared]:
    """The unit's layers that saw data, those with the very same input and activation format together."""
    groups: dict[tuple, list[str]] = {}
    for name, plan in unit.layers.items():
        if name in seen.layers:
            groups.setdefault((seen.layers[name].source or name, plan.kind, plan.act, plan.splits), []).append(name)
    for names in groups.values():
        plans = {name: unit.layers[name] for name in names}
        yield Shared(plans, {name: unit.layer(name) for name in names}, seen.layers[names[0]])


def affordable_rank(plan: LayerPlan, most: int, share: float, element_bytes: int) -> int:
    """The largest rank up to `most` whose factors take at most `share` of the layer's packed bytes."""
    per_rank = element_bytes * (plan.rows + plan.columns)
    return min(most, int(plan.packed_bytes * share / (1 - share) / per_rank))
