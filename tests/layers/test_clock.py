"""The clock: which step bucket runs, read off the denoiser's timestep argument into one tensor that stays the same."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.fit import drafts
from dq.layers import clock
from dq.layers.clock import Clock
from dq.plan import LayerPlan, TensorPlan
from tests import models, zoo


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, sample, timestep=None, scale=1.0):
        return self.proj(sample) * scale


@pytest.mark.parametrize(
    ("timestep", "bucket"),
    [(0, 0), (299.9, 0), (300, 1), (599, 1), (600.0, 2), (1000, 2), (torch.tensor([100, 650]), 2)],
)
def test_a_bucket_holds_its_lower_edge(timestep, bucket):
    running = Clock((300.0, 600.0))
    running.set(timestep)
    assert running.index.tolist() == [bucket]


def test_edges_are_in_the_models_own_units_and_tokens_count_by_the_noisiest():
    running = Clock((0.25, 0.5))
    running.set(torch.tensor([[0.0, 0.1], [0.3, 0.2]], dtype=torch.bfloat16))
    assert running.index.tolist() == [1]


def test_without_edges_there_is_one_bucket():
    running = Clock()
    running.set(999)
    assert running.index.tolist() == [0]


def test_the_index_tensor_stays_the_same_object():
    """Layers under torch.compile hold this tensor; a new one each step would recompile or be missed."""
    running = Clock((300.0,))
    index, address = running.index, running.index.data_ptr()
    for timestep in (0, 500, 100):
        running.set(timestep)
    assert running.index is index and index.data_ptr() == address and running.to(torch.device("cpu")) is index


@pytest.mark.parametrize("positional", [True, False])
def test_the_hook_reads_the_timestep_however_it_is_passed(positional):
    model, running = Denoiser(), Clock((500.0,))
    clock.attach(model, running, "timestep")
    x, late = torch.ones(1, 4), torch.tensor([700])
    plain = Denoiser.forward(model, x)
    assert torch.equal(model(x, late) if positional else model(sample=x, timestep=late), plain)
    assert running.index.item() == 1


def test_attaching_twice_leaves_one_hook_and_detaching_none():
    model, first, second = Denoiser(), Clock((500.0,)), Clock((500.0,))
    clock.attach(model, first, "timestep")
    clock.attach(model, second, "timestep")
    model(torch.ones(1, 4), 700)
    assert (first.index.item(), second.index.item()) == (0, 1)
    clock.detach(model)
    model(torch.ones(1, 4), 100)
    assert second.index.item() == 1
    clock.detach(Denoiser())  # nothing to remove


@pytest.mark.parametrize("tracing", [True, False])
def test_a_call_that_raises_leaves_a_step_that_the_next_call_can_move(monkeypatch, tracing):
    """A traced call runs on an index of its own and puts the shared one back, whatever it ends with."""
    model, running = Denoiser(), Clock((500.0,))
    clock.attach(model, running, "timestep")
    index = running.index
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: tracing)
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 3), 700)
    assert running.index is index and index.item() == (0 if tracing else 1)
    monkeypatch.undo()
    model(torch.ones(1, 4), 700)
    assert running.index is index and index.item() == 1


def test_an_argument_the_model_does_not_have_is_refused():
    with pytest.raises(DQError, match=r"Denoiser\.forward has no argument 't', it has sample, timestep, scale"):
        clock.attach(Denoiser(), Clock(), "t")


@torch.no_grad()
def test_a_layer_with_a_table_uses_the_scale_of_the_running_step():
    model, running = Denoiser(), Clock((500.0,))
    act = TensorPlan.parse("int8/tensor/table")
    draft = drafts.draft(model.proj, LayerPlan("linear", (4, 4), TensorPlan.parse("int8/channel"), act, steps=2))
    draft.act_scale.copy_(torch.tensor([[0.1], [0.5]]))
    model.proj = draft.pack(torch.float32)
    model.proj.clock = running
    clock.attach(model, running, "timestep")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    weight, bias = model.proj.dense_weight(), model.proj.bias
    for timestep, scale in ((700, 0.5), (100, 0.1), (500, 0.5)):
        rounded = (x / scale).round().clamp(-127, 127) * scale
        torch.testing.assert_close(model(x, timestep), nn.functional.linear(rounded, weight, bias))


# --- several calls at once ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped():
    """A denoiser whose activation scales differ by step, its layers' kernels chosen."""
    model = zoo.build(models.PIXART)
    models.stepped(model, (250.0, 500.0, 750.0))
    return model


def drawn(model, step: float) -> torch.Tensor:
    return models.output(model, timestep=torch.full((2,), step))


def test_calls_in_several_threads_at_different_steps_give_what_each_gives_alone(stepped):
    steps, wrong = (950.0, 600.0, 50.0), []
    truth = [drawn(stepped, step) for step in steps]
    assert not torch.equal(truth[0], truth[2])
    start = threading.Barrier(len(steps))

    def serve(index: int) -> None:
        start.wait()
        wrong.extend(index for _ in range(20) if not torch.equal(drawn(stepped, steps[index]), truth[index]))

    with ThreadPoolExecutor(len(steps)) as pool:
        list(pool.map(serve, range(len(steps))))
    assert wrong == []


def test_tasks_that_take_turns_give_what_each_gives_alone(stepped):
    async def serve(step: float, expected: torch.Tensor) -> bool:
        right = True
        for _ in range(5):
            right &= torch.equal(drawn(stepped, step), expected)
            await asyncio.sleep(0)
        return right

    async def both() -> list[bool]:
        return await asyncio.gather(*(serve(step, drawn(stepped, step)) for step in (950.0, 50.0)))

    assert asyncio.run(both()) == [True, True]


def test_a_thread_that_began_no_call_reads_the_newest_step_and_moves_nobodys():
    """A backward pass that runs a block again does so in a thread of its own on some devices."""
    running = Clock((300.0, 600.0))
    running.set(500)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: running.index.tolist()).result() == [1]
        pool.submit(running.set, 900.0).result()
        assert pool.submit(lambda: running.index.tolist()).result() == [2] and running.index.tolist() == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda clock: pickle.loads(pickle.dumps(clock))])
def test_a_copied_clock_goes_its_own_way(copied):
    running = Clock((300.0, 600.0))
    running.set(500)
    other = copied(running)
    assert other.index.tolist() == [1] and other.edges.tolist() == [300.0, 600.0]
    other.set(900)
    assert (running.index.tolist(), other.index.tolist()) == ([1], [2])
