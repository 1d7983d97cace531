"""`DQConfig`: the `quantization_config` of a model, for diffusers and transformers alike."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from dq.errors import DQError, nearest
from dq.plan import COMPUTE, Plan, Recipe
from dq.schema import shown

OVERRIDES = {field.name for field in dataclasses.fields(Recipe)} - {
    *("name", "keep", "method", "options", "status", "sampler", "late", "switch", "route")
}


class DQMethod(str, enum.Enum):  # noqa: UP042 - a StrEnum prints differently in the host's messages
    """What the host libraries call `quant_method`."""

    DQ = "dq"


class DQConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """The `quantization_config` of a model, for diffusers and transformers alike.

    recipe         a data-free recipe: its name, a Recipe, or the path of a plan or recipe JSON
    keep           patterns, matched from the start of layer names, left in full precision
    plan           a Plan (or its JSON form); set by saving, then the recipe is not looked at
    compute_dtype  dtype of everything that is not packed when loading names none, e.g. "bfloat16"
    kwargs         fields of Recipe to override: linear, conv, modulation, edge
    Raises DQError for an unknown recipe or keyword, with the nearest known name.
    """

    def __init__(self, recipe="int8", keep=None, plan=None, compute_dtype=None, **kwargs):
        self.quant_method = DQMethod.DQ
        kwargs.pop("quant_method", None)
        for key in kwargs:
            if key not in OVERRIDES:
                known = OVERRIDES | {"recipe", "keep", "plan", "compute_dtype"}
                raise DQError(f"DQConfig: unknown keyword {key!r}, {nearest(key, known)}")
        if not isinstance(recipe, str | Path | dict | Recipe | Plan) or not isinstance(plan, dict | Plan | None):
            raise DQError(f"DQConfig: recipe is {shown(recipe)} and plan {shown(plan)}, expected a name and none")
        if not isinstance(keep, str | None) and not all(isinstance(each, str) for each in _listed(keep)):
            raise DQError(f"DQConfig: keep is {shown(keep)}, expected patterns of layer names")
        self.recipe = Recipe.from_dict(recipe) if isinstance(recipe, dict) else recipe
        self.keep = [keep] if isinstance(keep, str) else list(keep or ())
        self.overrides = kwargs
        self.plan = Plan.from_dict(plan) if isinstance(plan, dict) else plan
        self.compute_dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
        if self.compute_dtype not in (None, *COMPUTE):
            got = f"DQConfig: compute_dtype is {self.compute_dtype[:100]!r}"
            raise DQError(f"{got}, {nearest(self.compute_dtype[:100], COMPUTE)}")
        if self.plan is None:
            self.resolve()

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """What a file says. DQError for one without a plan that names another file: it may lie anywhere."""
        recipe = config_dict.get("recipe", "int8")
        if config_dict.get("plan") is None and not isinstance(recipe, dict | Recipe | Plan):
            from dq import cookbook  # as in `resolve`

            if recipe not in cookbook.names():
                raise DQError(f"quantization_config has no plan, and recipe {shown(recipe)}; save the model again")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def resolve(self) -> Recipe | Plan:
        """The recipe with its overrides, or the plan when the recipe names one. DQError when it needs calibration."""

        from dq import cookbook  # of the fit half: a saved model has its plan and needs no recipe

        found = cookbook.get(self.recipe)
        if isinstance(found, Plan):
            return found
        if found.needs_calibration:
            raise DQError(f"recipe {found.name!r} needs calibration; load the pipeline, then call dq.quantize on it")
        return Recipe.from_dict({**found.to_dict(), **self.overrides}) if self.overrides else found

    def plan_for(self, model: nn.Module) -> Plan:
        """The plan of a model that is not quantized yet; the model may be on the meta device."""

        from dq import planning  # likewise

        wanted = self.plan or self.resolve()
        plan = wanted if isinstance(wanted, Plan) else planning.make_plan(model, wanted, tuple(self.keep))
        for name, layer in plan.layers.items():
            if (layer.act is not None and layer.act.scale != "dynamic") or layer.smooth or layer.permute or layer.rank:
                raise DQError(f"layer {name!r}: the plan has calibrated tensors; load the model saved with them")
        return copy.copy(plan)

    def to_dict(self) -> dict:
        recipe = self.recipe.to_dict() if isinstance(self.recipe, Recipe) else str(self.recipe)
        plan = None if self.plan is None else self.plan.to_dict()
        own = {"quant_method": "dq", "recipe": recipe, "keep": self.keep, "compute_dtype": self.compute_dtype}
        return {**own, "plan": plan, **self.overrides}

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def __repr__(self) -> str:
        count = "no plan yet" if self.plan is None else f"{len(self.plan.layers)} layers"
        return f"DQConfig(recipe={str(getattr(self.recipe, 'name', self.recipe))!r}, {count})"


def _listed(value: Any) -> list:
    """The patterns given as any kind of list; for another value, one that is no pattern."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, dict) else [value]
