"""Quantizing what is wrapped, offloaded, or holds weights in another tool's form."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PixArtSigmaPipeline
from torch import nn

import dq
from dq.errors import DQError
from dq.layers import packed_layers
from tests import zoo
from tests.models import FLUX, PIXART, load, output, same_state

CPU = torch.device("cpu")
TINY = "pipelines/tiny/tiny-pixart"


def test_a_compiled_denoiser_is_looked_through(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(TINY)
    plain = copy.deepcopy(pipe.transformer)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    report = dq.quantize(pipe, "int8", progress=False)
    dq.quantize(plain, "int8", progress=False)
    assert packed_layers(pipe.transformer._orig_mod).keys() == packed_layers(plain).keys()
    assert [row.name for row in dq.explain(pipe).layers] == [row.name for row in report.layers]
    for way, save in {"host": pipe.save_pretrained, "dq": lambda folder: dq.save(pipe, folder)}.items():
        save(str(tmp_path / way))
        again = PixArtSigmaPipeline.from_pretrained(str(tmp_path / way)).transformer
        assert packed_layers(again).keys() == packed_layers(plain).keys()
    dq.dequantize(pipe)
    assert not packed_layers(pipe.transformer)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_ran_compiled_is_quantized_calibrated_and_runs(in_place):
    plain = zoo.build(FLUX)
    model = copy.deepcopy(plain)
    wrapped = torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
        wrapped = model
    before = output(wrapped)
    dq.quantize(plain, "gptq-int4-weight", calibration=lambda given: [output(given) for _ in range(2)], progress=False)
    dq.quantize(wrapped, "gptq-int4-weight", calibration=lambda _: [output(wrapped) for _ in range(2)], progress=False)
    assert same_state(model, plain)
    after = output(wrapped)
    assert (after - output(plain)).norm() < 1e-5 * before.norm() and not torch.equal(after, before)
    torch._dynamo.reset()


def test_a_data_parallel_model_saves_and_loads_as_the_model_within(tmp_path):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    fresh = nn.DataParallel(copy.deepcopy(inner))
    dq.quantize(nn.DataParallel(inner), "int8", progress=False)
    dq.save(nn.DataParallel(inner), tmp_path)
    assert dq.load(tmp_path, fresh) is fresh and torch.equal(fresh.module[0].stored, inner[0].stored)


def refused(model: nn.Module, words: str) -> None:
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(DQError, match=words) as error:
        dq.quantize(model, "int8", progress=False)
    assert "\n" not in str(error.value) and [type(module) for module in model.modules()] == kinds


def test_offloaded_weights_are_refused_in_one_line():
    model = cpu_offload(zoo.build(PIXART), execution_device=CPU)
    before = output(model)
    refused(model, "is offloaded")
    assert torch.equal(output(model), before)


def test_group_offloading_and_layerwise_casting_come_after_quantizing():
    model = zoo.build(FLUX)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    refused(model, "group offloading on; quantize it first")
    model = zoo.build(FLUX)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(model, "layerwise casting on; quantize it first")


class Foreign(torch.Tensor):
    """A tensor of another tool, as torchao's are."""


def test_weights_of_other_tools_are_refused_in_one_line():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data = model[1].weight.data.to(torch.float8_e4m3fn)
    refused(model, "layer '1' has torch.float8_e4m3fn weights")
    model[1].weight = nn.Parameter(torch.Tensor._make_subclass(Foreign, torch.randn(64, 64)), requires_grad=False)
    refused(model, "layer '1' has Foreign weights")
    model = zoo.build(FLUX)
    model.hf_quantizer = object()
    refused(model, "already quantized by another tool")


def test_a_model_without_weights_is_planned_and_the_report_says_so():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    first = str(dq.quantize(model, "int8", progress=False)).splitlines()[0]
    assert "2 layers planned, without weights" in first and "quantized" not in first


def test_an_fp8_checkpoint_is_quantized_from_its_values(tmp_path):
    model = zoo.build(FLUX)
    for value in model.parameters():
        value.data = value.data.to(torch.float8_e4m3fn) if value.dim() == 2 else value.data
    model.save_pretrained(tmp_path)
    packed = load(tmp_path, quantization_config=dq.DQConfig("int8-weight"), dtype=torch.float32)
    plain = load(tmp_path, dtype=torch.float32)
    assert packed_layers(packed) and (output(packed) - output(plain)).norm() < 0.03 * output(plain).norm()
