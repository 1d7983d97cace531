"""Which denoising step is running: a role of the denoiser's writes one index tensor that layers read.

The index is a tensor, not a Python number, so that `torch.compile` makes one graph for all steps; it lives in a plain
shared object, because a buffer shared by modules stops being shared after `.to()`. Every thread has an index of its
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
    """The running step bucket of one denoiser, of each thread that runs it.

    edges  (buckets - 1,) rising, fp32, in the model's own timestep units (0-1000, 0-1, inverted)
    index  (1,) int64: bucket of the step that runs in this thread; bucket i holds edges[i-1] <= t < edges[i]
    A call sets the index before its layers read it and nothing awaits in between: tasks of asyncio are safe as well.
    """

    def __init__(self, edges: tuple[float, ...] = ()):
        self.edges = torch.tensor(edges, dtype=torch.float32)
        self._own = threading.local()
        self._newest = self.index = torch.zeros(1, dtype=torch.long)

    @property
    def index(self) -> torch.Tensor:
        found = getattr(self._own, "index", None)
        if found is None:  # a thread that no call began in, as that of a backward pass, goes on where another was
            self._newest = found = self._own.index = self._newest.clone()
        return found

    @index.setter
    def index(self, value: torch.Tensor) -> None:
        self._own.index = value

    def __getstate__(self) -> dict[str, torch.Tensor]:
        return {"edges": self.edges, "index": self.index}

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.edges, self._own = state["edges"], threading.local()
        self._newest = self.index = state["index"]

    def set(self, timestep: torch.Tensor | float) -> None:
        """Move to the bucket of `timestep` (any shape; per-token timesteps are reduced by max, the noisiest token)."""
        value = _noisiest(timestep)
        if self.edges.device != value.device:
            self.edges = self.edges.to(value.device)
        if self.index.device != value.device:
            self._newest = self.index = self.index.to(value.device)
        self.index.copy_(torch.bucketize(value, self.edges, right=True))

    def found(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """The bucket of `timestep` as a new tensor (1,) on its device; moves nothing."""
        value = _noisiest(timestep)
        return torch.bucketize(value, self.edges.to(value.device), right=True)

    def to(self, device: torch.device) -> torch.Tensor:
        """The index tensor on `device`."""
        index = self.index
        return index if index.device == device else index.to(device)


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
            raise DQError(f"{type(module).__name__} is quantized with per-step scales: pass {self.name!r}")
        timestep = kwargs[self.name] if self.name in kwargs else args[self.position]
        if not torch.compiler.is_compiling():
            self.clock.set(timestep)
            return inner(*args, **kwargs)
        before = self.clock.index  # a traced call writes to no input, which CUDA graphs would refuse to capture
        self.clock.index = self.clock.found(timestep)
        try:
            return inner(*args, **kwargs)
        finally:  # after an error, too: the next call may be one that is not traced
            self.clock.index = before


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
