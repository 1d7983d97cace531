"""From recorded calls to a `Search`: sensitivity by the metric that was asked for, bytes, milliseconds, and a check.

Everything measured goes to the folder of the calls, so that a killed search goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from dq import methods
from dq.budget import choices, cost, sampled, search, sensitivity, trajectory
from dq.budget.limits import OWN, Budget
from dq.budget.predictions import BUCKETS, Predictions
from dq.budget.search import Part, Search
from dq.budget.sensitivity import Errors, Judge
from dq.disk import read_json, write_json
from dq.layers import naming, parameter_bytes
from dq.layers.memory import aligned
from dq.plan import Plan, Recipe
from dq.trace.calibration import Calibration
from dq.trace.records import Store
from dq.trace.running import Runner, kept_modes, modules_of
from dq.trace.world import processes

CALLS = 24  # single calls walked forward and back
JUDGED_CALLS, JUDGED_RUNS = 6, 2  # run again for every changed layer or plan
SAMPLES = 48  # random plans to fit to
SMOOTH_BYTES = 4  # what fitting may add to a layer per input channel


@dataclass(frozen=True)
class Wish:
    """How to measure: metric, thirds, runs and checks (see dq.Budget), whether in milliseconds."""

    metric: str = "trajectory"
    timed: bool = False
    thirds: bool = False
    runs: int = Budget.runs
    checks: int = Budget.checks


@dataclass
class Subject:
    """What is measured: a pipeline or model, its denoisers, their plans under the recipe, and how it is run."""

    target: Any
    models: Mapping[str, nn.Module]
    plans: Mapping[str, Plan]
    recipe: Recipe
    calibration: Calibration | None

    @cached_property
    def menus(self) -> dict[str, dict]:
        return {part: choices.menus(plan, self.recipe) for part, plan in self.plans.items() if part in self.models}

    @cached_property
    def runner(self) -> Runner | None:
        """Runs the pipeline; None for a bare model."""
        return None if isinstance(self.target, nn.Module) else Runner(self.target, self.calibration)

    def dtype(self, part: str) -> torch.dtype:
        return self.plans[part].dtype

    @property
    def start(self) -> choices.Start:
        """Scales that the recipe's method rounds weights with, data or not."""
        return methods.start(self.recipe)

    @property
    def extra(self) -> int:
        """Bytes per input channel that fitting may add."""
        return SMOOTH_BYTES if methods.smooths(self.recipe) else 0


def find(subject: Subject, folder: Path, wish: Wish, progress: bool = True) -> Search:
    """Measure every denoiser's layers on the calls below `folder`. The first process measures, the others read."""
    state, path = processes(), folder / "search.json"
    if state.is_main_process:
        with kept_modes(subject.models), aligned(modules_of(subject.target)):
            write_json(path, _measured(subject, folder, wish, progress).to_dict())
    state.wait_for_everyone()
    return Search.from_dict(read_json(path))


def settled(subject: Subject, budget: Budget, found: Search | None = None) -> Budget:
    """A budget with the recipe's own bits in numbers; those of inputs once multiplications were counted in `found`."""
    if budget.bits == OWN:
        spent = weights = 0
        for part, model in subject.models.items():
            dtype = subject.dtype(part)
            for name, layer in subject.plans[part].layers.items():
                weight: Any = naming.at(model, name).weight
                sized = methods.sized(subject.recipe, layer, weight.element_size())
                spent += search.spent(sized, dtype, subject.extra)
                weights += layer.rows * layer.columns
        budget = replace(budget, bits=8 * spent / max(weights, 1))
    if budget.act_bits == OWN and found is not None:
        rows = found.rows()
        total = sum(choices.act_bits(subject.plans[part].layers[name]) * row.products for part, name, row in rows)
        budget = replace(budget, act_bits=total / max(sum(row.products for *_, row in rows), 1))
    return budget


