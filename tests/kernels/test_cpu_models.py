"""The embedded models on dq's CPU kernels: every layer, and whole pictures, against the reference backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dq
from dq.kernels import reference
from dq.kernels.cpu import library
from dq.layers import packed_layers
from pipelines import tiny
from tests.kernels.test_kernels import truth_and_torch, within_twice_torch

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))
PROMPTS = [
    "a red circle",
    "a blue square left of a star",
    "two green triangles",
    "a small yellow ring",
    "a star",
    "a purple circle above a square",
    "three blue rings",
    "a white triangle",
]


def quantized(name, dtype=torch.float32):
    pipe = tiny.load(name, dtype)
    pipe.set_progress_bar_config(disable=True)
    dq.quantize(pipe, "int8", progress=False)
    return pipe, getattr(pipe, "unet", None) or pipe.transformer


def exact_and_torch(layer, x):
    """-> the layer in fp64 on the same codes, and torch in the dtype of x."""
    p, t, conv = layer.plan, layer.tensors(), layer._conv()
    truth, theirs = truth_and_torch(layer.op, p, conv, x, t)
    codes = reference.input_rounder(p, -1 if layer.op == "linear" else 1)(x.float(), t.act_scale).double()
    weight = reference.weight_decoder(p)(t).reshape(p.shape).double()
    bias = None if t.bias is None else t.bias.double()
    run = F.linear if layer.op == "linear" else reference.CONVS[len(p.shape) - 2]
    return run(codes, weight, bias, *(conv or ())), truth if x.dtype is torch.float32 else theirs


def draw(pipe, name, prompts, steps, latents):
    call = tiny.CALL[name] | {"num_inference_steps": steps, "output_type": "pt"}
    return pipe(prompts, latents=latents.clone(), **call).images.float()


def latents(model, count):
    size = model.config.sample_size
    return torch.randn(count, model.config.in_channels, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_layer_is_within_twice_torchs_rounding(name, dtype):
    pipe, model = quantized(name, dtype)
    checked = []

    def check(layer, args):
        if layer not in checked and layer.choice.backend == "cpu":
            within_twice_torch(layer.choice.run(args[0], layer.tensors()), *exact_and_torch(layer, args[0]), dtype)
        checked.append(layer)

    for layer in packed_layers(model).values():
        layer.register_forward_pre_hook(check)
    draw(pipe, name, PROMPTS[:1], 2, latents(model, 1).to(dtype))
    assert len(set(checked)) == len(packed_layers(model))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_pictures_are_no_further_from_the_references_than_a_nudge_of_a_millionth(name):
    """A code that falls the other way changes a picture as much as 1e-6 of the input does, on average."""
    pipe, model = quantized(name)
    start = latents(model, len(PROMPTS))
    kernels_of = {layer.choice.backend for layer in packed_layers(model).values()}
    assert kernels_of == {"cpu"}
    ours = draw(pipe, name, PROMPTS, 10, start)
    dq.set_backend("reference")
    try:
        truth, nudged = (draw(pipe, name, PROMPTS, 10, start * factor) for factor in (1.0, 1.0 + 1e-6))
    finally:
        dq.set_backend("auto")
    assert {layer.choice.backend for layer in packed_layers(model).values()} == kernels_of
    decibels = lambda a, b: -10 * (a - b).square().flatten(1).mean(1).log10()  # noqa: E731
    assert decibels(ours, truth).mean() > decibels(nudged, truth).mean() - 1
