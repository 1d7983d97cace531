"""What stands around a model to be quantized: wrappers are looked through, weights that cannot be read refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container, Mapping

import torch
from torch import nn

from dq.errors import DQError
from dq.host import base
from dq.layers import naming
from dq.plan import Plan

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unwrapped(target):
    """The module within `torch.compile(model)`, DataParallel and DistributedDataParallel; anything else as it is."""
    while isinstance(target, nn.Module):
        inner = target._modules.get("_orig_mod") or (target.module if isinstance(target, PARALLEL) else None)
        if inner is None:
            break
        target = inner
    return target


def eager() -> contextlib.AbstractContextManager:
    """Inside, what was compiled runs as if it were not: compiled code does not see hooks that came after it."""
    used = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if used else contextlib.nullcontext()


def parts_of(target) -> dict[str, nn.Module]:
    """The models of a pipeline by component name, without wrappers; a bare model stands under "".

    Raises DQError when the target is neither.
    """
    target = unwrapped(target)
    if isinstance(target, nn.Module):
        return {"": target}
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise DQError(f"target is a {type(target).__name__}, expected a DiffusionPipeline or a torch nn.Module")
    return {name: unwrapped(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def refuse_hidden_weights(part: str, model: nn.Module) -> None:
    """DQError in one line when other tools keep a model's weights elsewhere or in a form of theirs."""
    name = part or type(model).__name__
    if not isinstance(getattr(model, "hf_quantizer", None), base.QuantizerBase | None):
        other = type(model.hf_quantizer).__name__
        raise DQError(f"{name} is already quantized by another tool ({other}); load its full-precision weights")
    if any(_has_hook(module, "group_offloading") for module in model.modules()):
        raise DQError(f"{name} has group offloading on; quantize it first, then call enable_group_offload")
    if any(_has_hook(module, "layerwise_casting") for module in model.modules()):
        raise DQError(f"{name} has layerwise casting on; quantize it first, then call enable_layerwise_casting")


def _has_hook(module: nn.Module, name: str) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(key.startswith(name) for key in registry.hooks)


def refuse_unreadable_weights(part: str, model: nn.Module, plan: Plan, aside: Container[str] = ()) -> None:
    """DQError naming the first planned layer whose weight has no data, or is not in a floating dtype of torch's own.

    A model that is on the meta device altogether may be planned; weights of the layers `aside` lie elsewhere.
    """
    values = [value for value in model.parameters() if value.is_meta]
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    partly = bool(values) and (hooked or len(values) < len(list(model.parameters())))
    for name in plan.layers:
        if name in aside:
            continue
        weight = _weight(model, name)
        if weight.is_meta and partly:
            raise DQError(
                f"{part or type(model).__name__} is offloaded (layer {name!r} has no data); quantize it first, then "
                "offload: pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules(model) undoes it"
            )
        if weight.dtype not in READABLE or type(weight.data) is not torch.Tensor:
            kind = str(weight.dtype) if type(weight.data) is torch.Tensor else type(weight.data).__name__
            raise DQError(
                f"layer {name!r} has {kind} weights, expected bfloat16, float16 or float32 ones; load the "
                "full-precision model, or cast it with model.to(torch.bfloat16) where its weights are complete in fp8"
            )


def is_empty(models: Mapping[str, tuple[nn.Module, object]]) -> bool:
    """Whether any of the models to be quantized is on the meta device: it is planned, nothing is rounded."""
    return any(value.is_meta for model, _ in models.values() for value in model.parameters())


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    owner, key = naming.place(model, name)
    stack, layer = owner._parameters.get(key), owner._modules.get(key)
    weight = layer._parameters.get("weight") if stack is None and layer is not None else stack
    assert weight is not None, f"layer {name!r} is planned and has no weight"
    return weight


def refuse_switches(target, plans: Mapping[str, Plan]) -> None:
    """DQError for a plan that switches at a timestep which the pipeline's scheduler never reaches."""
    most = getattr(getattr(getattr(target, "scheduler", None), "config", None), "num_train_timesteps", None)
    for plan in plans.values():
        beyond = [edge for edge in plan.switch if most is not None and edge > most]
        if beyond:
            got = f"plan: switch at {plan.timestep} {beyond[0]:g} is outside of the schedule"
            raise DQError(f"{got}, expected a timestep of {type(target.scheduler).__name__}, at most {most}")
