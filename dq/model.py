"""Surgery: packed layers put into a model, made ready to run, and taken out again.

A plan is checked against the model before anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from dq import fusions, layers
from dq.errors import DQError
from dq.layers import PACKED, PLAIN, PackedStack, attending, clock, hadamard, inherit, kind_of, naming, packed_layers
from dq.layers.memory import align, page_out
from dq.plan import LayerPlan, Plan
from dq.sampler import caches, routing
from dq.sampler.caches import branches

WIDEST_GROUP = 1024  # of a layer with fewer columns: its one group is padded to that
IN_FP32 = (".scale", ".smooth", ".act_scale")  # ends of the names of packed tensors that are fp32 in any model


def check_fit(model: nn.Module, plan: Plan) -> None:
    """DQError naming the first layer of the plan that the model has not, or has in another kind or shape."""
    model_name = type(model).__name__
    for name, layer in plan.layers.items():
        layer.check(name)
        kind, shape = found(model, name)
        if kind is None:
            raise DQError(f"layer {name!r} of the plan is not in {model_name}; is this plan for another model?")
        if (kind, shape) != (layer.kind, layer.shape):
            wanted = f"{layer.kind} {tuple(layer.shape)}"
            raise DQError(f"layer {name!r}: the plan is for {wanted}, {model_name} has {kind} {shape}; plan it anew")
        _check_sizes(name, layer)
    plan.check()
    there = {name for name, _ in attending.modules(model)} if plan.attention else set()
    for name, each in plan.attention.items():
        each.check(name)
        if name not in there:
            raise DQError(f"attention of {name!r} of the plan is not in {model_name}; is this plan for another model?")
    if plan.cache:
        caches.check(model, plan.cache)
    if plan.route is not None:
        routing.check(model, plan)
    if plan.edges or plan.switch:
        clock.argument_position(model, plan.timestep)


def _check_sizes(name: str, layer: LayerPlan) -> None:
    """DQError when what a plan adds to a layer of the model would dwarf it: nothing has been allocated yet."""
    most = layer.rows + layer.columns  # a branch of full rank, and as much again of fused adapters
    if not 0 <= layer.rank <= most:
        raise DQError(
            f"layer {name!r}: rank is {layer.rank}, expected at most {most} for a {layer.kind} {layer.shape}"
        )
    for what, grain in (("weight", layer.weight.grain), ("act", layer.act.grain if layer.act else None)):
        if grain is not None and (grain.size or 0) > max(layer.columns, WIDEST_GROUP):
            raise DQError(
                f"layer {name!r}: {what} has groups of {grain.size}, expected at most its {layer.columns} columns"
            )
    if layer.rotate and not hadamard.exists(layer.rotate):
        raise DQError(
            f"layer {name!r}: rotate is {layer.rotate}, of which no Hadamard matrix is built here; plan it anew"
        )


def found(model: nn.Module, name: str) -> tuple[str | None, tuple[int, ...]]:
    """(kind, weight shape) of what stands under a name; kind None when nothing dq can quantize does."""
    try:
        owner, key = naming.place(model, name)
    except AttributeError:
        return None, ()
    if (stack := owner._parameters.get(key)) is not None:
        return "stack", tuple(stack.shape)
    module: Any = owner._modules.get(key)
    if module is None or (kind := kind_of(module)) is None:
        return type(module).__name__ if module is not None else None, ()
    return kind, tuple(module.weight.shape)


def put(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in place of what stands under a dotted name; what was put on a layer moves along."""
    owner, key = naming.place(model, name)
    old = owner._modules.get(key)
    if old is not None and isinstance(value, nn.Module):
        inherit.take_over(value, old, _as_made(old, value))
    owner._parameters.pop(key, None)
    if isinstance(value, nn.Parameter):
        owner._modules.pop(key, None)
    setattr(owner, key, value)


def _as_made(layer: Any, other: nn.Module) -> nn.Module:
    """A layer of the kind of one that stands in a model, as it is before anything is put on it."""
    if isinstance(layer, tuple(PACKED.values())):
        return type(layer).like(other, layer.plan, layer.compute_dtype)
    kind = kind_of(layer)
    return nn.Module() if kind is None else PLAIN[kind](1, 1, 1, device="meta")


