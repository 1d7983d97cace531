"""Fusions: found by structure, the same pictures, undone by hooks, adapters and other backends, never saved."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dq
from dq import fusions, layers
from dq.attentionplan import INT8
from dq.errors import DQError
from dq.fusions import attention
from dq.host import mark
from dq.kernels.cpu import library
from dq.layers import attending, takeover
from dq.layers.memory import page_out
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from tests import zoo

PIXART, FLUX = "PixArtTransformer2DModel", "FluxTransformer2DModel"
native = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))


class Activated(nn.Module):
    """A linear and what follows it."""

    def __init__(self, function):
        super().__init__()
        self.proj, self.function = nn.Linear(32, 48), function

    def forward(self, x):
        return self.function(self.proj(x))


def packed(function):
    module = Activated(function)
    plan = LayerPlan("linear", (48, 32), TensorPlan.parse("int8/channel"), TensorPlan.parse("int8/token"))
    module.proj = layers.pack("proj", module.proj, plan, torch.float32)
    fusions.attach(module, Plan({"proj": plan}))
    return module


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def launches(module, x):
    """How often the linear's own GELU kernel ran in a call, and the output."""
    choice, seen = module.proj.choice, []
    record = lambda x, t: seen.append(1) or choice.gelu(x, t)  # noqa: E731
    module.proj._choice = dataclasses.replace(choice, gelu=record)
    try:
        return len(seen), module(x), len(seen)
    finally:
        module.proj._choice = choice


