"""torch.compile: one graph, no breaks, no recompiles over the steps of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import AutoModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dq
from dq import cookbook, layers
from dq.kernels.cpu import attention as cpu
from dq.model import put
from tests import zoo
from tests.models import FLUX, PIXART, UNET, WAN, output, saved, stepped

STEPS = [torch.full((2,), step) for step in (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)]
EDGES = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.fixture(autouse=True)
def strict():
    """A fresh compiler that raises on every recompile."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def quantized(name: str, recipe: str = "int8") -> nn.Module:
    model = zoo.build(name)
    dq.quantize(model, recipe, progress=False)
    return model


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return (a - b).norm() <= tolerance * b.norm()


def steps_of(name: str) -> list[torch.Tensor]:
    return STEPS if name == FLUX else [step * 1000 for step in STEPS]


def test_whole_unet_compiles_to_one_graph_for_all_steps():
    model = quantized(UNET)
    before = [output(model, timestep=step) for step in steps_of(UNET)]
    torch._dynamo.utils.counters.clear()
    model.compile(fullgraph=True, backend="eager")
    after = [output(model, timestep=step) for step in steps_of(UNET)]
    assert all(close(a, b) for a, b in zip(after, before, strict=True))
    assert graphs() == 1


def convolution_and_linear(recipe: str) -> nn.Module:
    """A packed convolution and a packed linear, x (batch, 8, 16, 16)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Flatten(2), nn.Linear(64, 32)).eval()
    found = cookbook.get(recipe)
    for name, kind, formats in (("0", "conv2d", found.conv), ("2", "linear", found.linear)):
        weight, act = (None if text is None else dq.TensorPlan.parse(text) for text in formats)
        plan = dq.LayerPlan(kind, tuple(model[int(name)].weight.shape), weight, act)
        put(model, name, layers.pack(name, model[int(name)], plan, torch.float32))
    return model


DYNAMIC = [name for name in cookbook.names() if not (cookbook.get(name).linear[1] or "").endswith(("static", "table"))]


@pytest.mark.parametrize("recipe", DYNAMIC)  # stored scales come with data: see the step tables below
def test_kernels_of_every_recipe_compile(recipe):
    model, x = convolution_and_linear(recipe), torch.randn(2, 8, 16, 16)
    assert close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_step_tables_need_one_graph_for_all_steps():
    model = zoo.build(FLUX)
    stepped(model, EDGES)
    before = [output(model, timestep=step) for step in STEPS]
    torch._dynamo.utils.counters.clear()
    model.compile(fullgraph=True, backend="eager")
    for step, expected in zip(STEPS, before, strict=True):
        assert close(output(model, timestep=step), expected)
    assert graphs() == 1


def test_graph_with_step_tables_writes_to_no_input():
    """CUDA graphs are not captured for a graph that does."""
    model, written = zoo.build(FLUX), []
    stepped(model, EDGES)

    def noting(graph: torch.fx.GraphModule, inputs):
        def run(*args):
            versions = [each._version for each in args if isinstance(each, torch.Tensor)]
            y = graph(*args)
            after = [each._version for each in args if isinstance(each, torch.Tensor)]
            written.append(sum(a != b for a, b in zip(after, versions, strict=True)))
            return y

        return run

    model.compile(fullgraph=True, backend=noting)
    with torch.no_grad():
        for step in STEPS:
            output(model, timestep=step)
    assert written == [0] * len(STEPS)


class Casts(TorchDispatchMode):
    """Counts copies that change a tensor's dtype or device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_is_not_cast_in_a_call(dtype):
    plan = dq.LayerPlan("linear", (32, 64), dq.TensorPlan.parse("int8/channel"), rotate=16)
    layer = layers.pack("", nn.Linear(64, 32).to(dtype), plan, dtype)
    layer._choice = replace(layer._choice, run=lambda x, tensors: x)  # what is left: the rotation
    layer._measures = False
    x = torch.randn(3, 64).to(dtype)
    with torch.no_grad(), Casts() as casts:
        y = layer(x)
    assert y.dtype is dtype and casts.count == 0


