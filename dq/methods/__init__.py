"""Published methods, one file each, found by listing this folder; `dq.fit.walk` applies one to a traced model.

A method file exports
    NEEDS            seen.Needs: what the trace records for it
    RECIPES          tuple of Recipe whose `method` is the file's name
    fit(unit, seen, options) -> {layer name: draft}      drafts of the unit's planned layers; draft.plan is final
    FEW_CALLS        optional: True when a part of many large calls will do
    prepare(model, plan, family, options) -> Plan        optional: changes the plan before anything is recorded
    smooths(options) -> bool                             optional: False when no layer can gain a smoothing vector
    start(weight (rows, columns), plan) -> scales        optional: of each part, what weights are rounded with while a
                                                         budget chooses their formats; else those of their range
    branch_rank(plan, options, element_bytes) -> int     optional: of a branch whose numbers have so many bytes
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import cache
from types import ModuleType

from torch import nn

from dq import families
from dq.plan import LayerPlan, Plan, Recipe


@cache
def files() -> dict[str, ModuleType]:
    """Method modules by name."""
    names = sorted(item.name for item in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


@cache
def recipes() -> dict[str, Recipe]:
    """Every method's recipes by name."""
    return {recipe.name: recipe for module in files().values() for recipe in module.RECIPES}


def prepared(model: nn.Module, plan: Plan, recipe: Recipe) -> Plan:
    """The plan after the method had its say: input splits, stored scales."""
    change = getattr(files()[recipe.method], "prepare", None)
    return plan if change is None else change(model, plan, families.of(model), recipe.options)


def smooths(recipe: Recipe) -> bool:
    """Whether fitting may give layers a smoothing vector, which a budget then leaves room for."""
    may = getattr(files()[recipe.method], "smooths", None) if recipe.method else None
    return bool(recipe.method) and (may is None or may(recipe.options))


def start(recipe: Recipe):
    """What a method rounds weights with before it has seen data; None: scales of their range."""
    return getattr(files()[recipe.method], "start", None) if recipe.method else None


def sized(recipe: Recipe, layer: LayerPlan, element_bytes: int) -> LayerPlan:
    """A layer's plan with the rank that fitting gives its branch; `element_bytes`: of a number of the branch."""
    ranked = getattr(files()[recipe.method], "branch_rank", None) if recipe.method else None
    return layer if ranked is None else replace(layer, rank=ranked(layer, recipe.options, element_bytes))


def for_budget(recipe: Recipe) -> Recipe:
    """The recipe as it fits layers whose plans, ranks of branches included, were chosen beforehand."""
    return replace(recipe, options={**recipe.options, "rank": None}) if "rank" in recipe.options else recipe
