"""What quantizing does with data: capture what the denoisers see, choose formats under a budget, fit the layers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from dq import families, methods
from dq.attentionplan import WISHES, Wish
from dq.budget import search, sensing
from dq.budget.limits import Budget
from dq.budget.search import Search
from dq.errors import DQError
from dq.fit import attention, distill, phases, routes, steps, student, walk
from dq.fit.tune import Tune
from dq.host import ready
from dq.layers.memory import aligned
from dq.plan import Plan, Recipe
from dq.sampler.caches import branches
from dq.trace import capture as capturing
from dq.trace import pairs
from dq.trace.calibration import Calibration
from dq.trace.records import Store
from dq.trace.running import kept_modes, modules_of
from dq.trace.walk import Trace
from dq.version import __version__

THIRDS = (1 / 3, 2 / 3)  # shares of the steps between the thirds that sensitivity is measured by


@dataclass
class Stages:
    """What runs on data: capture what the denoisers see, choose each layer's format under a budget, fit.

    Plans are replaced in `plans`; parts that no run calls are taken out of `models` and `plans`.
    budget  of all denoisers together, or one for each by name
    """

    target: object
    models: dict[str, nn.Module]
    plans: dict[str, Plan]
    recipe: Recipe
    calibration: Calibration | None
    budget: Budget | Mapping[str, Budget] | None
    progress: bool
    candidates: float | None = field(default=None, init=False)  # tried a layer by a method, on average

    def done(self) -> tuple[dict, dict, list[str]]:
        """-> packed layers and errors by part, notes for the report."""
        self._prepare()
        for part, budget in self._budgets().items():
            subject = self._subject(part)
            sensing.refuse_impossible(subject, sensing.settled(subject, budget))
        if self.budget is None and not getattr(self.recipe, "method", "") and self._wish is None:
            return {}, {}, []  # there is data for what comes after
        if self.calibration is None:
            return {}, {}, self._chosen(None)
        with self._captured() as (folder, notes):
            if self.budget is not None:
                notes += self._chosen(folder)
            packed, errors, more = self._fitted(folder) if self.recipe.method else ({}, {}, [])
            if self.recipe.route:
                more += routes.find(self.target, self.models, self.plans, packed, self.recipe, self.calibration)
            return packed, errors, [*notes, *more, *self._attending(folder)]

    @property
    def _wish(self) -> Wish | None:
        """What the recipe asks of attention."""
        return WISHES.get(self.recipe.attention) if isinstance(self.recipe, Recipe) else None

    def _attending(self, folder: Path) -> list[str]:
        """Choose what every module's attention is rounded to; -> notes."""
        if self._wish is None:
            return []
        notes = []
        with kept_modes(self.models), aligned(modules_of(self.target)):
            for part, model in self.models.items():
                found, said = attention.chosen(model, self._wish, Store(folder / (part or "model")))
                self.plans[part] = replace(self.plans[part], attention=found)
                notes += _named(part if len(self.models) > 1 else None, [said])
        return notes

    def tuned(self, wish: Tune, packed: dict[str, dict], errors: dict[str, dict], notes: list[str]) -> dict[str, dict]:
        """Tune what the denoisers' layers were packed into, in place in `packed`, and note it; -> figures by part.

        errors  of tuned layers are taken out: they were those of other weights
        """
        assert self.calibration is not None, "asked for with whatever is tuned"
        begun, found = time.perf_counter(), {}
        seconds, seed = 60 * wish.minutes, self.calibration.seed
        with self.calibration.workplace() as folder, ready.eager():
            named = {part or "model": model for part, model in self.models.items()}
            length = pairs.Length(wish.runs, seconds / 6)
            stores = pairs.record(self.target, named, self.calibration, folder, length, self.progress)
            guidance = pairs.guidance(self.target, self.calibration)
            follows: list[float] = []
            if wish.loss == "ends":
                follows = steps.kept(next(iter(stores.values())), self.target, named, self.calibration)
                notes += [] if follows else ["tuned with all steps alike: no gradient passes through a run"]
            for done, (part, model) in enumerate(self.models.items()):
                store, several = stores[part or "model"], part if len(self.models) > 1 else None
                if not store.keys(pairs.HEAD):
                    notes += _named(several, ["not tuned, as no run called it"])
                    continue
                subject = student.Subject(part, model, self.plans[part], packed[part], guidance, follows)
                left = (seconds - (time.perf_counter() - begun)) / (len(self.models) - done)
                outcome, said = distill.tune(subject, store, wish, seed, self.progress, left)
                errors[part] |= dict.fromkeys(outcome.changed)
                packed[part], found[part or "model"] = outcome.packed, outcome.figures()
                notes += _named(several, [outcome.note(), said])
        return found

    def explored(self, wish: sensing.Wish) -> Search:
        """What a budget would choose from; nothing is fitted."""
        self._prepare()
        with self._captured() as (folder, _):
            return sensing.find(self._subject(), folder, wish, self.progress)

    def _prepare(self) -> None:
        self._check_budgets()
        if self.recipe.method:
            for part, model in self.models.items():
                self.plans[part] = methods.prepared(model, self.plans[part], self.recipe)
        if self.recipe.route:
            routes.check(self.models, self.plans, self.recipe)

    @contextmanager
    def _captured(self) -> Iterator[tuple[Path, list[str]]]:
        """The folder of the recorded calls, and a note."""
        assert self.calibration is not None, "asked for by whoever captures"
        with self.calibration.workplace() as folder:
            begun = time.perf_counter()
            named = {part or "model": model for part, model in self.models.items()}
            claim = self.calibration.folder is not None
            with branches.during(self.models, self.recipe.cache, {k: plan.timestep for k, plan in self.plans.items()}):
                given = (self.target, named, self.calibration, folder)
                silent = capturing.capture(*given, self.progress, claim, self.recipe.cache)
            for part in silent:
                del self.models[part], self.plans[part]
            notes = [f"{part}: {reason}" for part, reason in silent.items()]
            yield folder, [f"captured in {time.perf_counter() - begun:.0f} s", *notes]

    def _subject(self, part: str | None = None) -> sensing.Subject:
        """What is measured, of one denoiser alone where one is named."""
        models = self.models if part is None else {part: self.models[part]}
        plans = {name: self.plans[name] for name in models}
        return sensing.Subject(self.target, models, plans, self.recipe, self.calibration)

    def _budgets(self) -> dict[str | None, Budget]:
        """Every budget by the denoiser it is of, None: of all together."""
        if not isinstance(self.budget, Mapping):
            return {} if self.budget is None else {None: self.budget}
        return {part: budget for part, budget in self.budget.items() if part in self.models}

    def _check_budgets(self) -> None:
        """DQError for budgets by denoiser that are not of these denoisers, or that one search cannot serve."""
        if not isinstance(self.budget, Mapping):
            return
        if self.budget.keys() != self.models.keys():
            got, names = ", ".join(self.budget) or "nothing", ", ".join(self.models)
            raise DQError(f"budget: got limits of {got}, expected one for each of {names}, or one for all")
        if any(budget.scope != "denoiser" for budget in self.budget.values()):
            raise DQError("budget: limits by denoiser count its own parameters; expected scope='denoiser' in each")
        if len({budget.thirds for budget in self.budget.values()}) > 1:
            raise DQError("budget: thirds are of a whole run; expected them in the limits of each denoiser or of none")
        if len(metrics := {budget.metric for budget in self.budget.values()}) > 1:
            raise DQError(f"budget: got metrics {', '.join(sorted(metrics))}, expected the same in each")

    def _chosen(self, folder: Path | None) -> list[str]:
        """Choose every layer's format; -> notes."""
        begun, budgets = time.perf_counter(), self._budgets()
        if folder is None:
            found = sensing.unseen(self._subject())
        else:
            metric = next(iter(budgets.values())).metric
            timed = any(budget.ms_per_step is not None for budget in budgets.values())
            thirds = any(budget.thirds for budget in budgets.values())
            most = (max(getattr(budget, name) for budget in budgets.values()) for name in ("runs", "checks"))
            wish = sensing.Wish(metric, timed, thirds, *most)
            found = sensing.find(self._subject(), folder, wish, self.progress)
        notes = []
        for part, budget in budgets.items():
            mine = found if part is None else self._alone(found, part)
            budget = sensing.settled(self._subject(part), budget, mine)
            chosen = mine.choose(budget)
            self.plans.update(search.plans(mine, self.plans, chosen, str(budget)))
            notes += _named(part, search.summary(mine, chosen, budget))
        if folder is not None and any(budget.thirds for budget in budgets.values()):
            for part, schedule in phases.schedules(self._folders(folder), "budget of thirds", THIRDS).items():
                self.plans[part] = phases.switched(self.plans[part], schedule)
        return [*notes, f"sensitivity and cost measured in {time.perf_counter() - begun:.0f} s"]

    def _folders(self, folder: Path) -> dict[str, Path]:
        """Where the calls of each denoiser are recorded."""
        return {part: folder / (part or "model") for part in self.models}

    def _alone(self, found: Search, part: str) -> Search:
        """What was measured of one denoiser, with the bytes of that one."""
        parts = {part: found.parts[part]}
        return replace(found, parts=parts, fixed_bytes=sensing.fixed_bytes(self._subject(part), parts, None))

    def _fitted(self, folder: Path) -> tuple[dict, dict, list[str]]:
        packed, errors, notes, tried = {}, {}, [], 0
        recipe = self.recipe if self.budget is None else methods.for_budget(self.recipe)
        schedule = phases.schedules(self._folders(folder), f"recipe {recipe.name!r}", recipe.switch)
        identity = json.dumps([__version__, recipe.to_dict()], sort_keys=True)
        method = methods.files()[recipe.method]
        for part, model in self.models.items():
            place, family = folder / (part or "model"), families.of(model)
            self.plans[part] = phases.planned(self.plans[part], recipe, schedule[part])
            most = walk.calls_worth(place, method)
            named = {"identity": identity, "most": most, "between": method.NEEDS.between}
            trace = Trace(model, self.plans[part], family, place, self.calibration.seed, **named)
            fitted = walk.walk(trace, method, recipe, self.plans[part].dtype, self.progress)
            self.plans[part] = walk.finish(model, self.plans[part], trace, fitted)
            packed[part], errors[part] = fitted.packed, fitted.error_db
            several = part if len(self.models) > 1 else None
            notes += _named(several, [trace.said, *fitted.notes(trace)] if several else fitted.notes(trace))
            tried += fitted.tried
        self.candidates = tried / max(sum(map(len, errors.values())), 1)
        return packed, errors, notes


def _named(part: str | None, lines: list[str]) -> list[str]:
    """Lines of a report, of one denoiser where one is named."""
    return lines if part is None else [f"{part}: {line}" for line in lines]
