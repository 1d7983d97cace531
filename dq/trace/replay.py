"""Runs a model up to one of its units, on recorded calls, with stored outputs in place of the units before.

The model's own forward runs with every earlier unit replaced by a stub, and stops when the wanted unit is called: only
the glue between units (norms, skips, concatenations) is computed again, whatever way the model connects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import naming
from dq.layers.clock import Clock
from dq.trace import units
from dq.trace.records import Store
from dq.trace.seen import Unit
from dq.trace.units import Hollow, Laid, Layout, map_tree

ABSENT = object()  # a unit that a call did not reach


class _Reached(BaseException):
    """Ends a run of the model at the wanted unit; not an Exception, so that no model swallows it."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


class Replay:
    """A model whose units can be run one at a time, as it was (stream `full`) or after quantized units (`hat`).

    units  in execution order
    clock  shows the step bucket of the running call to layers with a table
    """

    units: list[Unit]
    clock: Clock
    _layout: Layout
    _calls: list[str]  # keys of the calls in the store
    _differs: list[bool]  # per finished unit: whether its output under `hat` is another one
    _shapes: dict[int, dict[int, Any]]  # per observed unit: outputs unlike the first call's as Hollows, None if absent

    def __init__(self, model: nn.Module, store: Store):
        self.model, self._store = model, store
        self._home = next((value.device for value in model.parameters()), torch.device("cpu"))
        self._modules = list(model.modules())

    def _put(self, stream: str, index: int, call: int, output: Any) -> None:
        self._store.write(entry(stream, index, call), map_tree(output, Laid.of))

    def _get(self, stream: str, index: int, call: int) -> Any:
        return map_tree(self._store.read(entry(stream, index, call), self._home), Laid.restored, Laid)

    def _inputs(self, index: int, stream: str) -> Iterator[tuple[int, tuple[tuple, dict]]]:
        for call in range(len(self._calls)):
            given = self._reach(index, stream, call, lambda args, kwargs: (args, kwargs))
            if given is not ABSENT:
                yield call, given

    @torch.no_grad()
    def _reach(self, index: int, stream: str, call: int, visit: Callable | None) -> Any:
        """visit(args, kwargs) of unit `index` in one call; the model's output if `index` is past the last unit."""
        tree = self._store.read(self._calls[call], self._home, kind="call")
        feeds = self._layout.feeds[index] if index < len(self.units) else self._layout.ends

        def stop(*args, **kwargs):
            raise _Reached(visit(args, kwargs))

        def passed(*args, **kwargs):
            raise _Reached(ABSENT)

        forwards = {unit.module: self._stub(j, stream, call, j in feeds) for j, unit in enumerate(self.units[:index])}
        forwards |= {unit.module: passed for unit in self.units[index:]}
        if index < len(self.units):
            forwards[self.units[index].module] = stop
        try:
            with units.replaced(forwards), self._evaluating():
                output = self.model(*tree["args"], **tree["kwargs"])
        except _Reached as reached:
            return reached.value
        return output if index == len(self.units) else ABSENT

    def _stub(self, index: int, stream: str, call: int, needed: bool) -> Callable:
        """Stands for a finished unit in one call; where its value does not matter, zeros of the same shape do."""
        known, used = self._shapes[index], []

        def forward(*args, **kwargs):
            if used or known.get(call, True) is None:
                name, times = self.units[index].name, "twice" if used else "in another order"
                raise DQError(f"unit {name!r} is called {times} in call {call}, unlike in the first one; keep it")
            used.append(True)
            if needed:
                kept = stream if self._differs[index] else "full"
                return self._get(kept, index, call)
            return map_tree(known.get(call, self._layout.outputs[index]), Hollow.zeros, Hollow)

        return forward

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def _swapped(self, unit: Unit, packed: Mapping[str, nn.Module]) -> Iterator[Callable]:
        """Put packed layers in the place of a unit's own for a while; gives the function that runs the unit."""
        own = {}
        for name, layer in packed.items():
            if name not in unit.layers:
                raise DQError(
                    f"unit {unit.name!r} has no planned layer {name!r}, expected some of {list(unit.layers)}"
                )
            plan: Any = layer.plan
            if plan.steps > 1 or plan.late:
                layer.clock = self.clock
            if name != unit.name:
                own[naming.place(unit.module, name.removeprefix(f"{unit.name}."))] = layer
        before = {place: place[0]._modules[place[1]] for place in own}
        try:
            for (parent, leaf), layer in own.items():
                parent._modules[leaf] = layer
            yield packed.get(unit.name, unit.module.forward)
        finally:
            for (parent, leaf), layer in before.items():
                parent._modules[leaf] = layer


def entry(stream: str, index: int, call: int | None = None) -> str:
    """Name of a unit's stored output in one call, or what all of them begin with."""
    return f"{stream}/{index:03}/" + ("" if call is None else f"{call:05}")
