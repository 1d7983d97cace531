"""Phases of a run: shares of a recipe become timesteps of the model, and late formats become those of its layers.

A run of S steps is cut at the shares s_1 < s_2 < ... of its steps: phase p begins at the step nearest to s_p S. Steps
are the distinct timesteps of a whole run, whoever is called at them and how often: a pipeline with two experts has one
run, of which each expert may see only some phases. The plan stores the timestep halfway between the last step of a
phase and the first of the next, so that runs of more or fewer steps switch at the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor
from pathlib import Path

import torch

from dq.errors import DQError
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from dq.trace.records import Store


@dataclass(frozen=True)
class Schedule:
    """When the phases that a denoiser sees begin.

    phases  those in which it is called, rising; switch: the timesteps between them, rising as in Plan
    """

    phases: tuple[int, ...] = (0,)
    switch: tuple[float, ...] = ()
    rising: bool = False


def schedules(folders: Mapping[str, Path], name: str, switch: Sequence[float]) -> dict[str, Schedule]:
    """By denoiser, from the calls recorded in its folder; `switch` are shares of the steps, `name` whose they are.

    DQError when a run has too few steps for them.
    """
    if not switch:
        return {part: Schedule() for part in folders}
    seen = {part: _moments(Store(folder)) for part, folder in folders.items()}
    rising = _rise([moment for own in seen.values() for moment in own])
    numbered = _numbered(seen, rising)
    count = 1 + max(step for own in numbered.values() for step, _ in own)
    firsts = [floor(share * count + 0.5) for share in switch]
    if not all(low < high for low, high in pairwise((0, *firsts, count))):
        got = f"{name}: switch {[round(share, 3) for share in switch]} of a run of {count} steps"
        raise DQError(f"{got} is outside of the schedule: expected a step in each phase; raise steps")
    return {part: _schedule(part, own, firsts, rising) for part, own in numbered.items()}


def _moments(store: Store) -> set[tuple[int, float]]:
    """(step, timestep) of the recorded calls; step -1 where nobody counted."""
    infos = [store.read(key, kind="call")["info"] for key in store.keys("calls/")]
    found = {(info.get("step", -1), info.get("timestep")) for info in infos}
    if any(time is None for _, time in found):
        raise DQError("late formats follow the timestep, and the denoiser is called without one; leave late out")
    return found


def _rise(moments: list[tuple[int, float]]) -> bool:
    """Whether timesteps rise along the runs; not where nobody counted steps."""
    known = torch.tensor([moment for moment in moments if moment[0] >= 0], dtype=torch.float64).reshape(-1, 2)
    return bool((known - known.mean(0)).prod(1).sum() > 0)


def _numbered(seen: Mapping[str, set[tuple[int, float]]], rising: bool) -> dict[str, list[tuple[int, float]]]:
    """The same with a step for every timestep: by their order where nobody counted."""
    order = sorted({time for own in seen.values() for _, time in own}, reverse=not rising)
    return {
        part: [(order.index(time) if step < 0 else step, time) for step, time in own] for part, own in seen.items()
    }


def _schedule(part: str, moments: list[tuple[int, float]], firsts: list[int], rising: bool) -> Schedule:
    times: dict[int, list[float]] = {}
    for step, time in moments:
        times.setdefault(sum(step >= first for first in firsts), []).append(time if rising else -time)
    phases = tuple(sorted(times))
    cuts = []
    for before, after in pairwise(phases):
        last, first = max(times[before]), min(times[after])
        if last >= first:
            said = f"{part or 'model'}: timesteps neither rise nor fall along a run"
            raise DQError(f"{said}, late formats need one order; leave late out")
        cuts.append((last + first) / 2)
    exact = torch.tensor(cuts, dtype=torch.float32).abs().tolist()
    return Schedule(phases, tuple(exact), rising)


def planned(plan: Plan, recipe: Recipe, schedule: Schedule) -> Plan:
    """The plan with the recipe's late formats on its linears with rounded activations, and the switches they need."""
    if not recipe.late or recipe.route:
        return plan
    return _placed(plan, lambda layer: (layer.act, *map(TensorPlan.parse, recipe.late)), schedule)


def switched(plan: Plan, schedule: Schedule) -> Plan:
    """A plan whose layers have formats of all phases of a run, with those and the switches of its own denoiser."""
    return _placed(plan, lambda layer: (layer.act, *layer.late) if layer.late else (), schedule)


def _placed(plan: Plan, formats: Callable[[LayerPlan], tuple], schedule: Schedule) -> Plan:
    layers = {name: _late(layer, formats(layer), schedule) for name, layer in plan.layers.items()}
    switched = any(layer.late for layer in layers.values())
    return replace(
        plan,
        layers=layers,
        switch=schedule.switch if switched else (),
        rising=schedule.rising if switched else plan.rising,
    )


def _late(layer: LayerPlan, formats: tuple, schedule: Schedule) -> LayerPlan:
    if layer.kind != "linear" or layer.act is None or not formats:
        return layer
    first, *late = [formats[phase] for phase in schedule.phases]
    return replace(layer, act=first, late=tuple(late) if any(act != first for act in late) else ())
