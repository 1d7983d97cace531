"""Small models for the tests of the hub: saved on disk, called on seeded inputs, with made-up step tables."""

from __future__ import annotations

import dataclasses

import torch
from diffusers import AutoModel
from torch import nn

import dq
from dq import cookbook, layers, planning
from dq.fit import drafts
from dq.host import mark
from dq.model import put
from dq.plan import Plan
from tests import zoo

WEIGHTS = "diffusion_pytorch_model.safetensors"
FLUX, UNET, WAN, PIXART = (
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
    "PixArtTransformer2DModel",
)


@torch.no_grad()
def output(model: nn.Module, **changes) -> torch.Tensor:
    """All output values of a zoo model on its seeded inputs, flat; inputs in the dtype the model says it has."""
    entry = zoo.ENTRIES[getattr(model, "_orig_mod", model).__class__.__name__]
    values = model(**{**entry.inputs(torch.Generator().manual_seed(0), model.dtype), **changes})
    return torch.cat([value.float().flatten() for value in zoo.tensors_in(values)])


def saved(folder, name: str, dtype: torch.dtype = torch.float32, **options) -> str:
    """Save a zoo model in full precision; returns the folder."""
    path = str(folder / name)
    zoo.build(name, dtype=dtype).save_pretrained(path, **options)
    return path


def stepped(model: nn.Module, edges: tuple[float, ...], spread: float = 4.0) -> Plan:
    """Quantize a model's int8 layers with a stored activation scale per step bucket, in place."""
    plan = planning.make_plan(model, cookbook.get("int8"))
    plan.edges, plan.compute_dtype = edges, str(model.dtype).removeprefix("torch.")
    table = torch.linspace(0.5, 1.0, len(edges) + 1).reshape(-1, 1) * spread / 127
    for name, layer in plan.layers.items():
        old = model.get_submodule(name)
        if layer.act is None:
            packed = layers.pack(name, old, layer, model.dtype)
        else:
            act = dataclasses.replace(layer.act, scale="table")
            plan.layers[name] = dataclasses.replace(layer, act=act, steps=len(edges) + 1)
            draft = drafts.draft(old, plan.layers[name])
            draft.act_scale.data.copy_(table)
            packed = draft.pack(model.dtype)
        put(model, name, packed)
    mark.mark(model, plan)
    return plan


def phased(model: nn.Module, switch: tuple[float, ...], rising: bool = False, late: tuple[str, ...] = ()) -> Plan:
    """Quantize a model's linears to int4 weights and inputs, with 8-bit inputs from the switch on, in place."""
    wish = dq.Recipe("phased", ("int4/group:32", "int4/group:32"), ("int8/channel", "int8a/tensor"))
    plan = planning.make_plan(model, wish)
    plan.switch, plan.rising, plan.compute_dtype = switch, rising, str(model.dtype).removeprefix("torch.")
    formats = tuple(map(dq.TensorPlan.parse, late or ("int8/token",)))
    for name, layer in plan.layers.items():
        if layer.kind == "linear" and layer.act is not None:
            plan.layers[name] = dataclasses.replace(layer, late=formats)
    dq.quantize(model, plan, progress=False)
    return plan


def in_one_phase(model: nn.Module, plan: Plan, phase: int) -> None:
    """Quantize a model by a plan of several phases, as it is in one of them all the time."""
    layers = {name: layer.phases[phase if layer.late else 0] for name, layer in plan.layers.items()}
    dq.quantize(model, dataclasses.replace(plan, layers=layers, switch=(), rising=False), progress=False)


def load(folder, **options):
    return AutoModel.from_pretrained(str(folder), **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
