"""Small models for the tests of the hub: saved on disk, called on seeded inputs, with made-up step tables."""

from __future__ import annotations

import dataclasses

import torch
from diffusers import AutoModel
from torch import nn

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


def load(folder, **options):
    return AutoModel.from_pretrained(str(folder), **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
