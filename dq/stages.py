"""What quantizing does with data: capture what the denoisers see, choose formats under a budget, fit the layers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from dq import families, methods
from dq.budget import search, sensing
from dq.budget.limits import Budget
from dq.budget.search import Search
from dq.fit import walk
from dq.plan import Plan, Recipe
from dq.trace import capture as capturing
from dq.trace.calibration import Calibration
from dq.trace.walk import Trace
from dq.version import __version__


@dataclass
class Stages:
    """What runs on data: capture what the denoisers see, choose each layer's format under a budget, fit.

    Plans are replaced in `plans`; parts that no run calls are taken out of `models` and `plans`.
    """

    target: object
    models: dict[str, nn.Module]
    plans: dict[str, Plan]
    recipe: Recipe
    calibration: Calibration | None
    budget: Budget | None
    progress: bool
    candidates: float | None = field(default=None, init=False)  # tried a layer by a method, on average

    def done(self) -> tuple[dict, dict, list[str]]:
        """-> packed layers and errors by part, notes for the report."""
        self._prepare()
        if self.budget is not None:
            sensing.refuse_impossible(self._subject(), self.budget)
        if self.calibration is None:
            return {}, {}, self._chosen(None)
        with self._captured() as (folder, notes):
            if self.budget is not None:
                notes += self._chosen(folder)
            if not self.recipe.needs_calibration:
                return {}, {}, notes
            packed, errors, more = self._fitted(folder)
            return packed, errors, notes + more

    def explored(self, wish: sensing.Wish) -> Search:
        """What a budget would choose from; nothing is fitted."""
        self._prepare()
        with self._captured() as (folder, _):
            return sensing.find(self._subject(), folder, wish, self.progress)

    def _prepare(self) -> None:
        if self.recipe.needs_calibration:
            for part, model in self.models.items():
                self.plans[part] = methods.prepared(model, self.plans[part], self.recipe)

    @contextmanager
    def _captured(self) -> Iterator[tuple[Path, list[str]]]:
        """The folder of the recorded calls, and a note."""
        assert self.calibration is not None, "asked for by whoever captures"
        with self.calibration.workplace() as folder:
            begun = time.perf_counter()
            named = {part or "model": model for part, model in self.models.items()}
            claim = self.calibration.folder is not None
            silent = capturing.capture(self.target, named, self.calibration, folder, self.progress, claim)
            for part in silent:
                del self.models[part], self.plans[part]
            notes = [f"{part}: {reason}" for part, reason in silent.items()]
            yield folder, [f"captured in {time.perf_counter() - begun:.0f} s", *notes]

    def _subject(self) -> sensing.Subject:
        return sensing.Subject(self.target, self.models, self.plans, self.recipe, self.calibration)

    def _chosen(self, folder: Path | None) -> list[str]:
        """Choose every layer's format; -> notes."""
        begun, budget = time.perf_counter(), self.budget
        if folder is None:
            found = sensing.unseen(self._subject())
        else:
            wish = sensing.Wish(budget.metric, budget.ms_per_step is not None)
            found = sensing.find(self._subject(), folder, wish, self.progress)
        chosen = found.choose(budget)
        self.plans.update(search.plans(found, self.plans, chosen, str(budget)))
        notes = search.summary(found, chosen, budget)
        return [*notes, f"sensitivity and cost measured in {time.perf_counter() - begun:.0f} s"]

    def _fitted(self, folder: Path) -> tuple[dict, dict, list[str]]:
        packed, errors, notes, tried = {}, {}, [], 0
        recipe = self.recipe if self.budget is None else methods.for_budget(self.recipe)
        identity = json.dumps([__version__, recipe.to_dict()], sort_keys=True)
        method = methods.files()[recipe.method]
        for part, model in self.models.items():
            place, family = folder / (part or "model"), families.of(model)
            most = walk.calls_worth(place, method)
            named = {"identity": identity, "most": most, "between": method.NEEDS.between}
            trace = Trace(model, self.plans[part], family, place, self.calibration.seed, **named)
            fitted = walk.walk(trace, method, recipe, self.plans[part].dtype, self.progress)
            self.plans[part] = walk.finish(model, self.plans[part], trace, fitted)
            packed[part], errors[part] = fitted.packed, fitted.error_db
            notes += fitted.notes(trace)
            tried += fitted.tried
        self.candidates = tried / max(sum(map(len, errors.values())), 1)
        return packed, errors, notes