@native
@torch.no_grad()
def test_a_tanh_gelu_runs_in_the_product():
    module, x = packed(tanh_gelu), torch.randn(7, 32)
    _, y, count = launches(module, x)
    assert count == 1 and torch.allclose(y, tanh_gelu(module.proj(x)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("function", [F.gelu, F.relu, lambda x: 2 * tanh_gelu(x), lambda x: x])
def test_other_functions_stay_as_they_are(function):
    module, x = packed(function), torch.randn(7, 32)
    _, y, count = launches(module, x)
    assert count == 0 and torch.equal(y, function(module.proj(x))) and "forward" not in vars(module)


@native
def test_hooks_gradients_and_backends_undo_it():
    module, x = packed(tanh_gelu), torch.randn(7, 32)
    handle = module.proj.register_forward_hook(lambda module, args, output: output * 0)
    assert (module(x) == 0).all()
    handle.remove()
    y = module(x.clone().requires_grad_())
    assert y.requires_grad and launches(module, x)[2] == 1
    dq.set_backend("reference")
    try:
        assert torch.equal(module(x), tanh_gelu(module.proj(x)))
    finally:
        dq.set_backend("auto")


@native
@torch.no_grad()
def test_an_output_stored_before_the_gelu_gets_one():
    module, x = packed(tanh_gelu), torch.randn(2, 7, 32)
    layer = module.proj
    layer.put("start_in", x[0, 0].clone())
    layer.put("start_out", torch.full((48,), 2.0))
    assert torch.equal(module(x), tanh_gelu(layer(x))) and torch.equal(module(x)[0, 0], tanh_gelu(layer.start_out))


@native
@torch.no_grad()
def test_a_call_of_the_linear_alone_has_no_gelu_while_another_thread_runs_both():
    module, x = packed(tanh_gelu), torch.randn(7, 32)
    alone, both, seen = module.proj(x), module(x), {}
    run = module.proj.run

    def interrupted(*args, **kwargs):
        """What another thread would see in the middle of the fused call."""
        if not seen:
            seen["alone"] = None
            with ThreadPoolExecutor(1) as pool:
                seen["alone"] = pool.submit(torch.no_grad()(module.proj), x).result()
        return run(*args, **kwargs)

    vars(module.proj)["run"] = interrupted
    assert torch.equal(module(x), both) and torch.equal(seen["alone"], alone)


@native
def test_the_note_counts_the_modules_whose_kernel_has_a_gelu_now():
    module = packed(tanh_gelu)
    assert fusions.notes(module) == ["GELU runs in the product before it in 1 modules"]
    dq.set_backend("reference")
    try:
        assert fusions.notes(module) == []
    finally:
        dq.set_backend("auto")


@native
@torch.no_grad()
def test_copies_are_fused_and_detaching_gives_the_module_back():
    module, x = packed(tanh_gelu), torch.randn(7, 32)
    other = copy.deepcopy(module)
    assert torch.equal(other(x), module(x)) and launches(other, x)[2] == 1
    fusions.detach(module)
    assert "forward" not in vars(module) and torch.equal(module(x), tanh_gelu(module.proj(x)))
    assert launches(other, x)[2] == 1 and other.state_dict().keys() == module.state_dict().keys()


@native
@torch.no_grad()
@pytest.mark.parametrize("name", [PIXART, FLUX])
def test_models_draw_the_same_fused_or_not(name):
    model = zoo.build(name, dtype=torch.float32)
    dq.quantize(model, "int8", progress=False)
    assert any("GELU" in line for line in fusions.notes(model)) and any(
        "attention" in line for line in fusions.notes(model)
    )
    assert any("GELU" in line for line in dq.explain(model).notes)
    call = lambda: zoo.call(model, zoo.ENTRIES[name], dtype=torch.float32)  # noqa: E731
    fused = call()
    fusions.detach(model)
    plain = call()
    assert fusions.notes(model) == [] or "GELU" not in str(fusions.notes(model))
    assert (fused - plain).norm() / plain.norm() < 2e-3  # a code of the next layer may fall the other way


@native
@torch.no_grad()
def test_the_reference_backend_runs_torchs_attention(monkeypatch):
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    dq.quantize(model, "int8", progress=False)
    calls = []
    monkeypatch.setattr(fusions.attention.cpu, "sdpa", lambda *args, int8, **more: calls.append(1) or F.silu(args[0]))
    dq.set_backend("reference")
    try:
        zoo.call(model, zoo.ENTRIES[PIXART], dtype=torch.bfloat16)
        assert not calls
    finally:
        dq.set_backend("auto")
    zoo.call(model, zoo.ENTRIES[PIXART], dtype=torch.bfloat16)
    assert calls


@native
def test_a_plan_may_ask_for_attention_in_bytes():
    model = zoo.build(PIXART, dtype=torch.float32)
    dq.quantize(model, "sageattention-int8", progress=False)
    assert any("in int8" in line for line in dq.explain(model).notes)
    plan = mark.plan_of(model)
    assert set(plan.attention.values()) == {INT8} and Plan.from_dict(plan.to_dict()) == plan
    dq.dequantize(model)
    assert fusions.notes(model) == [] or "in int8" not in str(fusions.notes(model))


def test_without_kernels_the_note_says_why_attention_is_torchs(monkeypatch):
    monkeypatch.setattr(fusions.attention.cpu, "missing", lambda *least: "hidden")
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    dq.quantize(model, "sageattention-int8", progress=False)
    assert "attention is torch's in 4 modules: hidden" in fusions.notes(model)


def elsewhere(name, device):
    """A model whose parameters have a device and no memory; "hooked": accelerate brings them to the CPU for a call."""
    model = zoo.build(name, dtype=torch.bfloat16)
    with FakeTensorMode():
        for module in model.modules():
            for key, value in module._parameters.items():
                place = "meta" if device == "hooked" else device
                module._parameters[key] = (
                    value if value is None else nn.Parameter(torch.empty(value.shape, device=place))
                )
            if device == "hooked":
                module._hf_hook = AlignDevicesHook(execution_device="cpu", offload=True)
    return model


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_model_elsewhere_is_not_attached_and_the_note_says_where_it_is(device):
    model = elsewhere(PIXART, device)
    assert attention.attach(model) == [] and not attention.attached(model)
    assert attention.attach(model, attending.planned(model, INT8)) == []
    assert attention.why_not(model) == f"its weights are on {device}"
    assert attention.lines(model) == [f"attention is torch's in 4 modules: its weights are on {device}"]


@native
def test_a_model_brought_to_the_cpu_for_each_call_is_attached():
    model = elsewhere(PIXART, "hooked")
    assert len(attention.attach(model)) == 4 and "4 modules as exact as torch's" in attention.lines(model)[0]


@native
def test_a_model_that_moves_away_is_not_said_to_run_on_the_cpus_kernels():
    model = zoo.build(PIXART, dtype=torch.bfloat16)
    assert len(attention.attach(model)) == 4 and "4 modules as exact as torch's" in attention.lines(model)[0]
    assert attention.lines(model.to("meta")) == ["attention is torch's in 4 modules: its weights are on meta"]


class Mixing(nn.Module):
    """Attention without weights of its own."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_without_weights_is_where_the_model_is():
    model = nn.Sequential(Mixing(), nn.Linear(4, 4, device="meta"))
    assert attention.attach(model) == [] and "on meta" in attention.lines(model)[0]


def test_an_unknown_attention_is_refused():
    with pytest.raises(DQError, match="attention is 'int7'"):
        Plan.from_dict(Plan({}).to_dict() | {"attention": "int7"})
    with pytest.raises(DQError, match="attention is 'int7'"):
        Recipe.from_dict(Recipe("x", ("int8", None), ("int8", None)).to_dict() | {"attention": "int7"})


@torch.no_grad()
def test_pages_of_a_mapped_file_can_be_given_back(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"odd": torch.ones(3, dtype=torch.int8), "weight": torch.arange(100_000)}, tmp_path / "a.safetensors")
    weight = load_file(tmp_path / "a.safetensors")["weight"]
    page_out(weight)
    assert torch.equal(weight, torch.arange(100_000))  # read again from the file


def test_a_module_may_have_several_roles():
    module, said = nn.Linear(2, 2), []
    for name in ("inner", "outer"):
        takeover.take(module, name, lambda module, inner, x, name=name: (said.append(name), inner(x))[1])
    module(torch.zeros(1, 2))
    takeover.give_back(module, "outer")
    module(torch.zeros(1, 2))
    takeover.give_back(module, "inner")
    assert said == ["outer", "inner", "inner"] and "forward" not in vars(module)
