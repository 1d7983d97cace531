"""Every denoiser class of the installed diffusers: int8 keeps the output, shrinks the model, reloads bit-exactly."""

from __future__ import annotations

import pytest
import torch
from diffusers import ModelMixin
from torch import nn

import dq
from dq import cookbook, planning
from dq.layers import packed_layers
from tests import zoo

LIMIT_DB = {"transformer": 35.0, "unet": 25.0}
COVERED = 0.90  # least share of linear, convolution and expert weights that the plan quantizes
PACKED_SHARE = 0.30  # most bytes of a model's packed layers next to the same layers in fp32
NAMES = sorted(zoo.ENTRIES)
CLASSES = sorted(found.__name__ for found in zoo.denoiser_classes())
SLOW_TO_BUILD = {"WuerstchenDiffNeXt"}  # its constructor initialises all layers again in every module: many seconds
SEPARABLE = (
    "PixArtTransformer2DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "SanaTransformer2DModel",
    "UNet1DModel",
)


def sqnr_db(reference, value):
    return float(10 * torch.log10(reference.square().sum() / (reference - value).square().sum()))


def full_bytes(layer):
    """fp32 bytes of the layer that a packed layer replaced."""
    bias = getattr(layer, "bias", None)
    return 4 * (layer.plan.rows * layer.plan.columns + (0 if bias is None else bias.numel()))


def layer_bytes(layer):
    return sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))


def reloaded(model, name, folder):
    """`model` saved and loaded again, the way its class offers."""
    dq.save(model, folder)
    if isinstance(model, ModelMixin):
        return type(model).from_pretrained(folder).eval()
    return dq.load(folder, zoo.build(name, seed=1, init="own"))


def test_every_denoiser_class_has_an_entry():
    assert set(CLASSES) <= set(NAMES)
    assert len(NAMES) >= 80


@pytest.mark.parametrize("name", NAMES)
def test_int8_keeps_the_output_shrinks_the_bytes_and_reloads_to_the_bit(name, tmp_path):
    entry, model = zoo.ENTRIES[name], zoo.build(name, init="own")
    expected = zoo.call(model, entry)
    report = dq.quantize(model, "int8", progress=False)
    got = zoo.call(model, entry, dtype=torch.float32)
    assert got.isfinite().all() and not torch.equal(got, expected)
    assert sqnr_db(expected, got) > LIMIT_DB[entry.kind]
    packed = packed_layers(model).values()
    assert sum(map(layer_bytes, packed)) < PACKED_SHARE * sum(map(full_bytes, packed))
    assert report.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    again = reloaded(model, name, tmp_path / "saved")
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) and value.dtype == loaded[key].dtype for key, value in state.items())
    assert torch.equal(zoo.call(again, entry, dtype=torch.float32), got)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - SLOW_TO_BUILD))
def test_int8_plan_covers_the_weights_of_the_default_config(name):
    model = zoo.default_model(name)
    plan = planning.make_plan(model, cookbook.get("int8"))
    sizes = weight_sizes(model)
    assert set(plan.layers) <= set(sizes)
    covered = sum(sizes[layer] for layer in plan.layers)
    largest = max(set(sizes) - set(plan.layers), key=sizes.get, default="")
    assert covered >= COVERED * sum(sizes.values()), f"largest layer left out: {largest}"


def weight_sizes(model):
    """Elements of each linear, convolution (any class that behaves like one) and expert weight, by name.

    Counted by shape, not by what dq recognises: every 2-d to 5-d `weight` outside embeddings, and 3-d parameters of
    modules called experts.
    """
    sizes = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() >= 2 and not isinstance(module, nn.Embedding):
            sizes[name] = weight.numel()
        if "Expert" in type(module).__name__:
            parameters = module.named_parameters(recurse=False)
            sizes |= {f"{name}.{key}": value.numel() for key, value in parameters if value.dim() == 3}
    return sizes


@torch.no_grad()
@pytest.mark.parametrize("name", SEPARABLE)
def test_a_sample_does_not_depend_on_its_batch_mate(name):
    entry, model = zoo.ENTRIES[name], zoo.build(name, init="own")
    dq.quantize(model, "int8", progress=False)
    key, x = next(
        (key, value)
        for key, value in entry.inputs(torch.Generator().manual_seed(0), torch.float32).items()
        if key in ("hidden_states", "sample")
    )
    mate, nudged = x.clone(), x.clone()
    mate[1] = 30 * mate[1].flip(-1) + 7
    nudged[0] *= 1 + 1e-6
    run = lambda value: zoo.call(model, entry, dtype=torch.float32, **{key: value}).chunk(2)[0]  # noqa: E731
    alone, beside, moved = run(x), run(mate), run(nudged)
    assert (alone - beside).abs().max() <= (alone - moved).abs().max() + 1e-6 * alone.abs().max()
