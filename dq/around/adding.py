"""What runs around a quantized model, added to a pipeline: found by a recipe's system, kept in the plan, switched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dq import around
from dq.around.runs import Search
from dq.errors import DQError, nearest
from dq.host import mark, ready, scheduling
from dq.model import put_back
from dq.plan import Recipe
from dq.sampler import routing, steps
from dq.sampler.caches import branches
from dq.surroundings import Correction
from dq.trace.calibration import Calibration


def prepared(target: Any, wanted: object, calibration: Calibration | None) -> Search | None:
    """The search that a recipe asks for, None for one without. DQError where there is nothing to correct."""
    if not isinstance(wanted, Recipe) or not wanted.sampler:
        return None
    _refuse(target, wanted.name)
    assert calibration is not None, "asked for by whoever quantizes"
    return _search(target, wanted.sampler, calibration)


def _refuse(target: Any, what: str) -> None:
    if isinstance(target, nn.Module):
        raise DQError(f"recipe {what!r} corrects a scheduler's steps, got a bare model; pass the pipeline")


def _search(target: Any, name: str, calibration: Calibration) -> Search:
    if name not in around.files():
        raise DQError(f"sampler {name[:100]!r} is unknown, {nearest(name[:100], around.files())}")
    return Search(target, name, calibration, around.files()[name].NEEDS_PAIRS or calibration.score is None)


def added(target: Any, search: Search | None, models: Mapping, swap: Callable[[], Mapping]) -> list[str]:
    """Quantize by `swap`, then find what runs around the models and write it into the first one's plan; -> notes.

    models  (model, recipe) by part
    swap    puts every layer in; -> by part the layers that stood there before: on any failure they do again
    """
    if search is not None:
        search.record()
    originals = swap()
    scheduling.follow(target)
    if search is None:
        return []
    try:
        found, said = around.files()[search.name].find(search)
    except BaseException:
        for part, (model, _) in models.items():
            put_back(model, originals[part])
            mark.unmark(model)
        raise
    if found is not None:
        first = next(model for model, recipe in models.values() if getattr(recipe, "sampler", "") == search.name)
        mark.correct(first, found)
        scheduling.follow(target)
    return said


def correct(target: Any, name: str, calibration: Calibration) -> Correction | None:
    """Find corrections of the scheduler's steps for a pipeline as it is, quantized or not, and put them on.

    name         a system of dq/around: "qsched"
    calibration  prompts, steps and the `score` of a run, without which there is nothing to be close to
    -> what was found, None where nothing scores better on prompts held out. It is saved with a quantized pipeline, in
    place of what was found before for this scheduler and number of steps; on another one it stays in this process.
    Raises DQError for a bare model, and for a system that needs the full-precision runs: `dq.quantize` makes those.
    """
    target = ready.unwrapped(target)
    _refuse(target, name)
    search = _search(target, name, calibration)
    if search.paired:
        raise DQError(
            f"{name}: closeness to full precision is judged while quantizing; give calibration a score, or quantize "
            f"by a recipe with +{name}"
        )
    found, _ = around.files()[name].find(search)
    if found is None:
        return None
    models = [part for part in ready.parts_of(target).values() if mark.plan_of(part) is not None]
    if models:
        mark.correct(models[0], found)
        scheduling.follow(target)
    else:
        steps.attach(scheduling.scheduler_of(target), [found])
    return found


def set_cache(target: Any, on: bool) -> None:
    """Turn the caches that a target's plans bring along off, or on again; they stay in the plan.

    Raises DQError for a target without any.
    """
    found = scheduling.cached(target)
    if not found:
        raise DQError(f"cache: {type(target).__name__} has none in its plan; quantize it by a recipe with +interval")
    for model in found:
        branches.switch(model, on)


def set_route(target: Any, on: bool) -> None:
    """Let layers take the first of their two formats in all steps, or follow the rule of their plan again.

    Raises DQError for a target without a rule.
    """
    found = [part for part in ready.parts_of(target).values() if routing.of(part) is not None]
    if not found:
        raise DQError(f"route: {type(target).__name__} has no rule in its plan; quantize it by a recipe with +sixbit")
    for model in found:
        routing.switch(model, on)


def set_sampler(target: Any, on: bool) -> None:
    """Turn the corrections of a pipeline's scheduler off, or on again; they stay in the plan.

    Raises DQError for a target without any.
    """
    scheduling.switch(target, on)
