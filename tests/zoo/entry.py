"""The record that describes one denoiser class, and the random tensors its dummy inputs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Entry:
    """A small configuration of one denoiser class with inputs that fit it.

    `inputs(generator, dtype)` gives the keyword arguments of `forward` for a batch of 2. `timesteps` names the
    arguments that carry the noise level (the first one is the main one; empty where the class has none). `bf16` is
    False where the class cannot run in bfloat16 at all, and `note` then says why. `eager` asks to run the class with
    torch.compile turned off. `gains` scale the random parameters whose names start with the given text.
    """

    name: str
    config: dict
    inputs: Callable[[torch.Generator, torch.dtype], dict]
    kind: str
    modality: str
    timesteps: tuple[str, ...] = ("timestep",)
    bf16: bool = True
    eager: bool = False
    note: str = ""
    gains: dict[str, float] = field(default_factory=dict)


class Draw:
    """Random tensors from one generator, in the order they are asked for, for a batch of 2."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        """Draws from `generator`; floating tensors come out in `dtype`."""
        self.generator, self.dtype = generator, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard normal of the given shape in the model's dtype (drawn in float32, so dtypes agree)."""
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def below(self, high: int, *shape: int) -> torch.Tensor:
        """Integers in [0, high) of the given shape, int64."""
        return torch.randint(0, high, shape, generator=self.generator)

    def steps(self, scale: float = 1000.0) -> torch.Tensor:
        """(2,) float32 timesteps inside (0, scale), exact in bfloat16 and so after a multiplication by 1000."""
        return torch.tensor([0.5, 0.125]) * scale

    def integer_steps(self) -> torch.Tensor:
        """(2,) int64 timesteps below 1000."""
        return torch.tensor([500, 125])


def ids(frames: int, height: int, width: int, axes: int = 3) -> torch.Tensor:
    """(frames·height·width, axes) float32 positions; the last three columns are frame, row and column."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij"), -1)
    grid = grid.reshape(-1, 3).float()
    return torch.nn.functional.pad(grid, (axes - 3, 0))


def register(entries: dict[str, Entry], name: str, config: dict, modality: str, **more) -> Callable:
    """Decorator: files the decorated `inputs(draw)` under the class name `name` in `entries`."""

    def add(make: Callable[[Draw], dict]) -> Callable[[Draw], dict]:
        """Files `make` and gives it back unchanged."""
        kind = more.pop("kind", "transformer")
        inputs = lambda generator, dtype: make(Draw(generator, dtype))  # noqa: E731
        entries[name] = Entry(name, config, inputs, kind, modality, **more)
        return make

    return add
