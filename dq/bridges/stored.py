"""A weight as somebody else's file holds it: decoded when asked, or its codes as one of dq's formats has them.

Files join what a model keeps apart (q, k, v) and the other way round, always along rows; blocks of codes run along
columns, so rows can be cut and joined without touching a code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dq.errors import DQError
from dq.plan import LayerPlan, TensorPlan

ANEW = "name a recipe that rounds anew, such as int8-weight"


class Stored(ABC):
    """One tensor of a file. shape: decoded; kept: the plan of a layer that holds its codes as they are, or None."""

    shape: tuple[int, ...]
    kept: LayerPlan | None = None

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """Its values, in fp32 or the floating dtype they are stored in."""

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        """The packed tensors of a layer under `kept` but its bias.

        DQError, naming the layer, for codes or scales that no quantizer writes and the format does not hold.
        """
        raise AssertionError(f"{name}: {type(self).__name__} keeps no codes")

    @abstractmethod
    def rows(self, first: int, last: int) -> Stored:
        """Rows first ... last - 1."""

    def release(self) -> None:  # noqa: B027  what lies in memory has nothing to give back
        """Give back the memory that reading took; the file can be read again."""


class Piece(NamedTuple):
    """Rows of a file's tensor that become rows of a model's."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Plain(Stored):
    """Floating-point values as they are."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.values.shape)

    def dense(self) -> torch.Tensor:
        return self.values

    def rows(self, first: int, last: int) -> Plain:
        return Plain(self.values[first:last])

    def release(self) -> None:
        from dq.layers.memory import page_out

        page_out(self.values)


@dataclass(frozen=True)
class Joined(Stored):
    """Rows of several tensors, one below the other; a format is kept where all have it."""

    parts: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def kept(self) -> LayerPlan | None:  # type: ignore[override]
        found = [part.kept for part in self.parts]
        plans = {replace(plan, shape=self.shape) for plan in found if plan is not None}
        return plans.pop() if len(plans) == 1 and None not in found else None

    def dense(self) -> torch.Tensor:
        return torch.cat([part.dense() for part in self.parts])

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        made = [part.packed(name) for part in self.parts]
        return {key: torch.cat([each[key] for each in made]) for key in made[0]}

    def rows(self, first: int, last: int) -> Stored:
        found, start = [], 0
        for part in self.parts:
            low, high = max(first - start, 0), min(last - start, part.shape[0])
            found += [part.rows(low, high)] if low < high else []
            start += part.shape[0]
        return joined(found)

    def release(self) -> None:
        for part in self.parts:
            part.release()


def joined(parts: Sequence[Stored]) -> Stored:
    """One tensor of all rows."""
    return parts[0] if len(parts) == 1 else Joined(tuple(parts))


def linear(form: str, shape: tuple[int, ...], **fields) -> LayerPlan:
    """The plan of a weight-only linear."""
    return LayerPlan("linear", shape, TensorPlan.parse(form), reason="codes of the file", **fields)


def checked_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """Scales of a file in fp32. DQError when they are not finite."""
    scale = scale.float()
    if not scale.isfinite().all():
        raise DQError(f"layer {name!r}: the file holds scales of NaN or Inf; download it again")
    return scale
