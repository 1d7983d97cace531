"""Attention of models on dq's CPU kernels: found, switched on and off, under hooks and `torch.compile`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from dq.attentionplan import INT8, WISHES
from dq.fusions import attention
from dq.kernels.cpu import attention as cpu
from dq.kernels.cpu import library
from dq.layers import attending
from tests import models, zoo
from tests.models import FLUX, PIXART, UNET

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))
PRECISIONS = pytest.mark.parametrize("int8", [False, True], ids=["floats", "int8"])


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Small models, too, run on the kernel."""
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "FEWEST_ROWS", {False: 0, True: 0})


def relative(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def attach(model, int8):
    return attention.attach(model, attending.planned(model, INT8) if int8 else {})


def hidden_calls(monkeypatch):
    """Precisions of the calls that reach the op, as they happen."""
    calls, run = [], cpu.sdpa

    def seen(*args, int8=False, **kwargs):
        names = ("query", "key", "value", "attn_mask")
        given = [*args, *(kwargs[name] for name in names if name in kwargs)]
        if cpu.why_not(*given[:4], int8=int8) is None:
            calls.append("int8" if int8 else "bf16")
        return run(*args, int8=int8, **kwargs)

    monkeypatch.setattr(cpu, "sdpa", seen)
    return calls


@PRECISIONS
@pytest.mark.parametrize("name", [PIXART, FLUX, UNET, "SD3Transformer2DModel", "WanTransformer3DModel"])
@torch.no_grad()
def test_a_model_with_dqs_attention_is_close_to_itself(name, int8, monkeypatch):
    model = zoo.build(name, dtype=torch.bfloat16, init="own")
    state, before = dict(model.state_dict()), models.output(model)
    names = attach(model, int8)
    assert names and attention.attached(model) == dict.fromkeys(names, INT8 if int8 else attention.PLAIN)
    calls = hidden_calls(monkeypatch)
    after = models.output(model)
    assert calls and set(calls) == {"int8" if int8 else "bf16"}
    wide = models.output(copy.deepcopy(model).float()) if not int8 else before
    assert relative(after, wide.double()) <= (0.05 if int8 else 2 * relative(before, wide.double()) + 1e-3)
    assert model.state_dict().keys() == state.keys()
    attention.detach(model)
    assert torch.equal(models.output(model), before)
    assert not attention.attached(model) and not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_copies_saving_and_moving_leave_the_switch_on(tmp_path):
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    attach(model, int8=True)
    twin = copy.deepcopy(model)
    blocks = [m.transformer_blocks[0].attn1 for m in (model, twin)]
    assert blocks[1].forward.__self__ is blocks[1] and blocks[0].forward.__self__ is blocks[0]
    attention.detach(model)
    assert attention.attached(twin) and not attention.attached(model)
    assert not torch.equal(models.output(twin), models.output(model))
    twin.to(torch.float32).to(torch.bfloat16).save_pretrained(tmp_path)
    again = models.load(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(models.output(again), models.output(model)) and not attention.attached(again)


@torch.no_grad()
@pytest.mark.parametrize("order", ["hook first", "attention first"])
def test_hooks_that_replace_forward(order, monkeypatch):
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    before, block = models.output(model), model.transformer_blocks[0].attn1
    steps = [lambda: add_hook_to_module(block, ModelHook()), lambda: attention.attach(model)]
    for step in steps if order == "hook first" else reversed(steps):
        step()
    attention.attach(model)
    calls = hidden_calls(monkeypatch)
    models.output(model)
    count = len(calls)
    remove_hook_from_module(block)
    models.output(model)
    assert count and len(calls) == 2 * count
    attention.detach(model)
    assert torch.equal(models.output(model), before) and len(calls) == 2 * count


@torch.no_grad()
def test_a_switch_below_someone_elses_forward_can_be_turned_off_and_on(monkeypatch):
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    before, block = models.output(model), model.transformer_blocks[0].attn1
    attention.attach(model)
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    attention.detach(model)
    assert torch.equal(models.output(model), before)
    calls = hidden_calls(monkeypatch)
    attention.attach(model)
    models.output(model)
    assert len(calls) == len(attention.attached(model))


class Custom(nn.Module):
    """Attention of nobody's library: through a method, from a plain forward."""

    def forward(self, x):
        return self.mix(x) + x

    def mix(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Plain(nn.Linear):
    """Mentions attention only where forward never goes."""

    def other(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_is_found_by_what_forward_reaches():
    model = nn.Sequential(Custom(), Plain(4, 4), nn.MultiheadAttention(8, 2))
    assert attention.attach(model) == ["0"]


@pytest.mark.parametrize("named", [False, True])
def test_calls_on_another_device_enter_no_mode(named, monkeypatch):
    def entered(self, call):
        raise AssertionError("a mode was entered")

    monkeypatch.setattr(attention.Instead, "__init__", entered)
    x = torch.empty(1, 4, 8, device="meta")
    module = Custom()
    assert (
        attention._attend(
            module, lambda *args, **given: "inner", *(() if named else (x,)), **({"x": x} if named else {})
        )
        == "inner"
    )
    with pytest.raises(AssertionError, match="entered"):
        attention._attend(module, lambda x: x, torch.empty(1, 4, 8))


def compiled(model):
    """(output, graphs as text) of a model compiled as a whole."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    found = models.output(torch.compile(model, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    return found, graphs


@torch.no_grad()
def test_emulated_attention_is_one_op_of_a_compiled_graph():
    model = zoo.build(PIXART, dtype=torch.bfloat16, init="own")
    attention.attach(model, attending.planned(model, WISHES["sage2"].choices[0]))
    expected, (found, graphs) = models.output(model), compiled(model)
    assert len(graphs) == 1 and graphs[0].count("torch.ops.dq.rounded_attention") == 4
    assert torch.equal(found, expected)


@PRECISIONS
@pytest.mark.parametrize("name", [PIXART, FLUX, UNET])
@torch.no_grad()
def test_compiled_models_use_the_kernel_in_one_graph(name, int8):
    model = zoo.build(name, dtype=torch.bfloat16, init="own")
    attach(model, int8)
    expected, (found, graphs) = models.output(model), compiled(model)
    assert len(graphs) == 1 and graphs[0].count("torch.ops.dq.cpu_attention") >= 1
    assert relative(found, expected.double()) < 0.01
