"""The student of a tuning: a denoiser whose quantized layers can be trained, and how far its answers are off.

    e = ŷ - y,   guided: e_u + g (e_c - e_u)

y: what the full-precision model answered to the same call (dq/trace/pairs.py); u, c: its rows without and with text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dq import families
from dq.errors import DQError
from dq.fit.trainable import Trainable
from dq.fit.tune import KNOWN, Tune
from dq.layers import PackedStack, naming
from dq.layers.clock import Clock
from dq.plan import Plan
from dq.trace import units
from dq.trace.pairs import Pair
from dq.trace.running import kept_modes
from dq.trace.units import replaced, tensors_in


@dataclass
class Subject:
    """One denoiser to tune: its full-precision model, its plan, and what its layers were packed into.

    follows  by how much the errors of each step count, 1 on average; none: all alike
    """

    name: str
    model: nn.Module
    plan: Plan
    packed: Mapping[str, nn.Module]
    guidance: float | None = None
    follows: Sequence[float] = ()


class Student:
    """A model whose quantized layers are trainable while `running`; otherwise it is what it was."""

    def __init__(self, subject: Subject, tune: Tune):
        self.subject, self.model = subject, subject.model
        self.aware = tune.aware
        self._teacher: dict[nn.Module, Callable] = {}
        self.clock, self.again = Clock(subject.plan.edges, subject.plan.switch, subject.plan.rising), False
        self.stacks = {n: p for n, p in subject.packed.items() if isinstance(p, PackedStack)}
        self.layers: dict[str, Trainable] = {}
        self.stages: list[dict[str, set[str]]] = [{} for _ in tune.course]
        layers: Mapping[str, Any] = subject.packed
        for name, packed in layers.items():
            if name not in self.stacks:
                packed.clock = self.clock if packed.plan.steps > 1 or packed.plan.late else packed.clock
                for stage, wanted in zip(self.stages, tune.course, strict=True):
                    stage[name] = wanted.of(name, packed.plan.role)
                parts = tuple(part for part in KNOWN if any(part in stage[name] for stage in self.stages))
                self.layers[name] = Trainable(naming.at(self.model, name), packed, parts, tune.rank, tune.full)
        if not any(layer.parameters for layer in self.layers.values()):
            raise DQError(f"tune: {_nothing(subject, tune)}")

    @property
    def groups(self) -> list[tuple[str, str, nn.Parameter, float]]:
        """(layer, part, parameter, what a rate of 1 is) of all trained parameters, in a fixed order."""
        moved = [layer for layer in self.layers.values() if {"weights", "lowrank"} & layer.parameters.keys()]
        mean = sum(layer.step for layer in moved) / max(len(moved), 1)
        found = []
        for name, layer in self.layers.items():
            for part, values in layer.parameters.items():
                alike = part in ("weights", "lowrank") and not self.aware
                times = mean / max(layer.step, 1e-12) if alike else 1.0
                sizes = layer.rates(part)
                found += [(name, part, value, size * times) for value, size in zip(values, sizes, strict=True)]
        return found

    @contextlib.contextmanager
    def running(self, instead: Mapping[str, Callable] | None = None) -> Iterator[None]:
        """The model gives the student's answers inside; `instead`: with other forwards of its layers, by name."""
        own = {name: layer.forward for name, layer in self.layers.items()}
        forwards: dict[nn.Module, Callable] = {
            naming.at(self.model, name): forward for name, forward in (instead or own).items()
        }
        self._teacher = {module: module.forward for module in forwards}
        if self.again:
            blocks = [self.model.get_submodule(n) for n in units.candidates(self.model, families.of(self.model))]
            forwards |= {block: _again(block.forward) for block in blocks if block not in forwards}
        with self.evaluating(), _decoded(self.model, self.stacks), replaced(forwards), frozen([self.model]):
            yield

    @contextlib.contextmanager
    def told(self, names: Sequence[str], teacher: bool = False) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Outputs of layers by name, call after call, of answers given inside; `teacher`: in full precision."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def telling(name: str) -> Callable:
            return lambda module, args, output: found[name].append(output)

        hooks = [naming.at(self.model, name).register_forward_hook(telling(name)) for name in names]
        try:
            with replaced(self._teacher if teacher else {}):
                yield found
        finally:
            for hook in hooks:
                hook.remove()

    def evaluating(self) -> contextlib.AbstractContextManager:
        """The model in evaluation mode inside."""
        return kept_modes({self.subject.name: self.model})

    def answer(self, pair: Pair, short: bool = False) -> Any:
        """What the student answers; `short`: with products in bf16."""
        if pair.timestep is not None:
            self.clock.set(pair.timestep)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=short):
            return self.model(*pair.args, **pair.kwargs)


