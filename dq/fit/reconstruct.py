"""Train what a unit's layers are rounded with on the unit's own output, and keep it only if unseen calls gain too.

    minimise_theta  sum_calls sum_k |f_k(hat; theta) - y_k|^2 / |y_k|^2  +  penalty(theta)

f is the unit with drafts in place of its layers, fed with inputs that already carry the error of the units before; y_k
(any shape) are the floating tensors that the full-precision unit gave on full-precision inputs. theta is whatever the
caller wants trained: AdaRound variables, activation scales, biases. Block reconstruction as in BRECQ (arXiv
2102.05426) and Q-Diffusion (2302.04304); those train for 20 000 steps, here a few hundred larger ones from a better
start, and a fifth of the calls is held out to decide whether the result is used at all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from dq.fit.adaround import Rounding
from dq.fit.drafts import DraftLinear
from dq.layers.clock import Clock
from dq.trace.seen import Seen, Unit, UnitCall


@dataclass(frozen=True)
class Settings:
    """How to train. steps of Adam with cosine decay from `lr`, each over `batch` calls.

    held   share of the calls that is held out (at least one, unless there is only one call)
    most   calls kept in memory, spread evenly over all of them
    """

    steps: int = 200
    lr: float = 1e-2
    batch: int = 2
    held: float = 0.2
    most: int = 64
    stream: str = "hat"


@dataclass(frozen=True)
class Outcome:
    """Relative squared output error on the held-out calls, and whether the trained state was kept."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before


def reconstruct(
    unit: Unit,
    seen: Seen,
    drafts: Mapping[str, DraftLinear],
    parameters: Sequence[torch.Tensor] | Sequence[dict],
    settings: Settings = Settings(),
    learning: Learning | None = None,
) -> Outcome:
    """Train `parameters` (tensors, or Adam's groups) of the drafts of a unit; they are restored unless it helped.

    drafts    by full layer name; layers of the unit without one stay in full precision
    learning  what else happens: penalty, switching between a soft and a hard form
    The unit's module is not changed. Deterministic: order and held-out calls come from `seen.seed`.
    """
    learning = learning or Learning()
    module, clock = assembled(unit, drafts)
    calls = load(seen, settings, _device(module))
    train, held = divide(calls, settings.held, seen.seed)
    tensors = [t for group in parameters for t in (group["params"] if isinstance(group, dict) else (group,))]
    saved = [t.detach().clone() for t in tensors]
    before = measure(module, clock, held)
    with only(tensors, module):
        learning.soften()
        _train(module, clock, train, parameters, settings, learning, seen.seed, max(before, 1e-30))
        learning.harden()
    outcome = Outcome(before, measure(module, clock, held))
    if not outcome.kept:
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.data.copy_(value)
        learning.undo()
    return outcome


class Learning:
    """What surrounds training: a penalty, and a soft form that is trained in place of the hard one."""

    def penalty(self, progress: float) -> torch.Tensor | float:
        """Added to a step's loss, which is in units of the error before training; progress runs from 0 to 1."""
        return 0.0

    def soften(self) -> None:
        """Before training."""

    def harden(self) -> None:
        """After training, before the held-out calls decide."""

    def undo(self) -> None:
        """The trained state is dropped."""


def assembled(unit: Unit, drafts: Mapping[str, DraftLinear]) -> tuple[nn.Module, Clock]:
    """A copy of the unit with drafts in place of its layers (whose weights are not copied), and the drafts' clock."""
    clock = Clock()
    for draft in drafts.values():
        draft.clock = clock
    memo: dict[int, Any] = {id(unit.layer(name)): draft for name, draft in drafts.items()}
    return copy.deepcopy(unit.module, memo).eval(), clock


def load(seen: Seen, settings: Settings, device: torch.device) -> list[UnitCall]:
    """At most `settings.most` calls, evenly spread, on `device`."""
    picked: list[UnitCall] = []
    stride = 1
    for index, call in enumerate(seen.calls(settings.stream)):  # read once: how many there are is not known
        if index % stride == 0:
            picked.append(call)
        if len(picked) > settings.most:
            picked, stride = picked[::2], 2 * stride
    moved = [send_to_device((call.args, call.kwargs, call.output), device) for call in picked]
    pairs = zip(moved, picked, strict=True)
    return [UnitCall(args, kwargs, output, call.bucket, call.phase) for (args, kwargs, output), call in pairs]


def divide(calls: Sequence[UnitCall], held: float, seed: int) -> tuple[list[UnitCall], list[UnitCall]]:
    """-> (calls to train on, calls to judge by), drawn at random from `seed`; one call is used for both."""
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(held * len(calls)))
    if len(calls) < 2:
        return list(calls), list(calls)
    return [calls[i] for i in sorted(order[count:])], [calls[i] for i in sorted(order[:count])]


