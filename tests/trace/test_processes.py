"""What is measured and fitted is the same to the bit, whoever shares the work and wherever weights lie in memory."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

import dq
from dq import methods
from dq.layers.memory import ALIGNMENT, aligned
from dq.trace.calibration import Calibration
from dq.trace.seen import Needs
from dq.trace.units import tensors_in
from tests.shared import ran

RECIPE = "svdquant-int4"
EVERYTHING = Needs(rows=64, gram=True, absmax=True, calls=True, hat=True)
ODD = {1: 40, 2: 0, 3: 8}  # processes: bytes between a multiple of 64 and where weights begin, as files leave them


class Denoiser(nn.Module):
    """Linears on tokens, on one row a sample (which libraries sum by where the weight lies), and a convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(64, 64))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))
        self.mixer = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, hidden_states, timestep, text=None):
        x = hidden_states + (timestep / 1000).reshape(-1, 1, 1)
        shift = self.modulation(text[:, 0] + timestep / 1000)
        for block in self.blocks:
            x = x + block(x + shift[:, None])
        return x + self.mixer(x.transpose(1, 2).unflatten(2, (2, 4))).flatten(2).transpose(1, 2)


class Pipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None):
        text = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(len(prompt)))
        x = torch.randn(1, 8, 64, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep, text=text), timestep, x).prev_sample
        return x


def moved(model, offset):
    """The same model, its weights `offset` bytes past multiples of 64."""
    for value in model.parameters():
        memory = torch.empty(value.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT + offset
        value.data = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape).copy_(value.data)
    return model


def watched(fit, seen_by_unit):
    """A method's `fit` that also keeps every statistic it is given, and says which of them lie at odd addresses."""

    def wrapped(unit, seen, options):
        found = {
            f"{name} {field}": value for name, layer in seen.layers.items() for field, value in vars(layer).items()
        }
        found |= {f"call {i} {s}": call for s in ("full", "hat") for i, call in enumerate(seen.calls(s))}
        weights = dict(unit.module.named_parameters())
        odd = [name for name, value in {**found, **weights}.items() if _odd(value)]
        tensors = {name: [value.clone() for value in _tensors(tree)] for name, tree in found.items()}
        seen_by_unit[unit.name] = {"tensors": tensors, "odd": odd}
        return fit(unit, seen, options)

    return wrapped


def _tensors(value):
    return tensors_in((value.args, value.kwargs, value.output) if hasattr(value, "args") else value)


def _odd(value):
    return any(tensor.data_ptr() % ALIGNMENT for tensor in _tensors(value))


def work(rank, size, port, folder):
    shared = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ.update(shared | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    PartialState._reset_state()
    method, kept = methods.files()["svdquant"], {}
    method.NEEDS, method.fit = EVERYTHING, watched(method.fit, kept)
    pipe = Pipeline(moved(Denoiser().eval(), ODD[size]), DDIMScheduler())
    before = [value.data_ptr() for value in pipe.transformer.parameters()]
    settings = Calibration(prompts=["a", "bb"], steps=4, samples=16, policy="all", folder=folder / "work")
    explored = replace(methods.recipes()[RECIPE], options={"rank": 8, "share": 0.5})
    with aligned([pipe.transformer]):
        assert ODD[size] == 0 or before != [value.data_ptr() for value in pipe.transformer.parameters()]
    assert before == [value.data_ptr() for value in pipe.transformer.parameters()]
    dq.quantize(pipe, explored, calibration=settings, progress=False)
    torch.save({"state": pipe.transformer.state_dict(), "seen": kept}, folder / f"out{rank}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return {size: ran(work, size, folder / str(size)) for size in ODD}


@pytest.mark.parametrize("size", [2, 3])
def test_every_statistic_is_equal_to_the_bit_however_many_processes_gather_it(runs, size):
    one, more = runs[1][0]["seen"], runs[size][0]["seen"]
    assert one.keys() == more.keys() and {"modulation.1", "blocks.0", "mixer"} <= one.keys()
    kinds = {name.rpartition(" ")[2] for unit in one.values() for name in unit["tensors"]}
    assert {"x", "hat", "bucket", "branch", "absmax", "low", "high", "gram", "full"} <= kinds
    for unit, found in one.items():
        for name, tensors in found["tensors"].items():
            others = more[unit]["tensors"][name]
            assert len(tensors) == len(others) and all(map(torch.equal, tensors, others)), f"{unit}: {name}"


@pytest.mark.parametrize("size", ODD)
def test_methods_work_in_aligned_memory(runs, size):
    """Sums depend on where an operand of a matrix product lies: nothing a method is given lies at an odd address."""
    assert {unit: found["odd"] for unit, found in runs[size][0]["seen"].items() if found["odd"]} == {}


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_ends_with_the_weights_of_one(runs, size):
    one = runs[1][0]["state"]
    for run in runs[size]:
        assert run["state"].keys() == one.keys()
        assert [name for name, value in one.items() if not torch.equal(value, run["state"][name])] == []