def aliases(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Further names of the layers among `names` that stand in several places of a model: other name -> name."""
    there = dict(naming.named(model))
    first = {id(there[name]): name for name in names if name in there}
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = ".".join(key for key in path.split(".") if key != naming.BASE)
        if id(module) in first and name != first[id(module)]:
            found[name] = first[id(module)]
    return found


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
            old: Any = naming.at(model, name)
            made[name] = PACKED[layer.kind].like(old, layer, compute_dtype, device).train(old.training)
    install(model, made)


@torch.no_grad()
def pack_one(model: nn.Module, name: str, plan: LayerPlan, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """Replace one full-precision layer by its packed form of compute dtype `dtype`; its bias may come later."""
    if plan.kind == "stack":
        packed = layers.pack_stack(name, weight, plan, dtype)
    else:
        old: Any = naming.at(model, name)
        packed = PACKED[plan.kind].like(old, plan, dtype, "meta").train(old.training)
        layers.fill(name, packed, weight)
        if old.bias is not None and not old.bias.is_meta:
            packed.put("bias", old.bias.data.to(weight.device, dtype))
    put(model, name, packed)
    return packed


def start(model: nn.Module, plan: Plan) -> None:
    """Make packed layers ready to run: frozen, bound to kernels, and following the timestep where the plan asks."""
    clock.detach(model)
    ticking = clock.Clock(plan.edges, plan.switch, plan.rising) if plan.edges or plan.switch else None
    if ticking is not None:
        clock.attach(model, ticking, plan.timestep)
    in_fp32 = kept_in_fp32(model)
    for name, layer in packed_layers(model).items():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        if not isinstance(layer, PackedStack):
            layer.clock = ticking
            layer.wide = layer.compute_dtype is torch.float16 and in_fp32(name)
            layer.bind(layer.weight.device)
    fusions.attach(model, plan)
    branches.detach(model)
    routing.detach(model)
    if plan.route is not None:
        routing.attach(model, plan)  # below a cache's hooks: of a block that is left out it sees nothing
    if plan.cache:
        branches.attach(model, plan.cache, plan.timestep)
    if isinstance(model, ModelMixin):  # tells diffusers that these do not say what dtype the model has
        kept = type(model)._keep_in_fp32_modules or ()
        model._keep_in_fp32_modules = [*([kept] if isinstance(kept, str) else kept), *IN_FP32]
    for _, mapped in align([model]):
        page_out(mapped)


def kept_in_fp32(model: nn.Module) -> Callable[[str], bool]:
    """-> whether diffusers or transformers keeps a layer in fp32 when the rest of the model is loaded in fp16."""
    found = []
    for home, module in model.named_modules():
        for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept = getattr(type(module), key, None) or ()
            parts = [re.escape(part) for part in ([kept] if isinstance(kept, str) else kept)]
            found += [rf"{re.escape(f'{home}.') if home else ''}(.*\.)?{part}(\.|$)" for part in parts]
    pattern = re.compile("|".join(found)) if found else None
    return lambda name: pattern is not None and pattern.match(name) is not None


def put_back(model: nn.Module, parts: Mapping[str, nn.Module | nn.Parameter]) -> None:
    """Undo `install` and `start`: what stood in a model under these names stands there again."""
    _undo(model)
    install(model, parts)


def _undo(model: nn.Module) -> None:
    branches.detach(model)
    routing.detach(model)
    fusions.detach(model)
    clock.detach(model)
    model.__dict__.pop("_keep_in_fp32_modules", None)


@torch.no_grad()
def to_dense(model: nn.Module) -> None:
    """Put the full-precision layers that packed ones stand for in their place, in the compute dtype."""
    _undo(model)
    made: dict[str, nn.Module | nn.Parameter] = {}
    for name, layer in packed_layers(model).items():
        stack = isinstance(layer, PackedStack)
        made[name] = nn.Parameter(layer.dense_weight().to(layer.compute_dtype), False) if stack else layer.dense()
    install(model, made)