def refuse_impossible(subject: Subject, budget: Budget) -> None:
    """DQError before anything is measured when not even the smallest formats fit the bytes or bits."""
    if budget.bytes is None and budget.bits is None:
        return
    parts = {}
    for part, menus in subject.menus.items():
        nothing = {name: np.zeros((len(menu), BUCKETS + 1)) for name, menu in menus.items()}
        parts[part] = Part(
            search.measured(subject.plans[part], menus, nothing, {}, subject.dtype(part), subject.extra)
        )
    scope = "pipeline" if budget.scope == "peak" else budget.scope
    least = replace(budget, ms_per_step=None, act_bits=None, scope=scope)
    Search(subject.recipe.name, budget.metric, parts, fixed_bytes(subject, parts, None)).choose(least)


@torch.no_grad()
def unseen(subject: Subject) -> Search:
    """The same without any data: every layer's relative rounding error, as if all layers mattered alike."""
    parts = {}
    for part, model in subject.models.items():
        errors = {}
        for name, menu in subject.menus[part].items():
            if menu[-1] is not None and menu[-1].kind != "stack":
                errors[name] = sensitivity.relative(naming.at(model, name).weight.detach(), menu, subject.start)  # pyright: ignore[reportCallIssue]
        parts[part] = Part(
            search.measured(subject.plans[part], subject.menus[part], errors, {}, subject.dtype(part), subject.extra)
        )
    return Search(subject.recipe.name, "weights alone", parts, fixed_bytes(subject, parts, None))


def _measured(subject: Subject, folder: Path, wish: Wish, progress: bool) -> Search:
    stores = {part: Store(folder / (part or "model")) for part in subject.models}
    metric, errors, trust, runs = _errors(subject, stores, Store(folder / "search"), wish, progress)
    parts = {}
    for part, model in subject.models.items():
        costs, dtype, seen = cost.Costs({}, 0.0, 1.0), subject.dtype(part), Predictions(model, stores[part], 1)
        if wish.timed:
            costs = cost.measure(model, subject.menus[part], seen, subject.plans[part], progress)
        counts = cost.products(model, subject.menus[part], seen)
        known = (subject.plans[part], subject.menus[part], errors[part], costs.ms, dtype, subject.extra, counts)
        rows = search.measured(*known)
        rows = {name: row.by_thirds() for name, row in rows.items()} if wish.thirds else rows
        parts[part] = Part(rows, costs.fixed, costs.calls)
    return Search(subject.recipe.name, metric, parts, fixed_bytes(subject, parts, stores), trust, runs)


def _errors(subject: Subject, stores: Mapping[str, Store], own: Store, wish: Wish, progress: bool) -> tuple:
    """-> the metric that was possible, errors by part, how well every estimator ranks unseen plans, whole runs."""
    metric = wish.metric
    whole = subject.runner is not None and trajectory.possible(subject.runner) is None
    if metric == "trajectory" and not whole:
        metric = "prediction"
    found: dict[str, dict[str, Errors]] = {}
    runs = 0
    if whole and metric in ("trajectory", "sampled"):
        assert subject.runner is not None  # a whole run needs one
        given = subject.runner, subject.models, subject.menus, own, progress, subject.start, wish.runs
        found["trajectory"], runs = trajectory.gradients(*given)
    if metric == "prediction" or not whole:
        found["prediction"] = _each(subject, stores, _predicted, progress)
    if metric == "output":
        found["output"] = _each(subject, stores, _judged, progress)
    base = next(iter(found.values()))
    if metric == "sampled":
        found["sampled"] = _sampled(subject, base, stores, own, whole, progress)
    trust = _checked(subject, found, stores, own, whole, wish.checks, progress) if wish.checks else {}
    return metric, found[metric], trust, runs


def _each(subject: Subject, stores: Mapping[str, Store], measure, progress: bool) -> dict[str, Errors]:
    return {part: measure(subject, part, stores[part], progress) for part in subject.models}


def _predicted(subject: Subject, part: str, store: Store, progress: bool) -> Errors:
    model, seed = subject.models[part], subject.calibration.seed
    few = Predictions(model, store, CALLS)
    return sensitivity.prediction(model, subject.menus[part], few, store, seed, progress, subject.start)


