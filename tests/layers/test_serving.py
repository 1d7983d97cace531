"""Layers choose kernels outside of traced code: moved, copied or told another backend, they trace in one graph."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import dq
from dq import kernels
from dq.kernels import choice
from tests import zoo
from tests.kernels.injected import backend, inject, linear
from tests.models import PIXART, output

CPU = torch.device("cpu")
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    kernels.select("auto")
    torch._dynamo.reset()


def traced(layer, x=X):
    """The output of a layer compiled in one graph."""
    with torch.no_grad():
        return torch.compile(layer, fullgraph=True, backend="eager")(x)


def elsewhere(layer):
    """The layer as one that was loaded for another device type and never ran."""
    layer.bind("cuda")
    return layer


MOVES = {
    "to": lambda layer: elsewhere(layer).to("cpu"),
    "cpu": lambda layer: elsewhere(layer).cpu(),
    "of its model": lambda layer: nn.Sequential(elsewhere(layer)).to("cpu")[0],
    "from meta": lambda layer: copy.deepcopy(elsewhere(layer)).to("meta").to_empty(device="cpu"),
    "copied": copy.deepcopy,
    "unpickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_layer_that_came_to_another_device_type_traces_in_one_graph(move):
    layer = MOVES[move](linear())
    assert layer._bound == (CPU, "auto") and traced(layer).shape == (5, 24)


def test_a_whole_model_moved_to_another_device_type_traces_in_one_graph():
    model = zoo.build(PIXART)
    dq.quantize(model, "int8", progress=False)
    before = output(model)
    for layer in model.modules():
        if hasattr(layer, "_choose_again"):
            elsewhere(layer)
    model.to("cpu").compile(fullgraph=True, backend="eager")
    after = output(model)
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("target", [True, False])
def test_set_backend_binds_at_once(target):
    model = zoo.build(PIXART)
    dq.quantize(model, "int8", progress=False)
    dq.set_backend("dense", model if target else None)
    names = {layer._choice.backend for layer in model.modules() if hasattr(layer, "_choose_again")}
    assert names == {"dense"}
    model.compile(fullgraph=True, backend="eager")
    output(model)


def test_a_layer_nobody_moved_or_ran_breaks_the_graph_and_is_right():
    layer, other = elsewhere(linear()), linear()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager")(X), other(X)) and layer._bound[0] == CPU


@torch.no_grad()
def test_offload_hooks_that_move_weights_alone_leave_the_layer_where_it_runs(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {"late": 0.1}, late=backend(95))
    layer = linear()
    layer(X)
    for name, value in list(layer._parameters.items()):
        if value is not None:
            layer._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
    assert layer.home == CPU and layer.choice.backend == "late" and layer.meet_typical().backend == "late"


@torch.no_grad()
def test_a_traced_call_uses_what_is_known_of_its_rows_and_ranks_else(monkeypatch, tmp_path):
    ran = []
    late = backend(95, lambda y: ran.append(len(y)) or y)
    inject(monkeypatch, tmp_path, {"late": 0.1}, late=late)
    layer = linear()
    layer.forward(X)  # measured for few rows
    assert layer.choice.backend == "late"
    with torch.no_grad():
        graph = torch._dynamo.explain(layer.forward)
        assert [layer.serve(torch.randn(rows, 40)).backend for rows in (3,)] == ["late"]
        assert graph(X).graph_break_count == 0
    other = linear(seed=2)  # bound after that: knows what the first one found
    assert other._known.keys() == {(torch.float32, 0, 0)} and other._met == {}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert other.serve(X).backend == "late" and other.serve(torch.randn(400, 40)).backend == "dense"


@torch.no_grad()
def test_meeting_other_rows_in_between_compiles_nothing_anew(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {})
    layer = linear()
    layer(X)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        first = compiled(X)
        layer.forward(torch.randn(400, 40))
        assert len(layer._met) == 2 and torch.equal(compiled(X), first)


@torch.no_grad()
def test_rows_of_a_dynamic_shape_trace_without_a_break(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {})
    layer = linear()
    layer(X), layer(torch.randn(400, 40))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for rows in (5, 9, 400, 500):
        x = torch.randn(rows, 40)
        assert torch.equal(compiled(x), layer.forward(x))


@torch.no_grad()
def test_a_plan_that_changed_and_was_bound_anew_forgets_what_it_met(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {})
    layer = linear()
    layer(X)
    layer.bind("cpu")
    assert layer._met == {} and layer._known
    layer(X)
    assert len(times.asked) == 1 and choice.allowance() > 0
