"""Which denoising step is running: one pre-forward hook on the denoiser writes one index tensor that layers read.

The index is a tensor, not a Python number, so that `torch.compile` makes one graph for all steps; it lives in a plain
shared object, because a buffer shared by modules stops being shared after `.to()`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dq.errors import DQError

HOOK = "dq_clock"


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


class _ReadTimestep(ModelHook):
    def __init__(self, clock: Clock, name: str, position: int):
        super().__init__()
        self.clock = clock
        self.name = name
        self.position = position

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if self.name not in kwargs and len(args) <= self.position:
            raise DQError(f"{type(module).__name__} is quantized with per-step scales: pass {self.name!r}")
        self.clock.set(kwargs[self.name] if self.name in kwargs else args[self.position])
        return args, kwargs


def argument_position(model: nn.Module, argument: str | None) -> int:
    """Position of a forward argument of `model`. DQError when there is none of that name."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if argument not in names:
        raise DQError(f"clock: {type(model).__name__}.forward has no argument {argument!r}, it has {', '.join(names)}")
    return names.index(argument)


def attach(model: nn.Module, clock: Clock, argument: str | None) -> None:
    """Hook `model` so that `clock` follows the forward argument named `argument`.

    Raises DQError when the model's forward has no such argument.
    """
    position = argument_position(model, argument)
    assert argument is not None  # else argument_position raised
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.remove_hook(HOOK, recurse=False)
    registry.register_hook(_ReadTimestep(clock, argument, position), HOOK)


def detach(model: Any) -> None:
    """Remove the clock hook, if there is one."""
    if hasattr(model, "_diffusers_hook"):
        model._diffusers_hook.remove_hook(HOOK, recurse=False)