def error(output: Any, target: Any) -> torch.Tensor:
    """sum_k |output_k - target_k|^2 / |target_k|^2 over the floating tensors of two outputs of equal structure."""
    pairs = zip(floating(output), floating(target), strict=True)
    return sum((o.float() - t.float()).square().mean() / t.float().square().mean().clamp(min=1e-12) for o, t in pairs)


def floating(tree: Any) -> Iterator[torch.Tensor]:
    """The floating tensors of a tensor, tuple, list, dict or model output, in order."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point() and tree.numel():
            yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from floating(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from floating(value)
    elif hasattr(tree, "__dataclass_fields__"):
        yield from floating(vars(tree))


def run(module: nn.Module, clock: Clock, call: UnitCall) -> torch.Tensor:
    """The error of one call."""
    clock.index.fill_(call.bucket)
    clock.now_at(call.phase)
    return error(module(*call.args, **call.kwargs), call.output)


@torch.no_grad()
def measure(module: nn.Module, clock: Clock, calls: Iterable[UnitCall]) -> float:
    """Mean error over calls; infinite if it is not a number."""
    value = float(torch.stack([run(module, clock, call) for call in calls]).double().mean())
    return value if math.isfinite(value) else math.inf


def _train(module, clock, calls, parameters, settings: Settings, learning: Learning, seed: int, unit: float) -> None:
    """unit: the error that counts as 1, so that the optimizer's and the penalty's constants fit every module."""
    adam = torch.optim.Adam(parameters, lr=settings.lr, eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, settings.steps), eta_min=0.1 * settings.lr)
    order = _endless(len(calls), seed)
    for step in range(settings.steps):
        adam.zero_grad()
        for _ in range(settings.batch):
            (run(module, clock, calls[next(order)]) / (unit * settings.batch)).backward()
        penalty = learning.penalty(step / settings.steps)
        if isinstance(penalty, torch.Tensor):
            penalty.backward()
        adam.step()
        schedule.step()


def _endless(count: int, seed: int) -> Iterator[int]:
    """Indices below `count`, each once per round, shuffled anew every round."""
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def only(tensors: Sequence[torch.Tensor], module: nn.Module):
    """Gradients for these tensors alone, on even where the caller has switched them off."""
    flags = {p: p.requires_grad for p in (*module.parameters(), *tensors)}
    for parameter in flags:
        parameter.requires_grad_(False)
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


class AdaRound(Learning):
    """Learned rounding of several drafts at once, from where their weights are rounded now.

    drafts   by name, their `weight` on the grid of their `scales`
    targets  what each weight (rows, columns) was before rounding: the side to which it may still go
    strength of the penalty: how much error, in units of that before training, a wholly undecided weight costs
    scale_aware  as in Rounding
    """

    def __init__(
        self,
        drafts: Mapping[str, DraftLinear],
        targets: Mapping[str, torch.Tensor],
        strength: float = 1e4,
        scale_aware: bool = False,
    ):
        self.drafts, self.strength = dict(drafts), strength
        self.roundings = {name: _around(draft, targets[name], scale_aware) for name, draft in self.drafts.items()}
        self.saved = {name: draft.weight.data.clone() for name, draft in self.drafts.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [rounding.choice for rounding in self.roundings.values()]

    def penalty(self, progress: float) -> torch.Tensor | float:
        """None for the first fifth; then beta falls from 20 to 2, as published."""
        if progress < 0.2 or not self.roundings:
            return 0.0
        beta = 20 - 18 * (progress - 0.2) / 0.8
        count = sum(choice.numel() for choice in self.parameters)
        return self.strength / count * sum(rounding.regulariser(beta) for rounding in self.roundings.values())

    def soften(self) -> None:
        for name, draft in self.drafts.items():
            draft.soft = _soft(self.roundings[name], draft)

    def harden(self) -> None:
        for name, draft in self.drafts.items():
            draft.soft = None
            draft.weight.data.copy_(self.roundings[name].hard().reshape(draft.plan.shape))

    def undo(self) -> None:
        for name, draft in self.drafts.items():
            draft.weight.data.copy_(self.saved[name])


def _soft(rounding: Rounding, draft: DraftLinear) -> Callable[[], torch.Tensor]:
    return lambda: rounding.soft().reshape(draft.plan.shape)


@torch.no_grad()
def _around(draft: DraftLinear, target: torch.Tensor, scale_aware: bool) -> Rounding:
    """A rounding that is at the draft's own weight now and may step to the grid point on the target's side of it."""
    assert draft.scales is not None  # as whoever made the draft's weight fitted them
    held = draft.weight.data.reshape(draft.plan.rows, -1)
    return Rounding(target, draft.plan, draft.scales, held, scale_aware)
