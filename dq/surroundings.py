"""What runs around a model, as a part of its plan: corrections of the scheduler's steps, found for one kind of run.

Nothing here is a tensor: a run has few steps, and what is stored of each is a handful of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from dq.errors import DQError, nearest

MOST_VALUE = 1e4
# names of the values that a kind of correction stores for a step: one number, or one for each channel of the latents
CORRECTIONS: Mapping[str, tuple[str, ...]] = {"scale": ("output", "sample"), "variance": ("gain", "mean")}
Rows = tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Correction:
    """A correction of a scheduler's steps, one of CORRECTIONS; `dq/sampler/corrections` has a file for each.

    scheduler  name of the scheduler's class it was found for
    steps      steps of a run it was found for
    values     by name, a number for every step, or a row of numbers: one a channel
    """

    kind: str
    scheduler: str
    steps: int
    values: Mapping[str, Rows]

    def to_dict(self) -> dict:
        values = {name: [_listed(row) for row in rows] for name, rows in self.values.items()}
        return {"kind": self.kind, "scheduler": self.scheduler, "steps": self.steps, "values": values}

    @classmethod
    def from_dict(cls, data: Mapping) -> Correction:
        """Inverse of `to_dict`, of what the schema let pass. DQError for values that do not fit one another."""
        values = {
            name: tuple(tuple(row) if isinstance(row, Sequence) else row for row in rows)
            for name, rows in data["values"].items()
        }
        found = cls(data["kind"], data["scheduler"], data["steps"], values)
        found.check()
        return found

    def check(self) -> None:
        """DQError unless the values are those of the kind, one for each step, finite and of equal length."""
        if self.kind not in CORRECTIONS:
            raise DQError(f"sampler: kind is {self.kind!r}, {nearest(self.kind, CORRECTIONS)}")
        names = CORRECTIONS[self.kind]
        if set(self.values) != set(names):
            got = ", ".join(sorted(self.values)) or "none"
            raise DQError(f"sampler: values of {self.kind!r} are {got}, expected {' and '.join(names)}")
        for name, rows in self.values.items():
            if len(rows) != self.steps:
                raise DQError(
                    f"sampler: {name} of {self.kind!r} has {len(rows)} values, expected {self.steps}, one a step"
                )
            flat = list(chain.from_iterable(row if isinstance(row, tuple) else (row,) for row in rows))
            if not flat or not all(abs(value) <= MOST_VALUE for value in flat):
                raise DQError(f"sampler: {name} of {self.kind!r} has values beyond {MOST_VALUE:g}, find them anew")
        widths = {len(row) if isinstance(row, tuple) else 0 for rows in self.values.values() for row in rows}
        if len(widths) != 1 or (self.kind == "scale") != (widths == {0}):
            wanted = "one number a step" if self.kind == "scale" else "as many channels in each step"
            raise DQError(f"sampler: values of {self.kind!r} differ in length, expected {wanted}")


def _listed(row: float | tuple[float, ...]) -> float | list[float]:
    return list(row) if isinstance(row, tuple) else row
