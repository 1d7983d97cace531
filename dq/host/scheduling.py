"""The scheduler of a pipeline and the corrections that the plans of its models bring along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from dq.errors import DQError
from dq.host import base, ready
from dq.layers import notes
from dq.plan import Plan
from dq.sampler import caches, corrections, routing, steps
from dq.sampler.caches import branches
from dq.surroundings import Correction


def follow(pipe: Any) -> None:
    """Let the scheduler of a pipeline be corrected as the plans of its models say; without any it is left alone."""
    if isinstance(pipe, nn.Module):
        return
    scheduler, found = scheduler_of(pipe), planned(pipe)
    if found and scheduler is not None:
        steps.attach(scheduler, found)


def scheduler_of(pipe: Any) -> Any:
    """The scheduler that a pipeline steps with, None where there is none."""
    own = vars(pipe).get("scheduler")
    return own if isinstance(own, SchedulerMixin) else None


def planned(pipe: Any) -> list[Correction]:
    """Corrections in the plans of a pipeline's models, each once."""
    return found_in(_plan(part) for part in vars(pipe).values() if isinstance(part, nn.Module))


def found_in(plans: Iterable[Plan | None]) -> list[Correction]:
    """Corrections in some plans, each once."""
    return list({str(each.to_dict()): each for plan in plans if plan is not None for each in plan.sampler}.values())


def release(pipe: Any) -> None:
    """Give the scheduler of a pipeline its own steps back."""
    if not isinstance(pipe, nn.Module):
        steps.detach(scheduler_of(pipe))


def _plan(model: Any) -> Plan | None:
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.plan if isinstance(quantizer, base.QuantizerBase) else notes.read(model).plan


def switch(pipe: Any, on: bool) -> None:
    """Turn the corrections of a pipeline's scheduler on or off. DQError for one without corrections."""
    own = steps.of(scheduler_of(pipe)) if not isinstance(pipe, nn.Module) else None
    if own is None:
        raise DQError(
            f"sampler: {type(pipe).__name__} has no corrected scheduler; quantize a pipeline by a recipe with +qsched"
        )
    own.on = on


def begin(pipe: Any, steps: int = 0) -> None:
    """Tell what follows the runs of a pipeline's models that one begins, and its steps where they are known."""
    for part in vars(pipe).values():
        if isinstance(part, nn.Module):
            branches.forget(part, steps)


def cached(pipe: Any) -> list[nn.Module]:
    """Models of a pipeline, or the one bare model, that have a cache of their plan."""
    return [part for part in ready.parts_of(pipe).values() if branches.of(part) is not None]


def model_lines(model: nn.Module, plan: Plan | None) -> list[str]:
    """Lines for `dq.explain` on what goes on around the layers of one model: its rule, its cache."""
    return [*_route_lines(model), *_cache_lines(model, plan)]


def _cache_lines(model: nn.Module, plan: Plan | None) -> list[str]:
    if plan is None or not plan.cache:
        return []
    role, said = branches.of(model), f"cache {plan.cache}: {caches.line(plan.cache)}"
    return [said if role is not None and role.on else f"{said}; switched off"]


def _route_lines(model: nn.Module) -> list[str]:
    """Whether the rule is followed, and what it came to."""
    role, share = routing.of(model), routing.share(model)
    if role is None:
        return []
    said = [] if share is None else [f"rule: {share:.0%} of the work of its layers so far was in their late format"]
    return said if role.on else [*said, "rule: switched off, all steps take the first format"]


def lines(pipe: Any, found: list[Correction]) -> list[str]:
    """Lines for `dq.explain`: every correction, and whether it applies now."""
    said = [
        f"sampler, {each.scheduler} in {each.steps} steps: {corrections.files()[each.kind].line(each.values)}"
        for each in found
    ]
    if not found or isinstance(pipe, nn.Module):
        return said
    if cached(pipe):
        said.append("order: layers are rounded, then blocks are cached, and what is left corrected last, in the steps")
    own, scheduler = steps.of(scheduler_of(pipe)), type(scheduler_of(pipe)).__name__
    if own is not None and not own.on:
        said.append("sampler: switched off, the scheduler's own steps run")
    elif own is None or scheduler not in {each.scheduler for each in found}:
        said.append(f"sampler: {scheduler} runs without these corrections")
    return said
