"""A rule in place of ranges of steps: how much a block changed decides its layers' input formats in the next step.

    Gamma_s = |out_s - in_s|_1 / |in_s|_1            of a block in step s
    late format in step s   where   slope Gamma_(s-1) + offset > threshold      slope, offset of each layer

The router of 6Bit-Diffusion (arXiv 2603.18742): the left side predicts the error that the first, narrower format makes
at the layer's output; slope and offset are fitted by `dq.fit.routes`. A block whose last step is not known takes the
late format: in the first step of a run, and in the first one that is computed after a cache left it out. What decides
was computed in the step before, so that a card is waited for once a step. A batch is decided on as a whole, and each
call of a step (guidance) by what was seen in the same call of the step before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import notes, packed_layers, takeover
from dq.layers.turn import Turn
from dq.plan import Plan
from dq.sampler.caches import branches, parts

ROLE = "route"


class Watcher(Protocol):
    """Who is told of the blocks of a model: when a run begins, which call of a step follows, how a block changed."""

    def begin(self) -> None: ...

    def turn(self, call: int) -> None: ...

    def saw(self, block: str, change: torch.Tensor) -> None: ...


class Routed(branches.Followed):
    """The role of the denoiser (see `takeover`)."""

    def __init__(self, model: nn.Module, watcher: Watcher, timestep: str | None):
        self.watcher = watcher
        super().__init__(model, timestep)

    def begin(self, steps: int = 0) -> None:
        super().begin(steps)
        self.watcher.begin()

    def __call__(self, module: nn.Module, inner: Callable, *args, **kwargs):
        if self.on:
            self.move(module, args, kwargs)  # pyright: ignore[reportCallIssue]
            self._turn()  # pyright: ignore[reportCallIssue]
        return inner(*args, **kwargs)

    @torch.compiler.disable
    def _turn(self) -> None:
        self.watcher.turn(self.calls)


class _Watched:
    """The role of a block: measures by how much it changes what goes through it."""

    def __init__(self, model: Routed, name: str, block: nn.Module):
        self.model, self.name, self.ends = model, name, parts.Ends(block)

    def __call__(self, module: nn.Module, inner: Callable, *args, **kwargs):
        output = inner(*args, **kwargs)
        if self.model.on:
            self._see(args, kwargs, output)  # pyright: ignore[reportCallIssue]
        return output

    @torch.compiler.disable
    @torch.no_grad()
    def _see(self, args: tuple, kwargs: dict, output: Any) -> None:
        before, after = self.ends.before(args, kwargs)[0].float(), self.ends.after(output)[0].float()
        self.model.watcher.saw(self.name, (after - before).abs().sum() / before.abs().sum().clamp_min(1e-30))


class Rule(NamedTuple):
    """Of one layer. size: its weights, the share that it has in the mean of bits."""

    turn: Turn
    slope: float
    offset: float
    size: int


class Router:
    """Decides, at the beginning of each call, which format every layer with a rule takes in it.

    late, total  sizes of the layers that ran in the late format, and of all that ran, since it was made
    """

    def __init__(self, rules: Mapping[str, list[Rule]], threshold: float):
        self.rules, self.threshold = rules, threshold
        self.late = self.total = 0
        self.begin()

    def begin(self) -> None:
        """A run begins: nothing is known of its blocks."""
        self.known: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        self.here: dict[str, torch.Tensor] = {}

    def turn(self, call: int) -> None:
        """Decide for a call of a step, by what the same call of the step before has shown."""
        changes = parts.read(self.known[call])
        for block, rules in self.rules.items():
            change = changes.get(block)
            for rule in rules:
                wide = change is None or rule.slope * change + rule.offset > self.threshold
                rule.turn.set(int(wide))
        self.known[call] = self.here = {}

    def saw(self, block: str, change: torch.Tensor) -> None:
        """A block ran."""
        self.here[block] = change
        for rule in self.rules.get(block, ()):
            self.late += rule.size * rule.turn.now
            self.total += rule.size

    def rest(self) -> None:
        """The first format for all, from now on."""
        for rule in (rule for rules in self.rules.values() for rule in rules):
            rule.turn.set(0)


def block_of(layer: str, blocks: Mapping[str, nn.Module]) -> str | None:
    """Name of the block that a layer stands in, None for one outside."""
    return next((block for block in blocks if layer.startswith(f"{block}.")), None)


def check(model: nn.Module, plan: Plan) -> None:
    """DQError when the rule of a plan cannot be followed in a model."""
    if (reason := parts.strange(model)) is not None:
        raise DQError(f"route: {reason}; a rule follows their change, take a recipe without it")
    if plan.timestep is None:
        raise DQError(f"route: {type(model).__name__} is called without a timestep, by which a rule follows its runs")
    blocks = parts.blocks(model)
    if outside := next(
        (name for name, row in plan.layers.items() if row.late and block_of(name, blocks) is None), None
    ):
        raise DQError(f"layer {outside!r}: route is for layers in transformer blocks, this one stands outside")


def attach(model: nn.Module, plan: Plan) -> None:
    """Let the layers of a packed model follow the rule of its plan."""
    assert plan.route is not None, "asked for by who has one"
    check(model, plan)
    blocks, rules = parts.blocks(model), defaultdict(list)
    for name, layer in packed_layers(model).items():
        if layer.plan.route:
            own: Any = layer
            own.clock = Turn(1)
            slope, offset = layer.plan.route
            rules[block_of(name, blocks)].append(Rule(own.clock, slope, offset, layer.plan.rows * layer.plan.columns))
    watch(model, Router(dict(rules), plan.route), plan.timestep)


def watch(model: nn.Module, watcher: Watcher, timestep: str | None) -> None:
    """Tell somebody of the blocks of a model as it runs."""
    role = Routed(model, watcher, timestep)
    for name, block in parts.blocks(model).items():
        takeover.take(block, ROLE, _Watched(role, name, block))
    branches.take(model, ROLE, role)


def detach(model: nn.Module) -> None:
    """Undo `attach` or `watch`, if anything."""
    if of(model) is not None:
        for block in parts.blocks(model).values():
            takeover.give_back(block, ROLE)
        branches.give_back(model, ROLE)


def of(model: nn.Module) -> Routed | None:
    """The role of a model whose blocks are watched, None for another."""
    found = notes.read(model).roles.get(ROLE)
    return found if isinstance(found, Routed) else None


def switch(model: nn.Module, on: bool) -> None:
    """Take the first format in all steps, or follow the rule again."""
    role = of(model)
    assert role is not None, "asked by whoever switches"
    if on != role.on:
        role.on = on
        role.begin()
        assert isinstance(role.watcher, Router)
        role.watcher.rest()


def share(model: nn.Module) -> float | None:
    """Share of the work of layers with a rule that was done in their late format, None where none was done."""
    role = of(model)
    watcher = role.watcher if role is not None else None
    return watcher.late / watcher.total if isinstance(watcher, Router) and watcher.total else None