def within(mine: Mapping[str, list[torch.Tensor]], truth: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
    """Squared error at the outputs of layers as a share of their power, averaged over the layers."""
    shares = []
    for name, outputs in mine.items():
        pairs = [(own.float(), full.float()) for own, full in zip(outputs, truth[name], strict=True)]
        noise = sum((own - full).square().sum() for own, full in pairs)
        shares.append(noise / sum(full.square().sum() for _, full in pairs))
    return torch.stack(shares).mean()


def _nothing(subject: Subject, tune: Tune) -> str:
    """Why there is nothing to train."""
    who = subject.name or type(subject.model).__name__
    if tune.layers:
        return f"no layer of {who} begins with {', '.join(map(repr, tune.layers))} and has {', '.join(tune.parts)}"
    return f"the layers of {who} have nothing of {', '.join(tune.parts)}; expected another part, or no tuning"


def _again(forward: Callable) -> Callable:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient while the block runs."""
    wanted = {value: value.requires_grad for model in models for value in model.parameters()}
    for value in wanted:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value, before in wanted.items():
            value.requires_grad_(before)


@contextlib.contextmanager
def _decoded(model: nn.Module, stacks: Mapping[str, Any]) -> Iterator[None]:
    """Stacked experts hold what their packed bytes stand for: they are run, not trained."""
    before = {}
    try:
        for name, stack in stacks.items():
            own = model.get_parameter(name)
            before[own] = own.data
            own.data = stack.dense_weight().to(own.dtype)
        yield
    finally:
        for own, value in before.items():
            own.data = value


def latents(pair: Pair) -> torch.Tensor | None:
    """The first argument that is a floating tensor of more than two axes."""
    values = (*pair.args, *pair.kwargs.values())
    return next((v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 2), None)


def errors(pair: Pair, output: Any, guidance: float | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(error, truth) fp32 of every floating tensor of an answer; guided where the call holds both halves.

    Channels of a learned variance beside the prediction are left out: samplers drop them.
    """
    found, given = [], latents(pair)
    both = (tensors_in(_plain(tree)) for tree in (output, pair.output))
    for mine, theirs in zip(*both, strict=True):
        if not mine.is_floating_point():
            continue
        if given is not None and mine.dim() == given.dim() and mine.shape[1] == 2 * given.shape[1]:
            mine, theirs = mine[:, : given.shape[1]], theirs[:, : given.shape[1]]
        e, y = mine.float() - theirs.float(), theirs.float()
        found.append((_guided(e, pair.branches, guidance), _guided(y, pair.branches, guidance)))
    return found


def _plain(tree: Any) -> Any:
    return tuple(vars(tree).values()) if hasattr(tree, "__dataclass_fields__") else tree


def _guided(value: torch.Tensor, branches: Sequence[int], guidance: float | None) -> torch.Tensor:
    free, held = ([i for i, each in enumerate(branches) if each == kind] for kind in (1, 0))
    if guidance is None or not free or len(free) != len(held) or len(branches) != len(value):
        return value
    return value[free] + guidance * (value[held] - value[free])


def share(pair: Pair, output: Any, guidance: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error, mean square of the truth), summed over the tensors of an answer."""
    found = errors(pair, output, guidance)
    return sum(e.square().mean() for e, _ in found), sum(y.square().mean() for _, y in found)  # pyright: ignore[reportReturnType]
