"""Rules that choose a layer's input format step by step: fitted on runs of the full-precision model. arXiv 2603.18742.

    error_s ~ slope Gamma_(s-1) + offset        least squares of each layer, over steps and runs
    error = |y_first - y_late|_1 / |y_late|_1    outputs of the layer's own packed weights under its two formats

Gamma is the change of the layer's block (`dq.sampler.routing`). The paper compares with the full-precision layer; here
what both formats share, the rounded weight, is left out, as the rule cannot change it. The threshold, one for a model,
is the one at which the calibration runs have the recipe's mean bits, first steps included (the paper names none); a
layer weighs as much as it has weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import naming
from dq.layers.memory import aligned
from dq.layers.turn import Turn
from dq.plan import Plan, Recipe, TensorPlan
from dq.sampler import routing
from dq.sampler.caches import parts
from dq.trace.calibration import Calibration
from dq.trace.running import Runner, drawing, kept_modes, modules_of, telling

RUNS = 4  # of the pipeline; the paper takes 100, of one number for each layer and step


@dataclass
class Step:
    """One call: changes of its blocks and errors of its layers, by name."""

    changes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


class Record:
    """A Watcher that keeps everything. calls: of each run and each call of a step, the steps in order."""

    def __init__(self):
        self.calls: list[list[Step]] = []
        self.begin()

    def begin(self) -> None:
        self.own: dict[int, list[Step]] = {}

    def turn(self, call: int) -> None:
        if call not in self.own:
            self.own[call] = []
            self.calls.append(self.own[call])
        self.here = Step()
        self.own[call].append(self.here)

    def saw(self, block: str, change: torch.Tensor) -> None:
        self.here.changes[block] = float(change)

    def pairs(self, layer: str, block: str) -> torch.Tensor:
        """(n, 2) fp64: the block's change, and the layer's error in the step after."""
        found = [
            (before.changes[block], after.errors[layer])
            for steps in self.calls
            for before, after in pairwise(steps)
            if block in before.changes and layer in after.errors
        ]
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)


def check(models: Mapping[str, nn.Module], plans: Mapping[str, Plan], recipe: Recipe) -> None:
    """DQError, before any work, where a recipe has a rule that models cannot follow."""
    for part, model in models.items():
        if not routed(model, plans[part], recipe):
            got = f"recipe {recipe.name!r}: no linear in a block has an input of fewer bits than {recipe.late[0]}"
            raise DQError(f"{got}; leave the rule out")
        routing.check(model, plans[part])


def routed(model: nn.Module, plan: Plan, recipe: Recipe) -> dict[str, str]:
    """The block of each layer that gets a rule: linears with inputs of fewer bits. DQError without blocks."""
    if (reason := parts.strange(model)) is not None:
        raise DQError(f"recipe {recipe.name!r}: {reason}, whose changes its rule follows; take a recipe without it")
    blocks, late = parts.blocks(model), TensorPlan.parse(recipe.late[0])
    return {
        name: block
        for name, layer in plan.layers.items()
        if layer.kind == "linear"
        and layer.act is not None
        and layer.act.scale == "dynamic"
        and layer.act.spec.bits < late.spec.bits
        and (block := routing.block_of(name, blocks)) is not None
    }


def find(
    target: Any,
    models: Mapping[str, nn.Module],
    plans: dict[str, Plan],
    packed: Mapping[str, Mapping[str, Any]],
    recipe: Recipe,
    calibration: Calibration,
) -> list[str]:
    """Fit the rules of packed layers that are not in their models yet, in place in plans and layers; -> notes."""
    late, records, blocks = TensorPlan.parse(recipe.late[0]), {}, {}
    with kept_modes(models), aligned(modules_of(target)), torch.no_grad(), ExitStack() as stack:
        for part, model in models.items():
            blocks[part] = routed(model, plans[part], recipe)
            own = {name: packed[part][name] for name in blocks[part]}
            for layer in own.values():
                layer.plan, layer.clock = replace(layer.plan, late=(late,)), Turn()
                layer.bind(layer.stored.device)
            records[part] = stack.enter_context(_recording(model, own, plans[part].timestep))
        _run(target, calibration)
    return [
        _decided(part if len(models) > 1 else "", plans, records[part], packed[part], blocks[part], (part, recipe))
        for part in models
    ]


def _run(target: Any, calibration: Calibration) -> None:
    if isinstance(target, nn.Module):
        assert calibration.forward_loop is not None, "captured with it"
        with drawing(calibration.seed, 0), telling("forward_loop"):
            calibration.forward_loop(target)
        return
    runner = Runner(target, calibration)
    for run in range(RUNS):
        runner.run(run, {}, lambda call: None)


@contextmanager
def _recording(model: nn.Module, own: Mapping[str, Any], timestep: str | None) -> Iterator[Record]:
    """What a full-precision model shows while it runs, and by how much its inputs' first format would be off."""
    record = Record()
    routing.watch(model, record, timestep)
    hooks = [
        naming.at(model, name).register_forward_pre_hook(partial(_compare, record, name, layer))
        for name, layer in own.items()
    ]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
        routing.detach(model)


