"""Quantized models copy, pickle and go to other processes as any module does."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import dq
from dq.fusions import attention, gelu
from dq.host import mark
from dq.layers import packed_layers
from tests import zoo
from tests.models import FLUX, PIXART, UNET, output, stepped

STEPS = [torch.full((2,), step) for step in (0.1, 0.5, 0.9)]


def dumped(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [dumped, loaded, copy.deepcopy])
@pytest.mark.parametrize("name", [FLUX, UNET, PIXART])
def test_a_copy_gives_the_same_output_and_report(name, way):
    model = zoo.build(name)
    dq.quantize(model, "int8", progress=False)
    made = way(model)
    assert torch.equal(output(made), output(model))
    assert dq.explain(made).to_json() == dq.explain(model).to_json()
    assert gelu.attached(made) == gelu.attached(model) and attention.attached(made) == attention.attached(model)
    dq.dequantize(made)
    assert not packed_layers(made) and packed_layers(model)


@pytest.mark.parametrize("way", [dumped, loaded, copy.deepcopy])
def test_a_copy_with_step_tables_has_a_clock_of_its_own(way):
    model = zoo.build(FLUX)
    stepped(model, (0.3, 0.6))
    wanted = [output(model, timestep=step) for step in STEPS]
    made = way(model)
    assert all(torch.equal(output(made, timestep=step), y) for step, y in zip(STEPS, wanted, strict=True))
    clocks = {
        id(layer.clock) for part in (made, model) for layer in packed_layers(part).values() if layer.plan.steps > 1
    }
    assert len(clocks) == 2


def test_a_copy_saves_what_the_model_would(tmp_path):
    model = zoo.build(FLUX)
    dq.quantize(model, "int4-weight", progress=False)
    dumped(model).save_pretrained(tmp_path / "made")
    again = type(model).from_pretrained(tmp_path / "made")
    assert mark.plan_of(again) == mark.plan_of(model) and torch.equal(output(again), output(model))


def test_a_model_with_an_adapter_pickles():
    from tests.host.test_lora import with_adapter

    model = with_adapter()
    assert torch.equal(output(dumped(model)), output(model))
    model.fuse_lora()
    made = dumped(model)
    assert torch.equal(output(made), output(model))
    made.unfuse_lora()
    model.unfuse_lora()
    assert torch.equal(output(made), output(model))


def _answer(given, asked) -> None:
    asked.send(output(given.recv()).numpy())  # a tensor would need its sender to outlive it


def test_a_model_goes_to_a_process_that_was_spawned():
    model = zoo.build(FLUX)
    dq.quantize(model, "int8", progress=False)
    context = multiprocessing.get_context("spawn")
    (there, given), (here, asked) = context.Pipe(), context.Pipe()
    child = context.Process(target=_answer, args=(given, asked))
    child.start()
    there.send(model)
    try:
        assert here.poll(60) and torch.equal(torch.from_numpy(here.recv()), output(model))
    finally:
        child.join(10)
