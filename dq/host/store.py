"""Saving and loading: `dq.save`, `dq.load`. The files are described byte by byte in docs/file_format.md.

A model is quantized while it loads (data-free recipes), or by `dq.quantize` afterwards; either way it then carries its
plan, and plain `save_pretrained` and `from_pretrained` work. Reloading replays the plan: nothing is decided again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from dq import disk
from dq.errors import DQError
from dq.host import files, fresh, peft, ready
from dq.host.mark import mark, plan_of, quantizer_class, write_config
from dq.layers import packed_layers
from dq.model import check_fit, swap
from dq.plan import Plan


def save(target, folder: str | Path) -> None:
    """Write a quantized model or pipeline into a folder, whole or not at all.

    Models and pipelines of diffusers and transformers are written as their `save_pretrained` does; any other module as
    `dq_plan.json` and `model.safetensors`. Raises DQError for a target that is not quantized or has adapters attached,
    and for a place that cannot be written.
    """
    target = ready.unwrapped(target)
    if isinstance(target, DiffusionPipeline) or (isinstance(target, nn.Module) and quantizer_class(target)):
        quantized = [part for part in ready.parts_of(target).values() if plan_of(part) is not None]
        _refuse_unready(target, quantized)
        target.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        return
    _refuse_unready(target, [target] if plan_of(target) is not None else [])
    with files.replacing(folder) as made:
        files.write(made, plan_of(target), target.state_dict())


def _refuse_unready(target, quantized: list[nn.Module]) -> None:
    if not quantized:
        kind = type(target).__name__
        raise DQError(f"{kind} is not quantized, nothing to save; call dq.quantize(target, 'int8') first")
    for model in quantized:
        refuse_unsavable(model)


def refuse_unsavable(model: nn.Module) -> None:
    if (name := peft.attached(model)) is not None:
        raise DQError(
            f"{type(model).__name__} has adapters attached (layer {name!r}); before saving, unload them, "
            "or call fuse_lora() and then unload_lora_weights()"
        )
    offloaded = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if offloaded is not None:
        raise DQError(
            f"{type(model).__name__} is offloaded (tensor {offloaded!r} has no data); before saving, remove the hooks "
            "with pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules(model)"
        )


@contextlib.contextmanager
def saving(model: Any) -> Iterator[None]:
    """While a model of a host library is saved, its config holds the plan that will fit when it is loaded.

    DQError for a model that cannot be saved, or could not be loaded.
    """
    refuse_unsavable(model)
    plan = plan_of(model)
    assert plan is not None, "of a model that dq quantized"
    write_config(model, fresh.loadable(model, plan) if isinstance(model, ModelMixin) else plan)
    try:
        yield
    finally:
        write_config(model, plan)


@torch.no_grad()
def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Fill a full-precision module (its weights do not matter) with what `dq.save` wrote, in place; returns it.

    Raises DQError, with the model unchanged, for a folder or plan that does not fit and for missing, truncated,
    mis-shaped or altered tensors.
    """
    given, model, folder = model, ready.unwrapped(model), Path(folder)
    disk.sweep(folder)
    if quantizer_class(model) and not (folder / files.PLAN_FILE).exists():
        raise DQError(f"{str(folder)!r} has no {files.PLAN_FILE}; load it with from_pretrained")
    plan = Plan.load(folder / files.PLAN_FILE)
    if packed_layers(model):
        raise DQError(f"{type(model).__name__} is already quantized; load into a full-precision model")
    check_fit(model, plan)
    state = files.read(folder, model, plan)
    place = next((value.device for value in model.parameters() if not value.is_meta), torch.device("cpu"))
    swap(model, plan, plan.dtype)
    for name, value in state.items():
        home, _, key = name.rpartition(".")
        module = model.get_submodule(home)
        if key in module._buffers:
            module._buffers[key] = value.to(place)
        else:
            module._parameters[key] = nn.Parameter(value.to(place), requires_grad=False)
    mark(model, plan)
    return given
