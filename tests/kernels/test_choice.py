"""The fastest right backend serves: by proof, by time beside full precision, once for a machine, in no trace."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dq import kernels
from dq.errors import DQError
from dq.kernels import choice
from tests.kernels.injected import backend, inject, linear

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))


def raises(y):
    raise RuntimeError("no such unit\nsecond line")


@pytest.mark.parametrize("rank", [1, 95])
@torch.no_grad()
def test_a_fast_wrong_backend_is_refused_with_its_reason_and_the_layer_is_right(monkeypatch, tmp_path, rank):
    times = inject(monkeypatch, tmp_path, {"wrong": 0.01}, wrong=backend(rank, lambda y: y * 1.02))
    layer = linear()
    expected = kernels.backends()["dense"].build("linear", layer.plan, None)(X, layer.tensors())
    assert torch.equal(layer(X), expected) and layer.choice.backend == "dense"
    assert dict(layer.choice.refusals)["wrong"].startswith("wrong on a small problem: off by 0.02")
    assert times.asked == [["dense", "full"]], "what is wrong is not timed"


@pytest.mark.parametrize("emulates, serving", [(True, "native"), (False, "dense")])
@torch.no_grad()
def test_what_emulates_does_not_compete(monkeypatch, tmp_path, emulates, serving):
    """`dense` emulates these activations: it serves by its time only where it is said to multiply them."""
    emulated = kernels.backends()["dense"].emulated
    inject(monkeypatch, tmp_path, {"dense": 0.1, "native": 0.5, "full": 0.6}, native=backend(95))
    if emulates:
        monkeypatch.setattr(kernels.backends()["dense"], "emulated", emulated)
    layer = linear()
    layer(X)
    assert layer.choice.backend == serving and not layer.choice.emulated
    reason = {"dense": "it emulates what native multiplies"}
    assert dict(layer.choice.refusals) == (reason if emulates else {})


@torch.no_grad()
def test_a_backend_that_raises_is_refused_in_one_line(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {}, broken=backend(1, raises))
    layer = linear()
    layer(X)
    assert dict(layer.choice.refusals)["broken"] == "failed when it was tried: RuntimeError: no such unit"


@torch.no_grad()
def test_the_first_call_in_a_captured_graph_measures_nothing_and_the_weights_stay_where_it_reads_them(
    monkeypatch, tmp_path
):
    laying = backend(1)
    laying.lay, laying.restore = lambda t: t._replace(weight=t.weight.clone()), lambda t: t
    times = inject(monkeypatch, tmp_path, {"laying": 0.1}, laying=laying)
    layers = [linear(seed=seed) for seed in range(2)]
    for layer in layers:
        layer.stored.data = layer.stored.data.clone()  # what bind laid
    lie = [layer.stored.data_ptr() for layer in layers]
    with monkeypatch.context() as capture:
        capture.setattr(torch.Tensor, "is_cuda", True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        y = layers[0](X)
    assert not times.asked and layers[0].choice.ms is None
    assert [layer(X) is not None for layer in layers] and torch.equal(layers[0](X), y) and times.asked
    assert layers[0].choice.ms == 0.1, "measured by the first call after it"
    assert layers[0].stored.data_ptr() == lie[0] and layers[1].stored.data_ptr() != lie[1]


@torch.no_grad()
def test_a_right_and_faster_backend_serves_whatever_its_rank(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {"late": 0.2, "first": 0.5, "full": 0.6}, late=backend(95), first=backend(1))
    layer = linear()
    assert layer.choice.backend == "first", "by rank while nothing is known"
    layer(X)
    assert (layer.choice.backend, layer.choice.ms, layer.choice.full_ms) == ("late", 0.2, 0.6)
    assert layer.choice.speedup == pytest.approx(3)
    assert dict(layer.choice.refusals) == {
        "first": "slower here: 0.5 ms where late takes 0.2",
        "dense": "slower here: 1 ms where late takes 0.2",
    }


@torch.no_grad()
@pytest.mark.parametrize(("ms", "served"), [(1.04, "first"), (1.06, "dense")])
def test_rank_decides_within_five_percent(monkeypatch, tmp_path, ms, served):
    inject(monkeypatch, tmp_path, {"first": ms}, first=backend(1))
    layer = linear()
    layer(X)
    assert layer.choice.backend == served


@torch.no_grad()
def test_reference_is_never_timed_and_serves_when_nothing_else_is_right(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {})
    monkeypatch.setattr(kernels.backends()["dense"], "why_not", lambda *_: "no")
    layer = linear()
    layer(X)
    assert layer.choice.backend == "reference" and times.asked == [["full"]] and layer.choice.speedup is None


@torch.no_grad()
def test_static_is_the_order_of_ranks_and_measures_nothing(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"late": 0.1}, late=backend(95), wrong=backend(1, lambda y: y + 1))
    monkeypatch.setenv("DQ_CHOICE", "static")
    layer = linear()
    layer(X)
    assert layer.choice.backend == "wrong" and times.asked == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DQ_CHOICE", "fastest")
    with pytest.raises(DQError, match="DQ_CHOICE is 'fastest', expected"):
        linear()


@torch.no_grad()
def test_a_selected_backend_is_not_overruled(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"slow": 9.0}, slow=backend(95))
    layer = linear()
    layer.backend = "slow"
    layer(X)
    assert layer.choice.backend == "slow" and times.asked == []


@torch.no_grad()
def test_each_class_of_rows_and_each_dtype_is_met_once_and_alike_layers_share(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {})
    layer, other = linear(), linear(seed=1)
    for rows in (1, 16, 17, 128, 129, 1024, 1025, 3000):
        layer(torch.randn(rows, 40))
        other(torch.randn(rows, 40))
    assert len(times.asked) == 4
    layer(X.bfloat16())
    assert len(times.asked) == 5


@torch.no_grad()
def test_classes_have_kernels_of_their_own_and_the_busiest_is_shown(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"few": 0.5}, few=backend(95))
    layer = linear()
    layer(X)
    times.ms["few"] = 2.0
    layer(torch.randn(500, 40))
    served = {rows: layer.serve(torch.randn(rows, 40)).backend for rows in (2, 400)}
    assert served == {2: "few", 400: "dense"} and layer.choice.backend == "dense"


@torch.no_grad()
def test_what_fails_at_the_layers_size_is_refused_for_that_size_alone(monkeypatch, tmp_path):
    def large(y):
        return raises(y) if y.shape[-1] == 200 else y

    inject(monkeypatch, tmp_path, {"first": 0.1}, first=backend(1, large))
    one, other = linear((200, 40)), linear()
    one(X), other(X)
    assert other.choice.backend == "first" and one.choice.backend == "dense"
    assert dict(one.choice.refusals)["first"] == "failed when it was tried: RuntimeError: no such unit"


def test_nothing_is_measured_where_a_call_is_no_ordinary_one(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"late": 0.1}, late=backend(95))
    layer, wanted = linear(), X.clone().requires_grad_()
    layer(wanted).sum().backward()
    with torch.no_grad():
        torch.vmap(layer)(X)
        with FlopCounterMode(display=False):
            layer(X)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(X))
        torch.jit.trace(layer, (X,), check_trace=False)
        torch.compile(layer, fullgraph=True, backend="eager")(X)
        with kernels.imagined(kernels.Machine()):
            layer.bind("cpu")
        layer.bind("meta")
    assert times.asked == [] and wanted.grad is not None
    layer.bind("cpu")
    layer(X.clone().requires_grad_().detach())
    assert times.asked == [["dense", "late", "full"]], "an ordinary one afterwards is measured"


@torch.no_grad()
def test_random_numbers_of_the_user_stay_as_they_are(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {})
    layer = linear()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    layer(X)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_proofs_do_not_depend_on_autocast_around_the_call(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {})
    layer = linear()
    with torch.autocast("cpu", torch.bfloat16):
        layer(X)
    assert layer.choice.backend == "dense" and not any("wrong" in reason for _, reason in layer.choice.refusals)


@torch.no_grad()
def test_ranks_decide_once_the_time_is_spent_and_that_is_said(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"late": 0.1}, late=backend(95))
    monkeypatch.setattr(choice, "_spent", 1e9)
    layer = linear()
    layer(X)
    assert layer.choice.backend == "dense" and times.asked == []
    assert layer.choice.unmeasured == "1000000000 s of measuring are spent"


@torch.no_grad()
def test_threads_that_meet_a_problem_together_measure_it_once(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {})
    layer, gate, found = linear(), threading.Barrier(4), []

    def call():
        gate.wait()
        with torch.no_grad():  # a mode of the thread
            found.append(layer(X))

    threads = [threading.Thread(target=call) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(times.asked) == 1 and len(found) == 4 and all(torch.equal(y, found[0]) for y in found)


SECOND = """
import torch
from dq.kernels import choice, proof
from tests.kernels.injected import linear
torch.set_num_threads(1)
counts = []
clocked, why_wrong = choice.clocked, proof.why_wrong
choice.clocked = lambda runs: counts.append("time") or clocked(runs)
proof.why_wrong = lambda *given: counts.append("proof") or why_wrong(*given)
with torch.no_grad():
    layer = linear()
    layer(torch.randn(5, 40))
