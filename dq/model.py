"""Surgery: packed layers put into a model, made ready to run, and taken out again.

A plan is checked against the model before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from dq import fusions, layers
from dq.errors import DQError
from dq.layers import PACKED, PackedStack, clock, kind_of, packed_layers
from dq.layers.memory import align, page_out
from dq.plan import LayerPlan, Plan

IN_FP32 = (".scale", ".smooth", ".act_scale")  # ends of the names of packed tensors that are fp32 in any model


def check_fit(model: nn.Module, plan: Plan) -> None:
    """DQError naming the first layer of the plan that the model has not, or has in another kind or shape."""
    model_name = type(model).__name__
    for name, layer in plan.layers.items():
        layer.check(name)
        kind, shape = _found(model, name)
        if kind is None:
            raise DQError(f"layer {name!r} of the plan is not in {model_name}; is this plan for another model?")
        if (kind, shape) != (layer.kind, layer.shape):
            wanted = f"{layer.kind} {tuple(layer.shape)}"
            raise DQError(f"layer {name!r}: the plan is for {wanted}, {model_name} has {kind} {shape}; plan it anew")
    if plan.edges:
        clock.argument_position(model, plan.timestep)


def _found(model: nn.Module, name: str) -> tuple[str | None, tuple[int, ...]]:
    """(kind, weight shape) of what stands under a name; kind None when nothing dq can quantize does."""
    home, _, key = name.rpartition(".")
    try:
        owner = model.get_submodule(home)
    except AttributeError:
        return None, ()
    if (stack := owner._parameters.get(key)) is not None:
        return "stack", tuple(stack.shape)
    module: Any = owner._modules.get(key)
    if module is None or (kind := kind_of(module)) is None:
        return type(module).__name__ if module is not None else None, ()
    return kind, tuple(module.weight.shape)


def put(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in place of what stands under a dotted name."""
    home, _, key = name.rpartition(".")
    owner = model.get_submodule(home)
    owner._parameters.pop(key, None)
    if isinstance(value, nn.Parameter):
        owner._modules.pop(key, None)
    setattr(owner, key, value)


def aliases(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Further names of the modules among `names` that stand in several places of a model: other name -> name."""
    wanted = set(names)
    first = {id(module): name for name, module in model.named_modules() if name in wanted}
    every = model.named_modules(remove_duplicate=False)
    return {name: first[id(part)] for name, part in every if id(part) in first and name not in wanted}


def install(model: nn.Module, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Put each part in place of what stands under its name, wherever else the same module stands."""
    others = aliases(model, parts)
    for name, part in parts.items():
        put(model, name, part)
    for name, first in others.items():
        put(model, name, parts[first])


def swap(model: nn.Module, plan: Plan, compute_dtype: torch.dtype, device: str = "meta") -> None:
    """Replace the layers a plan names by empty packed ones. DQError, before any change, when the plan does not fit."""
    check_fit(model, plan)
    made: dict[str, nn.Module] = {}
    for name, layer in plan.layers.items():
        if layer.kind == "stack":
            made[name] = PackedStack(layer, compute_dtype, device)
        else:
            old: Any = model.get_submodule(name)
            made[name] = PACKED[layer.kind].like(old, layer, compute_dtype, device).train(old.training)
    install(model, made)


@torch.no_grad()
def pack_one(model: nn.Module, name: str, plan: LayerPlan, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """Replace one full-precision layer by its packed form of compute dtype `dtype`; its bias may come later."""
    if plan.kind == "stack":
        packed = layers.pack_stack(name, weight, plan, dtype)
    else:
        old: Any = model.get_submodule(name)
        packed = PACKED[plan.kind].like(old, plan, dtype, "meta").train(old.training)
        layers.fill(name, packed, weight)
        if old.bias is not None and not old.bias.is_meta:
            packed.put("bias", old.bias.data.to(weight.device, dtype))
    put(model, name, packed)
    return packed


def start(model: nn.Module, plan: Plan) -> None:
    """Make packed layers ready to run: frozen, bound to kernels, following the timestep if the plan has steps."""
    clock.detach(model)
    ticking = clock.Clock(plan.edges) if plan.edges else None
    if ticking is not None:
        clock.attach(model, ticking, plan.timestep)
    for layer in packed_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        if not isinstance(layer, PackedStack):
            layer.clock = ticking
            layer.bind(layer.weight.device.type)
    fusions.attach(model, plan)
    if isinstance(model, ModelMixin):  # tells diffusers that these do not say what dtype the model has
        kept = type(model)._keep_in_fp32_modules or ()
        model._keep_in_fp32_modules = [*([kept] if isinstance(kept, str) else kept), *IN_FP32]
    for _, mapped in align([model]):
        page_out(mapped)


@torch.no_grad()
def to_dense(model: nn.Module) -> None:
    """Put the full-precision layers that packed ones stand for in their place, in the compute dtype."""
    fusions.detach(model)
    made: dict[str, nn.Module | nn.Parameter] = {}
    for name, layer in packed_layers(model).items():
        stack = isinstance(layer, PackedStack)
        made[name] = nn.Parameter(layer.dense_weight().to(layer.compute_dtype), False) if stack else layer.dense()
    install(model, made)
    model.__dict__.pop("_keep_in_fp32_modules", None)
    clock.detach(model)
