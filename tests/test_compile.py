"""torch.compile: one graph, no breaks, no recompiles over the steps of a picture."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoModel
from torch import nn

import dq
from tests import zoo
from tests.models import FLUX, PIXART, UNET, WAN, output, saved, stepped

STEPS = [torch.full((2,), step) for step in (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)]


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


@pytest.mark.parametrize("name", [FLUX, WAN, PIXART, UNET])
def test_whole_model_compiles_to_one_graph_for_all_steps(name):
    model = quantized(name)
    before = [output(model, timestep=step) for step in steps_of(name)]
    torch._dynamo.utils.counters.clear()
    model.compile(fullgraph=True, backend="eager")
    after = [output(model, timestep=step) for step in steps_of(name)]
    assert all(close(a, b) for a, b in zip(after, before, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("recipe", ["int4-weight", "nvfp4-weight", "fp8"])
def test_every_kind_of_kernel_compiles(recipe):
    model = quantized(FLUX, recipe)
    before = output(model)
    model.compile(fullgraph=True, backend="eager")
    assert close(output(model), before)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_step_tables_need_one_graph_for_all_steps(how):
    model = zoo.build(FLUX)
    stepped(model, (0.1, 0.3, 0.5, 0.7, 0.9))
    before = [output(model, timestep=step) for step in STEPS]
    assert not close(before[0], before[-1], 0.01)
    torch._dynamo.utils.counters.clear()
    (model.compile if how == "whole" else model.compile_repeated_blocks)(fullgraph=True, backend="eager")
    after = [output(model, timestep=step) for step in STEPS]
    assert all(close(a, b) for a, b in zip(after, before, strict=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1 if how == "whole" else graphs <= 3


@pytest.mark.parametrize("name", [FLUX, UNET, WAN])
def test_repeated_blocks_compile_once(name):
    model = quantized(name)
    before = output(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert close(output(model), before)
    assert close(output(model), before)


def test_model_loaded_quantized_compiles(tmp_path):
    model = AutoModel.from_pretrained(saved(tmp_path, FLUX), quantization_config=dq.DQConfig("int8"))
    assert model.hf_quantizer.is_compileable
    before = output(model)
    model.compile(fullgraph=True, backend="eager")
    assert close(output(model), before)


def test_custom_convolution_op_agrees_with_its_shape_rule():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 255, (2, 8, 9, 7), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 127, (6, 4, 3, 3), generator=generator, dtype=torch.int8)
    arguments = (q, weight, torch.rand(6, generator=generator), [2, 1], [1, 0], [1, 2], 2)
    torch.library.opcheck(torch.ops.dq.conv_w8a8, arguments, test_utils=("test_schema", "test_faketensor"))


def test_group_offload_and_compile_together():
    model = quantized(FLUX)
    before = output(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    model.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert close(output(model), before)


@pytest.mark.slow
def test_generated_code_agrees_with_eager():
    model = quantized(FLUX)
    before = [output(model, timestep=step) for step in STEPS[:2]]
    model.compile(fullgraph=True)
    after = [output(model, timestep=step) for step in STEPS[:2]]
    assert all(close(a, b, 1e-2) for a, b in zip(after, before, strict=True))
