"""The role of a cached denoiser: it tells the hooks below which guidance branch a call is of, and when a run begins.

What follows runs is shared with other roles (`dq.sampler.routing`).

Pipelines that name their calls (`cache_context`) are followed. In others the calls at one timestep are numbered: the
same number is the same branch. A run begins where diffusers' `progress_bar` says so (see `dq.host.register`), where a
pipeline ended, and for bare models where the timestep turns back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, HookRegistry, StateManager, _set_cache_context
from torch import nn

from dq.layers import clock, notes, takeover
from dq.sampler import caches

ROLE = "cache"


class Followed:
    """A role that knows where a run is. calls: number of the call at its timestep, the same for the same branch.

    steps  of the run, 0 where nobody told
    """

    def __init__(self, model: nn.Module, timestep: str | None):
        self.on = True
        self.timestep = timestep
        self.position = None if timestep is None else clock.argument_position(model, timestep)
        self.begin()

    def begin(self, steps: int = 0) -> None:
        """Forget where the last run was."""
        self.last: float | None = None
        self.way = 0.0
        self.calls, self.steps = 0, steps

    @torch.compiler.disable
    def move(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Follow the run to a call."""
        value = self._moment(args, kwargs)
        if value is None or value == self.last:
            self.calls += 1
            return
        way = 0.0 if self.last is None else value - self.last
        if way * self.way < 0:
            forget(module)
            way = 0.0
        self.last, self.way, self.calls = value, way or self.way, 0

    def _moment(self, args: tuple, kwargs: dict) -> float | None:
        if self.position is None:
            return None
        given = args[self.position] if self.position < len(args) else None
        value = kwargs.get(self.timestep, given)
        return None if value is None else float(torch.as_tensor(value).detach().float().amax())


class Cached(Followed):
    """The role (see `takeover`). names: of the hooks; text: as the plan says it."""

    def __init__(self, model: nn.Module, text: str, timestep: str | None):
        super().__init__(model, timestep)
        self.text = text
        self.names: list[str] = []

    def __call__(self, module: nn.Module, inner: Callable, *args, **kwargs):
        if not self.on:
            return inner(*args, **kwargs)
        named = _context(module)
        self.move(module, args, kwargs)  # pyright: ignore[reportCallIssue]
        _set_cache_context(module, named or CacheContext(f"call {self.calls}"))
        try:
            return inner(*args, **kwargs)
        finally:
            _set_cache_context(module, named)


def attach(model: Any, text: str, timestep: str | None) -> None:
    """Put a cache on a model. DQError when it does not fit, or when another one is on."""
    detach(model)
    caches.check(model, text)
    role = Cached(model, text, timestep)
    _apply(model, role)
    take(model, ROLE, role)


def take(model: nn.Module, name: str, role: Followed) -> None:
    """Give a model a role that follows its runs, to their ends."""
    takeover.take(model, name, role)  # pyright: ignore[reportArgumentType]
    if not hasattr(type(model), "_reset_stateful_cache"):
        vars(model)["_reset_stateful_cache"] = _Reset(model)


def give_back(model: nn.Module, name: str) -> None:
    """Undo `take`."""
    takeover.give_back(model, name)
    if not _followed(model) and isinstance(vars(model).get("_reset_stateful_cache"), _Reset):
        del vars(model)["_reset_stateful_cache"]


def _followed(model: nn.Module) -> list[Followed]:
    return [role for role in notes.read(model).roles.values() if isinstance(role, Followed)]


class _Reset:
    """What diffusers calls at the end of a run, for models that have no such method."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, recurse: bool = True) -> None:
        forget(self.model)


def _apply(model: nn.Module, role: Cached) -> None:
    kind, value = caches.parse(role.text)
    role.names = kind.apply(model, value)
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


def _remove(model: nn.Module, role: Cached) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in role.names:
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()


def detach(model: Any) -> None:
    """Undo `attach`, if anything."""
    role = of(model)
    if role is None:
        return
    if role.on:
        _remove(model, role)
    give_back(model, ROLE)


def switch(model: nn.Module, on: bool) -> None:
    """Take the hooks of a cached model off, or put them on again."""
    role = of(model)
    assert role is not None, "asked by whoever switches"
    if on != role.on:
        (_apply if on else _remove)(model, role)
        role.on = on
        role.begin()


@contextlib.contextmanager
def during(models: Mapping[str, nn.Module], text: str, timesteps: Mapping[str, str | None]) -> Iterator[None]:
    """A cache on full-precision models inside, where `text` names one; they are as before afterwards."""
    try:
        for part, model in models.items() if text else ():
            attach(model, text, timesteps[part])
        yield
    finally:
        for model in models.values() if text else ():
            detach(model)


def of(model: nn.Module) -> Cached | None:
    """The role of a cached model, None for another."""
    found = notes.read(model).roles.get(ROLE)
    return found if isinstance(found, Cached) else None


def forget(model: nn.Module, steps: int = 0) -> None:
    """Begin a new run, of so many steps where that is known: nothing computed before serves it."""
    for role in _followed(model):
        role.begin(steps)
    if of(model) is not None:
        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)


def _context(model: nn.Module) -> CacheContext | None:
    """What the pipeline has told the hooks of this call, None if nothing."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for child in registry._get_child_registries():
        for hook in child.hooks.values():
            for value in vars(hook).values():
                if isinstance(value, StateManager):
                    return value._context
    return None
