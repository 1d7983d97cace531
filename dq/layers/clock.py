"""Which denoising step is running: a role of the denoiser's writes index tensors that layers read.

An index is a tensor, not a Python number, so that `torch.compile` makes one graph for all steps; it lives in a plain
shared object, because a buffer shared by modules stops being shared after `.to()`. Every thread has indices of its
own: a server runs one model for several requests at once, each at another step.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import takeover

ROLE = "clock"


class Clock:
    """The running step bucket and phase of one denoiser, of each thread that runs it.

    edges  (buckets - 1,) rising, fp32, in the model's own timestep units (0-1000, 0-1, inverted)
    switch (phases - 1,) rising, fp32, likewise; rising: as in Plan, else phases are counted from the largest timestep
    index  (1,) int64: bucket of the step that runs in this thread; bucket i holds edges[i-1] <= t < edges[i]
    phase  (1,) int64: its phase, 0 at the beginning of a run
    A call sets both before its layers read them and nothing awaits in between: tasks of asyncio are safe as well.
    """

    def __init__(self, edges: tuple[float, ...] = (), switch: tuple[float, ...] = (), rising: bool = False):
        self.edges = torch.tensor(edges, dtype=torch.float32)
        self.switch, self.rising = torch.tensor(sorted(switch), dtype=torch.float32), rising
        self._own = threading.local()
        self._newest = self.here = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)

    @property
    def here(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(index, phase) of this thread."""
        found = getattr(self._own, "here", None)
        if found is None:  # a thread that no call began in, as that of a backward pass, goes on where another was
            index, phase = self._newest
            self._newest = found = self._own.here = index.clone(), phase.clone()
        return found

    @here.setter
    def here(self, value: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._own.here, self._own.now = value, None

    @property
    def index(self) -> torch.Tensor:
        return self.here[0]

    @property
    def phase(self) -> torch.Tensor:
        return self.here[1]

    @property
    def now(self) -> int:
        """The phase as a number, for calls that are not traced: a card is waited for once a step."""
        found = getattr(self._own, "now", None)
        if found is None:
            self._own.now = found = int(self.phase)
        return found

    def __getstate__(self) -> dict:
        return {"edges": self.edges, "switch": self.switch, "rising": self.rising, "here": self.here}

    def __setstate__(self, state: dict) -> None:
        self.edges, self.switch, self.rising = state["edges"], state["switch"], state["rising"]
        self._own = threading.local()
        self._newest = self.here = state["here"]

    def set(self, timestep: torch.Tensor | float) -> None:
        """Move to the step of `timestep` (any shape; per-token timesteps are reduced by max, the noisiest token)."""
        value = _noisiest(timestep)
        if self.edges.device != value.device:
            self.edges, self.switch = self.edges.to(value.device), self.switch.to(value.device)
        if self.index.device != value.device:
            self._newest = self.here = self.index.to(value.device), self.phase.to(value.device)
        index, phase = self.here
        index.copy_(torch.bucketize(value, self.edges, right=True))
        if len(self.switch):
            phase.copy_(self._phase(value))
            self._own.now = None

    def found(self, timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """Bucket and phase of `timestep` as new tensors (1,) on its device; moves nothing."""
        value = _noisiest(timestep)
        return torch.bucketize(value, self.edges.to(value.device), right=True), self._phase(value)

    def _phase(self, value: torch.Tensor) -> torch.Tensor:
        place = torch.bucketize(value, self.switch.to(value.device), right=True)
        return place if self.rising else len(self.switch) - place

    def now_at(self, phase: int) -> None:
        """Move to a phase, by its number."""
        self.phase.fill_(phase)
        self._own.now = phase

    def to(self, device: torch.device) -> torch.Tensor:
        """The index tensor on `device`."""
        return _moved(self.index, device)

    def phase_on(self, device: torch.device) -> torch.Tensor:
        """The phase tensor on `device`."""
        return _moved(self.phase, device)


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value if value.device == device else value.to(device)


def _noisiest(timestep: torch.Tensor | float) -> torch.Tensor:
    """(1,) fp32."""
    return torch.as_tensor(timestep).detach().float().reshape(-1).amax().reshape(1)


class _ReadTimestep:
    """The role of a denoiser (see `takeover`): moves the clock, then runs the model."""

    def __init__(self, clock: Clock, name: str, position: int):
        self.clock = clock
        self.name = name
        self.position = position

    def __call__(self, module: nn.Module, inner: Callable, *args, **kwargs):
        if self.name not in kwargs and len(args) <= self.position:
            raise DQError(f"{type(module).__name__} is quantized by step: pass {self.name!r}")
        timestep = kwargs[self.name] if self.name in kwargs else args[self.position]
        if not torch.compiler.is_compiling():
            self.clock.set(timestep)
            return inner(*args, **kwargs)
        before = self.clock.here  # a traced call writes to no input, which CUDA graphs would refuse to capture
        self.clock.here = self.clock.found(timestep)
        try:
            return inner(*args, **kwargs)
        finally:  # after an error, too: the next call may be one that is not traced
            self.clock.here = before


def argument_position(model: nn.Module, argument: str | None) -> int:
    """Position of a forward argument of `model`. DQError when there is none of that name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if argument not in names:
        raise DQError(f"clock: {type(model).__name__}.forward has no argument {argument!r}, it has {', '.join(names)}")
    return names.index(argument)


def attach(model: nn.Module, clock: Clock, argument: str | None) -> None:
    """Let `model` run so that `clock` follows the forward argument named `argument`.

    Raises DQError when the model's forward has no such argument.
    """
    position = argument_position(model, argument)
    assert argument is not None  # else argument_position raised
    detach(model)
    takeover.take(model, ROLE, _ReadTimestep(clock, argument, position))


def detach(model: nn.Module) -> None:
    """Remove what `attach` did, if anything."""
    takeover.give_back(model, ROLE)