def _compare(record: Record, name: str, layer: Any, _: nn.Module, given: tuple) -> None:
    outputs = []
    for phase in range(2):
        layer.clock.set(phase)
        outputs.append(layer.forward(given[0]).float())  # it has the hooks of the layer it is to replace
    record.here.errors[name] = float((outputs[0] - outputs[1]).abs().sum() / outputs[1].abs().sum().clamp_min(1e-30))


def _decided(
    shown: str, plans: dict[str, Plan], record: Record, packed: Mapping[str, Any], blocks: Mapping[str, str], of: tuple
) -> str:
    """Put slopes, offsets and the threshold that they need into one plan and its layers; -> a line about them."""
    part, recipe = of
    pairs = {name: record.pairs(name, block) for name, block in blocks.items()}
    pairs = {name: found for name, found in pairs.items() if len(found)}
    if not pairs:
        raise DQError(f"recipe {recipe.name!r}: its rule compares steps, calibration runs have one each; raise steps")
    follow = recipe.options.get("follow", True)
    rules = {name: line(found, follow) for name, found in pairs.items()}
    plan, layers = plans[part], {}
    for name in blocks:
        own = packed[name].plan
        layers[name] = replace(own, route=rules[name]) if name in rules else replace(own, late=())
        packed[name].plan = layers[name]
        packed[name].bind(packed[name].stored.device)
    predicted = {name: pairs[name][:, 0] * slope + offset for name, (slope, offset) in rules.items()}
    firsts = {name: sum(bool(steps) and name in steps[0].errors for steps in record.calls) for name in rules}
    sizes = {name: layers[name].rows * layers[name].columns for name in rules}
    bits = {name: (layers[name].act.spec.bits, layers[name].late[0].spec.bits) for name in rules}
    edge, mean = threshold(predicted, firsts, sizes, bits, recipe.route)
    plans[part] = replace(plan, layers=plan.layers | layers, route=edge)
    typical = median(correlation(found) for found in pairs.values())
    said = (
        f"{f'{shown}: ' if shown else ''}rule of {len(rules)} layers: their errors go with the change of their block "
    )
    return f"{said}({typical:.2f} in the middle); above {edge:.3g} {recipe.late[0]}, {mean:.2f} bits on average"


def line(pairs: torch.Tensor, follow: bool = True) -> tuple[float, float]:
    """(slope, offset) of the least squares of the second column by the first; slope 0 where it is not to follow it."""
    x, y = pairs.unbind(1)
    power = (x - x.mean()).square().sum()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / power) if follow and power > 0 else 0.0
    return _short(slope), _short(float(y.mean()) - slope * float(x.mean()))


def correlation(pairs: torch.Tensor) -> float:
    """Pearson's, 0 where one side does not vary."""
    x, y = (column - column.mean() for column in pairs.unbind(1))
    power = float(x.square().sum().sqrt() * y.square().sum().sqrt())
    return float((x * y).sum()) / power if power > 0 else 0.0


def threshold(
    predicted: Mapping[str, torch.Tensor],
    firsts: Mapping[str, int],
    sizes: Mapping[str, int],
    bits: Mapping[str, tuple[int, int]],
    wanted: float,
) -> tuple[float, float]:
    """(threshold, mean bits) that comes nearest below the wanted mean; predictions above it take the late format.

    predicted  of each layer in all steps but first ones; firsts: how many of those it had, always in the late format
    """
    total = sum(sizes[name] * (len(values) + firsts[name]) for name, values in predicted.items())
    spent = sum(
        sizes[name] * (bits[name][0] * len(values) + bits[name][1] * firsts[name])
        for name, values in predicted.items()
    )
    rows = [
        (float(value), sizes[name] * (bits[name][1] - bits[name][0]))
        for name, values in predicted.items()
        for value in values
    ]
    rows.sort(reverse=True)
    threshold = rows[0][0]
    for at, (_, cost) in enumerate(rows):
        if spent + cost > wanted * total:
            break
        spent += cost
        threshold = rows[at + 1][0] if at + 1 < len(rows) else rows[at][0] - 1.0
    return _short(threshold), spent / total


def _short(value: float) -> float:
    return float(f"{value:.8g}")
