"""A scheduler whose `step` is corrected: an attribute of the one instance, so that all else of it stays its own.

Class, config, `from_config`, saving and copies are as before; a copy keeps the corrections. Steps are told apart by
the distinct timesteps of the run, as in `dq.trace`: both calls of a second-order step have the values of that step,
and a run that begins in the middle (image to image) those of the steps it does.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dq.errors import DQError
from dq.sampler import corrections
from dq.surroundings import Correction


class CorrectedStep:
    """Stands for the `step` of one scheduler. What it does not fit runs as it is, with one warning.

    on  whether corrections apply; off, the stock step runs
    """

    def __init__(self, scheduler: Any, found: Sequence[Correction]):
        self.scheduler = scheduler
        self.below: Callable | None = vars(scheduler).get("step")
        self.corrections = tuple(found)
        self.on = True
        self.warned = ""
        self.__signature__ = inspect.signature(scheduler.step)
        self._run: tuple[Any, Any] | None = None

    def __call__(self, *args, **kwargs):
        step = self.below or type(self.scheduler).step.__get__(self.scheduler)
        values = self._values() if self.on else []
        if not values:
            return step(*args, **kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        given = bound.arguments
        kinds = corrections.files()
        own = [(kinds[kind], self._row(rows, given)) for kind, rows in values]
        for kind, row in own:
            if hasattr(kind, "before"):
                given["model_output"], given["sample"] = kind.before(row, given["model_output"], given["sample"])
        result = step(*bound.args, **bound.kwargs)
        for kind, row in own:
            if hasattr(kind, "after"):
                result = _replaced(result, lambda sample, kind=kind, row=row: kind.after(row, sample))
        return result

    def fitting(self) -> list[Correction]:
        """The corrections for this scheduler and the number of steps it is set to."""
        steps, name = len(self._distinct()), type(self.scheduler).__name__
        return [each for each in self.corrections if (each.scheduler, each.steps) == (name, steps)]

    def why_not(self) -> str:
        """Why none of the corrections applies to the run the scheduler is set to, in one line; "" if one does."""
        name, steps = type(self.scheduler).__name__, len(self._distinct())
        if self.fitting():
            return ""
        found = ", ".join(sorted({f"{each.scheduler} in {each.steps} steps" for each in self.corrections}))
        return f"corrections were found for {found}; {name} in {steps} steps runs without them"

    def _distinct(self) -> list[float]:
        given = getattr(self.scheduler, "timesteps", None)
        return [] if given is None else list(dict.fromkeys(torch.as_tensor(given).tolist()))

    def _values(self) -> list[tuple[str, dict[str, Any]]]:
        """(kind, values by name (steps, ...)) of what fits; looked up once a run: the timesteps are a tensor of it."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if self._run is None or self._run[0] is not timesteps:
            moments = torch.tensor(self._distinct(), dtype=torch.float64)
            found = [(each.kind, _tables(each)) for each in self.fitting()]
            self._run = timesteps, (moments, found)
            if not found and (reason := self.why_not()) != self.warned:
                self.warned = reason
                warnings.warn(reason, stacklevel=4)
        return self._run[1][1]

    def _row(self, rows: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Values of the running step on the sample's device, without waiting for it."""
        sample, timestep = given["sample"], given["timestep"]
        assert self._run is not None
        moments = self._run[1][0]
        if not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu":
            moment = float(torch.as_tensor(timestep).double().reshape(-1).amax())
            index = int((moments - moment).abs().argmin())
            return {name: table[index].to(sample.device) for name, table in rows.items()}
        if sample.device != moments.device:
            moments = moments.to(sample.device)
        index = (moments - timestep.double().reshape(-1).amax()).abs().argmin().reshape(1)
        return {name: table.to(sample.device).index_select(0, index)[0] for name, table in rows.items()}

    def __deepcopy__(self, memo: dict) -> CorrectedStep:
        made = object.__new__(type(self))
        memo[id(self)] = made
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_run"})
        made._run = None
        return made


def _tables(found: Correction) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float32) for name, rows in found.values.items()}


def attach(scheduler: Any, found: Sequence[Correction]) -> None:
    """Correct the steps of a scheduler; what was attached before is replaced. DQError for one that has no `step`."""
    before = of(scheduler)
    if before is not None and before.corrections == tuple(found):
        return
    detach(scheduler)
    if not found:
        return
    names = inspect.signature(scheduler.step).parameters if hasattr(scheduler, "step") else ()
    if not {"model_output", "timestep", "sample"} <= set(names):
        raise DQError(f"sampler: {type(scheduler).__name__} has no step(model_output, timestep, sample) to correct")
    scheduler.step = CorrectedStep(scheduler, found)


def detach(scheduler: Any) -> None:
    """Undo `attach`; another scheduler stays as it is."""
    own = of(scheduler)
    if own is not None:
        if own.below is None:
            del scheduler.step
        else:
            scheduler.step = own.below


def of(scheduler: Any) -> CorrectedStep | None:
    """What corrects the steps of a scheduler, None if nothing does."""
    own = getattr(scheduler, "__dict__", {}).get("step")
    return own if isinstance(own, CorrectedStep) else None


def _replaced(result: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What a step returned with its sample changed."""
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    result.prev_sample = change(result.prev_sample)
    return result
