"""The one place that knows how a model remembers that it is quantized by dq."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from dq.host import base, peft
from dq.host.config import DQConfig, DQMethod
from dq.host.diffusers import DQQuantizer
from dq.host.transformers import DQTransformersQuantizer
from dq.layers import clock, naming, notes, packed_layers
from dq.model import start
from dq.plan import Plan
from dq.surroundings import Correction


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model is quantized with, else None; up to date with its layers.

    Fused adapters add rank to a layer, and unloading an IP-Adapter takes layers out of the model.
    """
    plan = notes.read(model).plan
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, base.QuantizerBase):
        plan = quantizer.plan
    if plan is None:
        return None
    found, there = packed_layers(model), dict(naming.named(model))
    layers = {name: found[name].plan for name in plan.layers if name in found}
    kept = {name: reason for name, reason in plan.kept.items() if _has(there, name)}
    return replace(plan, layers=layers, kept=kept)


def _has(there: dict[str, nn.Module], name: str) -> bool:
    """Whether a name is that of a layer, or of a parameter (stacked experts)."""
    home, _, key = name.rpartition(".")
    return name in there or (home in there and key in there[home]._parameters)


def mark(model: Any, plan: Plan) -> None:
    """Tell a model whose layers were just swapped that it is quantized, so that saving and running follow suit.

    Diffusers and transformers models get the attributes their `from_pretrained` would have set; any other module
    remembers the plan. Raises DQError when the plan has steps and the model no such timestep argument.
    """
    start(model, plan)
    peft.adopt(model)
    kind = quantizer_class(model)
    if kind is None:
        notes.write(model, plan=plan)
        return
    config = DQConfig(plan.recipe or "int8", plan=plan, compute_dtype=plan.compute_dtype)
    model.hf_quantizer = kind(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, DQMethod.DQ
    write_config(model)


def correct(model: Any, found: Correction) -> None:
    """Put a correction into the plan of a quantized model, in place of one of its kind, scheduler and steps."""
    plan = plan_of(model)
    assert plan is not None, "the model is quantized"
    key = (found.kind, found.scheduler, found.steps)
    others = [each for each in plan.sampler if (each.kind, each.scheduler, each.steps) != key]
    plan = replace(plan, sampler=(*others, found))
    if quantizer_class(model) is None:
        notes.write(model, plan=plan)
    else:
        write_config(model, plan)


def unmark(model: Any) -> None:
    """Undo `mark` on a model whose layers are full precision again."""
    clock.detach(model)
    peft.release(model)
    kind = quantizer_class(model)
    if kind is None:
        notes.write(model, plan=None)
    elif kind is DQTransformersQuantizer:
        model.hf_quantizer.remove_quantization_config(model)
    else:
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        base.forget(model)


def quantizer_class(model: nn.Module) -> type | None:
    """The quantizer class of the model's library, None for other modules."""
    if isinstance(model, ModelMixin):
        return DQQuantizer
    return DQTransformersQuantizer if isinstance(model, PreTrainedModel) else None


def write_config(model: Any, plan: Plan | None = None) -> None:
    """Put a plan, by default the model's as it is now, into the config that will be saved."""
    config = model.hf_quantizer.quantization_config
    config.plan = plan_of(model) if plan is None else plan
    if isinstance(model, ModelMixin):
        base.enter(model, config)
    else:
        model.config.quantization_config = config
