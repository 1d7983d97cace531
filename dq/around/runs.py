"""Scored runs of a pipeline: the same prompts and noise again and again, under changing corrections of its scheduler.

Prompts that are texts run in batches; the first half of the runs is searched on, the other half is asked afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dq.errors import DQError
from dq.sampler import steps
from dq.surroundings import Correction
from dq.trace.calibration import Calibration
from dq.trace.running import Runner, drawing, spare_schedulers, telling, tensors_in

BATCH = 16
MOST_RUNS = 64
MOST_DB = 120.0


@dataclass
class Run:
    """What one batch of runs gave.

    steps  latents (runs, channels, ...) after each step of the scheduler
    end    what the pipeline returned: latents, or pictures in [0, 1]
    """

    steps: list[torch.Tensor]
    end: torch.Tensor


@dataclass
class Search:
    """A pipeline, the runs it is tried on, and what a good run is.

    name    the system of dq/around that searches
    paired  whether the full-precision runs are looked at even where the user judges runs
    wanted  Run of the full-precision pipeline for every batch; empty where none was made
    """

    pipe: Any
    name: str
    calibration: Calibration
    paired: bool = True
    wanted: list[Run] = field(default_factory=list)

    def __post_init__(self):
        self.runner = Runner(self.pipe, self.calibration)
        entries = self.calibration.texts()
        count = min(len(entries), MOST_RUNS)
        if count < 2:
            raise DQError(f"sampler: got {count} prompt, expected 2 or more: half of them check what the others found")
        if getattr(self.pipe, "scheduler", None) is None:
            raise DQError(f"sampler: {type(self.pipe).__name__} has no scheduler to correct")
        size = min(BATCH, count // 2) if self._fits_batches(range(count)) else 1
        self.batches = [list(range(count))[first : first + size] for first in range(0, count, size)]
        self.half = len(self.batches) // 2
        self.distinct = 0

    @property
    def scored(self) -> bool:
        """Whether runs are judged by a function of the user's."""
        return self.calibration.score is not None

    def record(self) -> None:
        """Keep the runs of the pipeline as it is now as those that are wanted, if any are."""
        if not (self.paired or not self.scored):
            return
        self.wanted = [self.run(index) for index in range(len(self.batches))]

    def run(
        self, index: int, found: Sequence[Correction] = (), pictures: bool = False, until: int | None = None
    ) -> Run:
        """One batch of runs under some corrections in place of the scheduler's own, to its end or `until` a step."""
        given, latents = self._arguments(index), []
        given |= {"return_dict": False} | ({"output_type": "pt"} if pictures else {})
        name, seed, output = type(self.pipe).__name__, self.calibration.seed, None
        with torch.no_grad(), drawing(seed, index), spare_schedulers(self.pipe), telling(f"{name} (run {index})"):
            steps.detach(self.pipe.scheduler)
            steps.attach(self.pipe.scheduler, found)
            with _watched(self.pipe.scheduler, latents, until), contextlib.suppress(_Enough):
                output = self.pipe(**given)
            self.distinct = len(dict.fromkeys(torch.as_tensor(self.pipe.scheduler.timesteps).tolist()))
        end = next((value for value in tensors_in(output) if value.is_floating_point()), latents[-1])
        return Run(latents, end)

    def score(self, found: Sequence[Correction], held_out: bool = False) -> float:
        """Mean score of half of the runs, higher is better: the user's, else dB to `wanted`, a run at a time.

        A few runs that go another way have most of the squared error of all; their decibels say little.
        """
        span = range(self.half, len(self.batches)) if held_out else range(self.half)
        return sum(self._score(index, found) * len(self.batches[index]) for index in span) / sum(
            len(self.batches[index]) for index in span
        )

    def _score(self, index: int, found: Sequence[Correction]) -> float:
        run = self.run(index, found, pictures=self.scored)
        if self.calibration.score is None:
            return _decibels(run.end, self.wanted[index].end)
        texts = [self._text(number) for number in self.batches[index]]
        value = float(self.calibration.score(run.end.float().clamp(0, 1), texts))
        if value != value or abs(value) == float("inf"):
            raise DQError(f"calibration: score gave {value}, expected a finite number, higher for better pictures")
        return value

    def correction(self, kind: str, values: Mapping[str, Any]) -> Correction:
        """A correction for the scheduler and steps of these runs."""
        return Correction(kind, type(self.pipe.scheduler).__name__, self.distinct, values)

    def _text(self, number: int) -> str:
        entry = self.runner.texts[number % len(self.runner.texts)]
        return str(entry.get("prompt", "")) if isinstance(entry, Mapping) else str(entry)

    def _arguments(self, index: int) -> dict[str, Any]:
        given = [self.runner.arguments(number) for number in self.batches[index]]
        if len(given) == 1:
            return given[0]
        return given[0] | {name: [each[name] for each in given] for name in ("prompt", "generator")}

    def _fits_batches(self, numbers: range) -> bool:
        """Whether prompts can be handed over together: plain texts, and no other argument that is one for each."""
        first = self.runner.arguments(0)
        texts = all(not isinstance(self.runner.texts[number], Mapping) for number in numbers)
        alone = {"negative_prompt", "image", "class_labels", "prompt_2", "latents"} & first.keys()
        return texts and isinstance(first.get("prompt"), str) and "generator" in first and not alone


def _decibels(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """10 log10(sum y^2 / sum (x - y)^2), the mean over runs; at most MOST_DB."""
    x, y = (each.float().flatten(1) for each in (got, wanted))
    power, noise = y.square().sum(1), (x - y).square().sum(1)
    return float((10 * torch.log10(power / noise.clamp_min(1e-30))).clamp(max=MOST_DB).mean())


class _Enough(BaseException):
    """A run has come as far as it is wanted."""


@contextlib.contextmanager
def _watched(scheduler: Any, sink: list[torch.Tensor], until: int | None) -> Iterator[None]:
    """Collect the sample that every step returns; _Enough after step `until`."""
    own = vars(scheduler).get("step")
    step = scheduler.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        sink.append(result[0].detach().clone())
        if until is not None and len(sink) > until:
            raise _Enough
        return result

    watched.__signature__ = inspect.signature(step)
    scheduler.step = watched
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own