def _judged(subject: Subject, part: str, store: Store, progress: bool) -> Errors:
    model = subject.models[part]
    judge = Predictions(model, store, JUDGED_CALLS)
    return sensitivity.judged(model, subject.menus[part], judge, store, subject.dtype(part), progress, subject.start)


def _judge(subject: Subject, part: str, stores: Mapping[str, Store], whole: bool) -> Judge:
    """The truth that estimators are measured against: the end of whole runs where that is possible."""
    if whole:
        return trajectory.Ends(subject.runner, JUDGED_RUNS)
    return Predictions(subject.models[part], stores[part], JUDGED_CALLS)


def _sampled(subject: Subject, base, stores, own: Store, whole: bool, progress: bool) -> dict[str, Errors]:
    found, seed = {}, subject.calibration.seed if subject.calibration else 0
    for part, model in subject.models.items():
        known = {name: subject.menus[part][name] for name in base[part]}
        drawn = sampled.plans(known, subject.recipe.options.get("plans", SAMPLES), seed)
        judge = _judge(subject, part, stores, whole)
        truth = sampled.scores(model, known, drawn, judge, own, subject.dtype(part), progress, subject.start)
        found[part] = sampled.fitted(base[part], known, drawn, truth)
    return found


def _checked(subject: Subject, found, stores, own: Store, whole: bool, count: int, progress: bool) -> dict[str, float]:
    """By metric: the rank correlation of predicted and measured errors of random plans; the worst part's.

    The predictions are brought to the level of the measured errors on the way: first-order errors are right in
    proportion, and too large where an error cannot grow any more.
    """
    trust: dict[str, float] = {}
    for part, model in subject.models.items():
        known = {name: subject.menus[part][name] for name in next(iter(found.values()))[part]}
        drawn = sampled.plans(known, count, subject.calibration.seed + 1)
        judge = _judge(subject, part, stores, whole)
        truth = sampled.scores(model, known, drawn, judge, own, subject.dtype(part), progress, subject.start)[:, -1]
        for metric, errors in found.items():
            mine = errors[part]
            guesses = np.array([sum(mine[n][c, -1] for n, c in zip(known, plan, strict=True)) for plan in drawn])
            told = (guesses > 0) & (truth > 0)  # weights that lie on a grid already lose nothing in some plans
            if np.ptp(guesses) > 0 and np.ptp(truth) > 0:
                trust[metric] = min(trust.get(metric, 1.0), round(float(spearmanr(guesses, truth).statistic), 4))  # pyright: ignore[reportAttributeAccessIssue]
            level = float(np.exp(np.median(np.log(truth[told] / guesses[told])))) if told.any() else 1.0
            errors[part] = {name: level * table for name, table in mine.items()}
    return trust


def fixed_bytes(subject: Subject, parts: Mapping[str, Part], stores: Mapping[str, Store] | None) -> dict[str, int]:
    """By scope: bytes that stay whatever the layers become."""
    models = subject.models
    planned = sum(_weight(models[part], name) for part, found in parts.items() for name in found.layers)
    everything = [subject.target] if isinstance(subject.target, nn.Module) else subject.target.components.values()
    fixed = {"denoiser": parameter_bytes(*models.values()) - planned}
    fixed["pipeline"] = parameter_bytes(*(part for part in everything if isinstance(part, nn.Module))) - planned
    if stores is not None:
        held = [cost.held_bytes(model, Predictions(model, stores[part], 1)) for part, model in models.items()]
        fixed["peak"] = fixed["pipeline"] + max(held)
    return fixed


def _weight(model: nn.Module, name: str) -> int:
    """Bytes of the weight of a planned layer, or of a stack of experts."""
    owner, key = naming.place(model, name)
    value = owner._parameters.get(key)
    value = owner.get_submodule(key).weight if value is None else value
    return value.numel() * value.element_size()