def test_a_layer_put_elsewhere_by_hand_is_bound_outside_of_the_graph_or_says_what_helps():
    model, x = convolution_and_linear("int8"), torch.randn(2, 8, 16, 16)
    expected = model(x)

    def strayed() -> nn.Module:
        torch._dynamo.reset()
        model[2]._bound = (torch.device("meta"), "auto")
        return model

    with torch.no_grad():
        assert close(torch.compile(strayed(), backend="eager")(x), expected)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="went to another device; run the model there once"):
            torch.compile(strayed(), fullgraph=True, backend="eager")(x)
        strayed()(x)
        assert close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def blocks_compiled(model: nn.Module) -> tuple[list[torch.Tensor], int]:
    """-> (outputs over the steps, graphs made) with the repeated blocks compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        return [output(model, timestep=step) for step in steps_of(type(model).__name__)], graphs()


@pytest.mark.parametrize("name", [UNET, WAN])
def test_repeated_blocks_need_no_more_graphs_than_in_full_precision(name):
    model = quantized(name)
    before = [output(model, timestep=step) for step in steps_of(name)]
    after, count = blocks_compiled(model)
    assert all(close(a, b) for a, b in zip(after, before, strict=True))
    assert count == blocks_compiled(zoo.build(name))[1]


def test_repeated_blocks_with_step_tables_need_no_more_graphs_than_in_full_precision():
    model = zoo.build(FLUX)
    stepped(model, EDGES)
    before = [output(model, timestep=step) for step in STEPS]
    after, count = blocks_compiled(model)
    assert all(close(a, b) for a, b in zip(after, before, strict=True))
    assert count == blocks_compiled(zoo.build(FLUX))[1]


def resized(model: nn.Module, scale: int) -> torch.Tensor:
    """Output of a zoo model on a picture `scale` times as large in each direction, of noise."""
    draw, entry = torch.Generator().manual_seed(scale), zoo.ENTRIES[type(model).__name__]
    given = entry.inputs(torch.Generator().manual_seed(0), model.dtype)
    if "img_ids" in given:
        count = scale**2 * given["img_ids"].shape[0]
        given |= {"hidden_states": torch.randn(2, count, 64, generator=draw), "img_ids": torch.zeros(count, 3)}
    else:
        key = "sample" if "sample" in given else "hidden_states"
        *head, high, wide = given[key].shape
        given[key] = torch.randn(*head, scale * high, scale * wide, generator=draw)
    with torch.no_grad():
        return zoo.tensors_in(model(**given))[0]


def graphs_by_resolution(model: nn.Module, compile_: Callable) -> list[int]:
    """Graphs after each of three resolutions of a model that `compile_` compiles, whose outputs stay as they were."""
    expected = [resized(model, scale) for scale in (1, 2, 3)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_(fullgraph=True, backend="eager")
    found = []
    with torch._dynamo.config.patch(error_on_recompile=False):
        for scale in (1, 2, 3):
            assert close(resized(model, scale), expected[scale - 1])
            found.append(graphs())
    return found


@pytest.mark.parametrize(("name", "recipe"), [(FLUX, "int8"), (FLUX, "int4-weight"), (UNET, "int8")])
def test_a_second_resolution_recompiles_once_and_a_third_one_not_at_all(name, recipe, monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)  # across these sizes there is another graph, with another kernel
    monkeypatch.setattr(cpu, "FEWEST_ROWS", {False: 0, True: 0})
    model = quantized(name, recipe)
    assert graphs_by_resolution(model, model.compile) == [1, 2, 2]


def test_repeated_blocks_at_other_resolutions_need_no_more_graphs_than_in_full_precision(monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "FEWEST_ROWS", {False: 0, True: 0})

    models = quantized(FLUX), zoo.build(FLUX)
    ours, theirs = (graphs_by_resolution(model, model.compile_repeated_blocks) for model in models)
    assert ours == theirs and ours[2] == ours[1] > ours[0]


def test_model_loaded_quantized_compiles(tmp_path):
    model = AutoModel.from_pretrained(saved(tmp_path, WAN), quantization_config=dq.DQConfig("int8"))
    assert model.hf_quantizer.is_compileable
    before = output(model)
    model.compile(fullgraph=True, backend="eager")
    assert close(output(model), before)


def test_group_offload_and_compile_together():
    model = quantized(PIXART)
    before = output(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    model.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert close(output(model), before)


@pytest.mark.slow
def test_generated_code_agrees_with_eager():
    model, x = convolution_and_linear("int8"), torch.randn(2, 8, 16, 16)
    assert close(torch.compile(model, fullgraph=True)(x), model(x), 1e-3)
