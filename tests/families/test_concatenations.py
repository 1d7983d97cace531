"""Where concatenated inputs are cut, against the concatenations that models really make."""

from __future__ import annotations

import pytest
import torch

from dq import cookbook, families, planning
from dq.families import concatenations
from tests import zoo

COUNTS = {
    "UNet2DConditionModel": 4,
    "UNet2DModel": 4,
    "UNet3DConditionModel": 4,
    "UNetMotionModel": 4,
    "UNetSpatioTemporalConditionModel": 4,
    "I2VGenXLUNet": 4,
    "HunyuanDiT2DModel": 1,
    "FluxTransformer2DModel": 2,
    "Flux2Transformer2DModel": 2,
    "ChromaTransformer2DModel": 2,
    "HunyuanVideoTransformer3DModel": 2,
    "HunyuanImageTransformer2DModel": 2,
}
WITHOUT = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel")


def live_cuts(name: str, layers, monkeypatch) -> dict[str, int]:
    """For each of these layers, the first width of the last concatenation before it that is as wide as its input."""
    model, entry = zoo.build(name), zoo.ENTRIES[name]
    log, seen, real = [], {}, torch.cat

    def cat(tensors, dim=0, **more):
        out = real(tensors, dim, **more)
        log.append(([tensor.shape[dim] for tensor in tensors], out.shape[dim]))
        return out

    def hook(layer: str):
        def look(module, args):
            width = module.weight.shape[1]
            seen[layer] = next(sizes[0] for sizes, total in reversed(log) if len(sizes) == 2 and total == width)

        return look

    for layer in layers:
        model.get_submodule(layer).register_forward_pre_hook(hook(layer))
    monkeypatch.setattr(torch, "cat", cat)
    zoo.call(model, entry)
    return seen


@pytest.mark.parametrize("name", COUNTS)
def test_cuts_are_those_of_the_running_model(name, monkeypatch):
    cuts = concatenations.found(zoo.build(name))
    assert len(cuts) == COUNTS[name]
    assert {layer: cut for layer, (cut,) in cuts.items()} == live_cuts(name, cuts, monkeypatch)


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without_concatenations_are_left_alone(name):
    assert concatenations.found(zoo.build(name)) == {}


def test_apply_cuts_planned_layers_only():
    model = zoo.build("UNet2DConditionModel")
    plan = planning.make_plan(model, cookbook.get("int8"), keep=[r"up_blocks\.1"])
    made = concatenations.apply(plan, model, families.of(model))
    cut = {name: layer.splits for name, layer in made.layers.items() if layer.splits}
    assert set(cut) == {f"up_blocks.0.resnets.{i}.conv_shortcut" for i in range(2)}
    assert not any(layer.splits for layer in plan.layers.values())
    for name, layer in made.layers.items():
        layer.check(name)
