"""Which denoising step is running: a role of the denoiser's writes one index tensor that layers read.

The index is a tensor, not a Python number, so that `torch.compile` makes one graph for all steps; it lives in a plain
shared object, because a buffer shared by modules stops being shared after `.to()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import takeover

ROLE = "clock"


class Clock:
    """The running step bucket of one denoiser.

    edges  (buckets - 1,) rising, fp32, in the model's own timestep units (0-1000, 0-1, inverted)
    index  (1,) int64: bucket of the running step; bucket i holds edges[i-1] <= t < edges[i]
    """

    def __init__(self, edges: tuple[float, ...] = ()):
        self.edges = torch.tensor(edges, dtype=torch.float32)
        self.index = torch.zeros(1, dtype=torch.long)

    def set(self, timestep: torch.Tensor | float) -> None:
        """Move to the bucket of `timestep` (any shape; per-token timesteps are reduced by max, the noisiest token)."""
        value = torch.as_tensor(timestep).detach().float().reshape(-1).amax().reshape(1)
        if self.edges.device != value.device:
            self.edges, self.index = self.edges.to(value.device), self.index.to(value.device)
        self.index.copy_(torch.bucketize(value, self.edges, right=True))

    def to(self, device: torch.device) -> torch.Tensor:
        """The index tensor on `device`."""
        return self.index if self.index.device == device else self.index.to(device)


class _ReadTimestep:
    """The role of a denoiser (see `takeover`): moves the clock, then runs the model."""

    def __init__(self, clock: Clock, name: str, position: int):
        self.clock = clock
        self.name = name
        self.position = position

    def __call__(self, module: nn.Module, inner: Callable, *args, **kwargs):
        if self.name not in kwargs and len(args) <= self.position:
            raise DQError(f"{type(module).__name__} is quantized with per-step scales: pass {self.name!r}")
        self.clock.set(kwargs[self.name] if self.name in kwargs else args[self.position])
        return inner(*args, **kwargs)


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