print(len(counts), layer.choice.speedup is not None)
"""


def test_a_second_process_with_the_same_cache_measures_nothing(tmp_path):
    env = os.environ | {"DQ_CHOICE": "measured", "DQ_CACHE": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SECOND], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert int(said[0][0]) > 1 and said[1] == ["0", "True"]


def test_slow_ones_are_called_a_few_times_and_the_others_more(monkeypatch):
    calls = {"a": 0, "b": 0, "full": 0}
    now = iter(range(10**6))
    cost = {"a": 1.0, "b": 1.5, "full": 9.0}
    clock = {"now": 0.0}

    def run(name):
        calls[name] += 1
        clock["now"] += cost[name] / 1000

    monkeypatch.setattr(choice.timing.time, "perf_counter", lambda: clock["now"] + 0 * next(now))
    found = choice.clocked({name: (lambda name=name: run(name)) for name in calls})
    assert found == pytest.approx(cost) and calls["full"] < 5 < calls["a"] == calls["b"]


def test_rows_that_are_timed_are_fewer_for_large_layers(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def rows(shape):
        plan = linear((8, 8)).plan.__class__("linear", shape, linear((8, 8)).plan.weight)
        return [choice.Problem("linear", plan, None, torch.device("cpu"), torch.float32, k).rows for k in range(4)]

    assert rows((320, 320)) == [8, 64, 512, 2048]
    assert rows((1024, 1024)) == [8, 64, 512, 1024]
    assert rows((12288, 3072)) == [8, 64, 128, 128]
