"""Group offloading with prefetch on streams: no card here, so copies of a made-up stream happen at its `synchronize`.

What a copy will fill is NaN, or all ones in integers, until then; what was offloaded is filled so at once. A layer
that reads its weights early, or keeps a view of what is gone, gives another output.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from diffusers.hooks import group_offloading as host
from torch import nn

import dq
from dq import cookbook, layers, planning
from dq.host import mark
from dq.model import put
from tests import zoo
from tests.models import FLUX, PIXART, UNET, output, stepped

CPU = torch.device("cpu")


def spoil(tensor: torch.Tensor) -> None:
    """Fill memory that nobody may read."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 1 if tensor.dtype is torch.bool else -1)


class Stream:
    """Copies that wait until the stream is synchronized; waited counts them."""

    def __init__(self):
        self.waiting, self.waited = [], 0

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(source)
        spoil(made)
        self.waiting.append((made, source))
        return made

    def synchronize(self) -> None:
        for made, source in self.waiting:
            made.copy_(source)
        self.waited += len(self.waiting)
        self.waiting.clear()


class Backend:
    """torch.cuda as the hooks see it."""

    def __init__(self, device=None):
        self.stream = lambda stream: contextlib.nullcontext()
        self.current_stream = Stream


@pytest.fixture
def streamed(monkeypatch):
    """-> offload(model, level): group offloading of diffusers over a `Stream`."""

    def transfer(self, tensor, source, default_stream):
        late = self.stream is not None and self.non_blocking
        tensor.data = self.stream.copy(source) if late else source.clone()

    def gone(self):
        held = [value.data for value in self.cpu_param_dict]
        offload(self)
        for value, kept in zip(held, self.cpu_param_dict.values(), strict=True):
            if value.data_ptr() != kept.data_ptr():
                spoil(value)

    offload = host.ModuleGroup._offload_to_memory
    monkeypatch.setattr(host, "TorchDeviceBackend", Backend)
    monkeypatch.setattr(host.ModuleGroup, "_transfer_tensor_to_device", transfer)
    monkeypatch.setattr(host.ModuleGroup, "_offload_to_memory", gone)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())

    def apply(model: nn.Module, level: str) -> Stream:
        stream = Stream()
        kind = host.GroupOffloadingType(level)
        config = host.GroupOffloadingConfig(CPU, CPU, kind, True, False, False, num_blocks_per_group=1, stream=stream)
        host._apply_group_offloading(model, config)
        return stream

    return apply


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("recipe", ["int8", "int4-weight", "nvfp4-weight"])
@pytest.mark.parametrize("name", [FLUX, UNET, PIXART])
def test_prefetched_layers_give_the_same_output(streamed, name, recipe, level):
    model = zoo.build(name)
    dq.quantize(model, recipe, progress=False)
    before = output(model)
    stream = streamed(model, level)
    assert torch.equal(output(model), before)  # finds the order in which layers run
    assert torch.equal(output(model), before) and torch.equal(output(model), before)
    assert stream.waited > 0


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_prefetch_follows_step_tables(streamed, level):
    model = zoo.build(FLUX)
    stepped(model, (0.3, 0.6))
    steps = [torch.full((2,), step) for step in (0.1, 0.5, 0.9)]
    before = [output(model, timestep=step) for step in steps]
    streamed(model, level)
    for _ in range(2):
        assert all(torch.equal(output(model, timestep=step), y) for step, y in zip(steps, before, strict=True))


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_prefetch_of_layers_that_rotate_smooth_and_have_a_branch(streamed, level):
    model = zoo.build(FLUX)
    plan = planning.make_plan(model, cookbook.get("int8"))
    for name, layer in plan.layers.items():
        more = {"rotate": 4, "smooth": True, "rank": 2} if layer.shape[1] % 4 == 0 and layer.act else {}
        plan.layers[name] = dataclasses.replace(layer, **more)
        packed = layers.pack(name, model.get_submodule(name), plan.layers[name], model.dtype)
        for value in (packed.smooth, packed.proj_down, packed.proj_up):
            if value is not None:
                value.data.uniform_(0.5, 1, generator=torch.Generator().manual_seed(0))
        put(model, name, packed)
    mark.mark(model, plan)
    assert any(layer._turns for layer in layers.packed_layers(model).values())
    before = output(model)
    streamed(model, level)
    assert all(torch.equal(output(model), before) for _ in range(3))
