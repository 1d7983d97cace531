"""The kernels of one packed layer: bound outside of traced code, looked up in every call.

A layer keeps what serves it by device, each card of a process by itself, by wanted backend, and for each phase of a
run in which its input is rounded to another format. It chooses again when
its model moved to another device, after `set_backend`, and when it was loaded, copied or unpickled; a call only looks
up what was chosen for its dtype and class of rows, and the first one of a class has it measured (`dq.kernels.choice`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq import kernels
from dq.kernels import Choice, Conv, Tensors, choice
from dq.layers import hadamard
from dq.plan import LayerPlan

Met = tuple[torch.dtype, int, int]

_layers: weakref.WeakSet[Served] = weakref.WeakSet()
_adding = threading.Lock()


class Served(nn.Module):
    """What a packed layer knows of its kernels. `_allocate` of the layer calls `_unbind`."""

    op: str
    plan: LayerPlan
    compute_dtype: torch.dtype
    wide: bool
    backend: str | None
    stored: nn.Parameter
    scale: torch.Tensor
    clock: Any
    tensors: Callable[[], Tensors]
    _raw: Callable[[], Tensors]
    _conv: Callable[[], Conv | None]

    def _unbind(self) -> None:
        self._choice: Any = None  # of the rows it met that are most, else by rank; in the first phase
        self._later: tuple[Choice, ...] = ()  # the same in the later ones
        self._bound: Any = None  # (device, wanted backend) that all the others are for
        self._turns: tuple[torch.Tensor, ...] = ()
        self._met: dict[Met, Choice] = {}  # by dtype and class of rows of the calls it had, and phase
        self._known: dict[Met, Choice] = {}  # what was measured before, for calls that cannot
        self._captured = False  # whether a graph of a card reads the weights where they lie
        self._measures = False  # whether what was measured decides, and not `_choice` alone

    def bind(self, device: torch.device | str) -> Choice:
        """Choose kernels for a device, among those of the layer's backend if it has one of its own."""
        device = kernels.placed(device)
        with _adding:
            _layers.add(self)
        self._place(device)
        self._met, self._known, self._measures = {}, {}, choice.measures(device.type, self.backend)
        found, *later = [self._typical(device, phase) for phase in range(1 + len(self.plan.late))]
        self._choice, self._later = found, tuple(later)
        self._bound = (device, self.backend or kernels.selected())  # last: another thread that reads it runs the rest
        self._settle(found, device)
        return found

    def _typical(self, device: torch.device, phase: int) -> Choice:
        """The kernel of typical calls of a phase; takes up what was measured of it before."""
        classes = [self._problem(device, self._dtype, klass, phase) for klass in range(len(choice.TYPICAL))]
        for each in classes:
            if choice.is_known(each, self.backend):
                self._known[each.dtype, each.klass, phase] = choice.known(each, self.backend)
        typical = classes[choice.typical_klass(self.plan)]
        return self._known.get((typical.dtype, typical.klass, phase)) or choice.known(typical, self.backend)

    def _order(self) -> Tensors:
        """What a backend may lay, as it lies."""
        return Tensors(self._parameters["weight"], self._parameters["scale"])  # pyright: ignore[reportArgumentType]

    def _restore(self) -> None:
        """Weight and scales in dq's own order, in the Parameters themselves."""
        if kernels.is_laid(self._order()):
            found = kernels.restored(self._order())
            self.stored.data, self.scale.data = found.weight, found.scale

    def _settle(self, found: Choice, device: torch.device) -> None:
        """Weight and scales in the order that the kernel reads, in place of any other."""
        here = self.stored.device.type == device.type != "meta" and kernels.machine() is None
        if found.lays and here and not self.plan.late:  # else kernels of other phases read them as well
            wanted = kernels.laid(found.backend, self._order())
            self.stored.data, self.scale.data = wanted.weight, wanted.scale
        else:
            self._restore()

    def _place(self, device: torch.device) -> None:
        """The rotation on the card of the layer's weights, or else on `device`: in fp32 and in its inputs' dtype."""
        at, order = self.stored.device, self.plan.rotate
        place = at if at.type == device.type else device
        dtypes = (torch.float32, self._dtype) if order else ()
        self._turns = tuple(hadamard.placed(order, place, dtype) for dtype in dtypes)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the inputs that a kernel gets in a typical call."""
        return torch.float32 if self.wide else self.compute_dtype

    def ready(self, device: torch.device) -> Choice:
        """The kernel of the layer's most rows; bound anew where the device or the wanted backend is another one."""
        if self._bound != (device, self.backend or kernels.selected()):
            return _outside(self, device) if torch.compiler.is_compiling() else self.bind(device)  # pyright: ignore[reportCallIssue]
        return self._choice

    def serve(self, x: torch.Tensor, phase: int = 0) -> Choice:
        """The kernel for x in a phase of a run, on its device."""
        found = self.ready(x.device)
        if phase:
            found = self._later[phase - 1]
        if not self._measures:
            return found
        key = (x.dtype, choice.klass_of(x, self.op), phase)
        met = self._met.get(key)
        if met is not None:
            return met
        if torch.compiler.is_compiling():
            return self._known.get(key, found)
        if not choice.may_measure(x):
            self._captured = self._captured or choice.captured(x)
            return self._known.get(key, found)
        return self.meet(x.device, *key)

    def product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        """The kernel chosen for the running phase on a transformed x: round, multiply, branch, bias, GELU if asked."""
        if not self.plan.late:
            return self._multiplied(x, gelu)
        if torch.compiler.is_compiling():
            return self._switched(x, gelu)
        return self._multiplied(x, gelu, self.clock.now)

    def _multiplied(self, x: torch.Tensor, gelu: bool, phase: int = 0) -> torch.Tensor:
        choice = self.serve(x, phase)
        if gelu and choice.gelu is not None:
            return choice.gelu(x, self.tensors())
        y = choice.run(x, self._raw() if choice.lays else self.tensors())
        return F.gelu(y, approximate="tanh") if gelu else y

    def _switched(self, x: torch.Tensor, gelu: bool, first: int = 0) -> torch.Tensor:
        """The product of the running phase, `first` or a later one: all are in the graph, the phase tensor decides."""
        if first == len(self.plan.late):
            return self._multiplied(x, gelu, first)
        now = self.clock.phase_on(x.device)[0] <= first
        return torch.cond(
            now, lambda z: self._multiplied(z, gelu, first), lambda z: self._switched(z, gelu, first + 1), (x,)
        )

    def meet(self, device: torch.device, dtype: torch.dtype, klass: int, phase: int = 0) -> Choice:
        """The kernel for a class of rows in a phase, measured where it was not yet."""
        first = not self._met
        found = choice.meet(self._problem(device, dtype, klass, phase), self.tensors(), self.backend)
        self._met = self._met | {(dtype, klass, phase): found}  # a new one: another thread may be reading
        most = self._met.get((*self.busiest, phase), found)
        if phase:
            self._later = tuple(most if at == phase else other for at, other in enumerate(self._later, 1))
        else:
            self._choice = most
        if first and not self._captured:  # later, one may have been that reads the weights where they are
            self._settle(found, device)
        return found

    def meet_typical(self) -> Choice:
        """The kernel of the layer where it runs, measured if it never did and its weights are there."""
        found = self.ready(self.home)
        if not self._measures or not choice.may_measure(self.stored.data):
            return found
        for phase in range(1 + len(self.plan.late)):
            if all(met[2] != phase for met in self._met):
                self.meet(self.stored.device, *self.busiest, phase)
        return self._choice

    def meet_as(self, plan: LayerPlan) -> Choice:
        """What would serve the layer's weights under another plan, for the calls it has; measured if it never was."""
        return choice.meet(replace(self.problem, plan=plan), self.tensors()._replace(act_scale=None), self.backend)

    @property
    def problem(self) -> choice.Problem:
        """The layer and the busiest of its calls, where its weights are."""
        return self._problem(self.stored.device, *self.busiest)

    @property
    def busiest(self) -> tuple[torch.dtype, int]:
        """Dtype and class of the rows that are most in the calls it had, else those of a typical call."""
        typical = (self._dtype, choice.typical_klass(self.plan), 0)
        return max(self._met, key=lambda met: met[1], default=typical)[:2]

    @property
    def home(self) -> torch.device:
        """The device that the layer runs on: where it ran, while its weights are offloaded; else theirs."""
        bound = self._bound
        return bound[0] if bound is not None and (self._met or self.stored.is_meta) else self.stored.device

    @property
    def choice(self) -> Choice:
        """The kernel that serves the layer where it runs."""
        return self.ready(self.home)

    @property
    def choices(self) -> list[Choice]:
        """The kernels of all phases, of which `choice` is the first."""
        return [self.choice, *self._later]

    def _problem(self, device: torch.device, dtype: torch.dtype, klass: int, phase: int = 0) -> choice.Problem:
        return choice.Problem(self.op, self.plan.phases[phase], self._conv(), device, dtype, klass)

    def _apply(self, fn: Callable, recurse: bool = True):
        super()._apply(fn, recurse)
        self._choose_again()
        return self

    def _choose_again(self) -> None:
        """Bind where the weights are now, unless they have no data there."""
        if self._bound is not None and not self.stored.is_meta:
            self.ready(self.stored.device)
            self._place(self.stored.device)  # offloading hooks move them within one type, too

    def __getstate__(self) -> dict:
        """Without its kernels, which are chosen anew where it is used: a pickled layer goes to other machines."""
        fresh = {"_choice": None, "_later": (), "_bound": None, "_turns": (), "_met": {}, "_known": {}}
        return super().__getstate__() | fresh

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not self.stored.is_meta:
            self.bind(self.stored.device)


@torch.compiler.disable(reason="a packed layer's weights went to another device; run the model there once, uncompiled")
def _outside(layer: Served, device: torch.device) -> Choice:
    """`bind`, which cannot be traced: nobody ran or moved the layer since it was put on another device."""
    return layer.bind(device)


def choose_again() -> None:
    """Let every layer choose again: the process's backend is another one."""
    with _adding:
        layers = list(_layers)
    for layer in layers:
        layer._choose_again()
