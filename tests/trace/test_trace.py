"""The walk through a model: replayed units equal the live ones, two streams, bounded storage, kills, two processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import socket
import time

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import nn

from dq import cookbook, families, layers, planning
from dq.errors import DQError
from dq.families import Family
from dq.model import put
from dq.plan import LayerPlan, Plan, TensorPlan
from dq.trace.records import Store
from dq.trace.seen import Needs
from dq.trace.units import map_tree, tensors_in
from dq.trace.walk import Trace, _rise, edges_between
from tests import zoo

PIXART, UNET = "PixArtTransformer2DModel", "UNet2DConditionModel"
REPLAYED = (
    PIXART,
    UNET,
    "UNet2DModel",
    "HunyuanDiT2DModel",
    "FluxTransformer2DModel",
    "LTX2VideoTransformer3DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "DiTTransformer2DModel",
    "HiDreamImageTransformer2DModel",
    "StableCascadeUNet",
    "MochiTransformer3DModel",  # its pooler rounds by the alignment of what it gets
)


def record(name, folder, count=3):
    """Seeded calls of a zoo model, each at a timestep of its own, as calibration leaves them."""
    store, entry = Store(folder), zoo.ENTRIES[name]
    for call in range(count):
        inputs = entry.inputs(torch.Generator().manual_seed(call), torch.float32)
        for time_name in entry.timesteps:
            value = inputs[time_name]
            inputs[time_name] = value // (1 + call) if value.dtype == torch.long else value / (1 + call)
        noise = float(inputs[entry.timesteps[0]].max())
        info = {"run": call, "step": 0, "timestep": noise, "branches": [0, 1]}
        store.write(f"calls/{call:05}", {"info": info, "args": (), "kwargs": inputs})


def traced(name, folder, model=None, **options):
    model = model or zoo.build(name)
    plan = planning.make_plan(model, cookbook.get("int8"))
    return Trace(model, plan, families.of(model), folder, **options)


def packed(unit):
    return {name: layers.pack(name, unit.layer(name), plan, torch.float32) for name, plan in unit.layers.items()}


def walk(trace, skip=lambda index: False):
    """Every unit that is left, fitted by plain rounding, or what an earlier walk kept."""
    for index in range(trace.finished, len(trace.units)):
        unit = trace.units[index]
        trace.observe(unit, Needs())
        if skip(index):
            trace.skip(unit)
        else:
            trace.advance(unit, packed(unit))


def same(left, right):
    left, right = tensors_in(left), tensors_in(right)
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@torch.no_grad()
def live(trace):
    """Outputs of every unit and of the model, call by call, from plain runs with hooks."""
    outputs, ends = [], []
    for key in trace._calls:
        found = {}

        def keep(name, found=found):
            return lambda module, args, output: found.__setitem__(name, map_tree(output, torch.clone))

        hooks = [unit.module.register_forward_hook(keep(unit.name)) for unit in trace.units]
        tree = trace._store.read(key)
        ends.append(trace.model(*tree["args"], **tree["kwargs"]))
        outputs.append(found)
        for hook in hooks:
            hook.remove()
    return outputs, ends


def disk_bytes(folder, prefix):
    """Checksum of everything stored below some keys."""
    store, digest = Store(folder), hashlib.sha1()
    for key in store.keys(prefix):
        digest.update(key.encode())
        for tensor in tensors_in(store.read(key)):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_units_equal_the_live_ones(name, tmp_path):
    record(name, tmp_path, 2)
    trace = traced(name, tmp_path)
    assert len(trace.units) > 2
    outputs, ends = live(trace)
    for unit in trace.units:
        trace.observe(unit, Needs())
        seen = list(trace.calls(unit, "hat"))
        assert len(seen) == 2
        for call, found in zip(seen, outputs, strict=True):
            assert same(call.output, found[unit.name]), unit.name
        trace.skip(unit)
    for stream in ("full", "hat"):  # with nothing quantized the streams are one
        assert all(same(a, b) for a, b in zip(trace.outputs(stream), ends, strict=True))


def test_units_run_on_what_the_quantized_units_before_give(tmp_path):
    """The walk ends with the output of the model in which every fitted layer is swapped."""

    record(UNET, tmp_path, 1)
    trace = traced(UNET, tmp_path)
    walk(trace, skip=lambda index: index % 3 == 0)
    model = zoo.build(UNET)
    for index, unit in enumerate(trace.units):
        if index % 3:
            for name, layer in packed(unit).items():
                put(model, name, layer)
    with torch.no_grad():
        for key, end in zip(trace._calls, trace.outputs("hat"), strict=True):
            assert same(model(**trace._store.read(key)["kwargs"]), end)
    full, hat = next(trace.outputs("full")), next(trace.outputs("hat"))
    assert not same(full, hat)


@torch.no_grad()
def test_a_unit_that_is_one_layer_sees_its_own_input(tmp_path):
    record("UNet2DConditionModel", tmp_path, count=2)
    trace = traced("UNet2DConditionModel", tmp_path)
    alone = [unit for unit in trace.units if unit.name in unit.layers]
    assert alone
    for unit in trace.units:
        if unit in alone:
            seen = trace.observe(unit, Needs(rows=100, gram=True, hat=False)).layers[unit.name]
            inputs = torch.cat([args[0].flatten() for args, _ in trace.inputs(unit)])
            assert seen.gram.diagonal().min() > 0 and torch.isin(seen.x.flatten(), inputs).all()
        trace.skip(unit)


def test_only_outputs_that_are_needed_later_stay(tmp_path):
    record(PIXART, tmp_path, 2)
    trace = traced(PIXART, tmp_path)
    blocks = [index for index, unit in enumerate(trace.units) if unit.name.startswith("transformer_blocks")]
    for index in range(len(trace.units)):
        unit = trace.units[index]
        trace.observe(unit, Needs())
        trace.advance(unit, packed(unit))
        for stream in ("full", "hat"):
            kept = {int(key.split("/")[1]) for key in trace._store.keys(f"{stream}/")}
            assert len(kept & set(blocks)) <= 1  # two while the next one is observed
    assert not trace._store.keys("full/003/") and trace._store.keys(f"full/{blocks[-1]:03}/")


def test_long_skips_are_found(tmp_path):
    record(UNET, tmp_path, 1)
    trace = traced(UNET, tmp_path)
    place = {unit.name: index for index, unit in enumerate(trace.units)}
    skip, late = place["down_blocks.0.resnets.0"], place["up_blocks.1.resnets.0"]
    assert skip in trace._layout.feeds[late] and trace._layout.last_use(skip) == late
    assert not trace.unfit and place["mid_block.resnets.0"] < place["mid_block.attentions.0.proj_in"] < late


def test_the_model_comes_out_as_it_was(tmp_path):
    record(PIXART, tmp_path, 1)
    model = zoo.build(PIXART).train()
    block = model.transformer_blocks[0]
    given = block.forward
    block.forward = lambda *args, **kwargs: given(*args, **kwargs)  # as offloading hooks do
    own, before = block.forward, list(model.modules())
    walk(traced(PIXART, tmp_path, model))
    assert block.forward is own and list(model.modules()) == before and all(m.training for m in before)
    assert not any("forward" in vars(m) for m in before if m is not block)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in before)


class Odd(nn.Module):
    """Blocks in place writing, tuples, a choice by an argument, a layer called twice, one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.twice, self.never = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, timestep, more=False):
        skip, _ = self.blocks[0](x + timestep, extra={"a": x})
        x, _ = self.blocks[1](skip.clone(), extra={"a": x})
        x += 1
        x[:, :2] += skip[:, :2]
        if more:
            x, _ = self.blocks[2](x, extra={"a": x})
        return self.twice(self.twice(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, extra):
        x += self.a(x)
        return x + self.b(x) + extra["a"], {"twice": 2 * x}


def odd_trace(folder):
    model, store = Odd(), Store(folder)
    for call in range(4):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(call))
        inputs = {"x": x, "timestep": torch.tensor(call), "more": call % 2 == 1}
        store.write(
            f"calls/{call}", {"info": {"timestep": float(call), "branches": [1, 0]}, "args": (), "kwargs": inputs}
        )
    named = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = Plan({name: LayerPlan("linear", (16, 16), TensorPlan.parse("int8/channel")) for name in named})
    return Trace(model, plan, Family("odd", ("Odd",), ("blocks",)), folder)


def test_paths_that_only_some_calls_take(tmp_path):
    trace = odd_trace(tmp_path)
    assert [unit.name for unit in trace.units] == ["blocks.0", "blocks.1", "blocks.2"]
    assert trace.unfit == {"twice": "called 2 times per model call", "never": "never called"}
    assert [sorted(feeds) for feeds in trace._layout.feeds] == [[], [0], [0, 1]]
    outputs, ends = live(trace)
    for index, unit in enumerate(trace.units):
        seen = trace.observe(unit, Needs(rows=8))
        expected = [found[unit.name] for found in outputs if unit.name in found]
        assert all(same(call.output, out) for call, out in zip(seen.calls("full"), expected, strict=True))
        assert set(seen.layers[f"{unit.name}.a"].bucket.tolist()) <= ({1, 3} if index == 2 else {0, 1, 2, 3})
        trace.skip(unit)
    assert all(same(a, b) for a, b in zip(trace.outputs(), ends, strict=True))


def test_units_out_of_turn_unknown_layers_and_empty_folders_are_refused(tmp_path):
    trace = odd_trace(tmp_path)
    with pytest.raises(DQError, match=r"unit 'blocks.1' is out of turn, expected blocks.0"):
        trace.observe(trace.units[1], Needs())
    with pytest.raises(DQError, match=r"has no planned layer 'blocks.9'"):
        trace.advance(trace.units[0], {"blocks.9": nn.Linear(16, 16)})
    with pytest.raises(DQError, match="holds no recorded calls"):
        traced(PIXART, tmp_path / "empty")


def test_edges_lie_between_the_timesteps_seen():
    assert edges_between([]) == () and edges_between([5.0, 5.0]) == ()
    assert edges_between([900, 100, 100, 500]) == (300.0, 700.0)
    near = edges_between([1.0, 1.0 + 2**-23])
    assert near == (1.0 + 2**-23,)
    between = edges_between([900, 100, 100, 500], between=True)
    assert len(between) == 42 and between == tuple(sorted(set(between)))
    where = np.digitize([100, 500, 900], between)
    assert where.tolist() == [0, 21, 42], "21 buckets from one timestep to the next"
    assert (between[20] + between[21]) / 2 == pytest.approx(500), "which has its own in the middle"
    many = edges_between(list(range(1000)))
    assert len(many) == 63 and sorted(many) == list(many)


def test_which_end_of_the_timesteps_is_noisy_is_read_from_the_runs():
    falling = [{"step": step, "timestep": 900.0 - 100 * step} for step in range(8)]
    assert not _rise(falling) and _rise([{**info, "timestep": -info["timestep"]} for info in falling])
    assert not _rise([{"step": -1, "timestep": 1.0}, {"step": -1, "timestep": 2.0}, {"step": 0, "timestep": None}])


def test_some_of_many_calls_are_chosen_over_all_timesteps(tmp_path):
    record(PIXART, tmp_path, 8)
    trace = traced(PIXART, tmp_path, most=2)
    assert len(trace._calls) == 2 and len(trace.edges) == 1
    times = [Store(tmp_path).read(f"calls/{call:05}")["info"]["timestep"] for call in range(8)]
    assert min(trace._times) <= sorted(times)[3] and max(trace._times) >= sorted(times)[4]


def test_a_layer_with_a_table_sees_the_step_of_its_call(tmp_path):
    trace = odd_trace(tmp_path)

    class Spy(nn.Module):
        plan = LayerPlan("linear", (16, 16), TensorPlan.parse("int8/channel"), steps=4)

        def forward(self, x):
            shown.append(int(self.clock.index))
            return x

    shown = []
    trace.observe(trace.units[0], Needs())
    trace.advance(trace.units[0], {"blocks.0.a": Spy()})
    assert shown == [0, 1, 2, 3] and trace.edges == (0.5, 1.5, 2.5)


def test_a_restart_goes_on_after_the_last_finished_unit(tmp_path, monkeypatch):
    record(PIXART, tmp_path, 2)
    trace = traced(PIXART, tmp_path)
    for unit in trace.units[:5]:
        trace.observe(unit, Needs())
        trace.advance(unit, packed(unit))
    trace.save_unit(5, {"w": torch.arange(3)}, {"rank": 4, "name": "x"})
    again = traced(PIXART, tmp_path)
    assert again.finished == 5 and again.load_unit(6) is None
    tensors, note = again.load_unit(5)
    assert note == {"rank": 4, "name": "x"} and torch.equal(tensors["w"], torch.arange(3))
    again.units[4].module.forward = None  # nobody runs a finished unit again
    walk(again)
    other = traced(PIXART, tmp_path, identity="another method")
    assert other.finished == 0 and other.load_unit(5) is None


def test_a_damaged_file_is_named(tmp_path):
    record(PIXART, tmp_path, 1)
    trace = traced(PIXART, tmp_path)
    trace.save_unit(0, {"w": torch.randn(100)}, {})
    file = tmp_path / "units/000.entry/tree.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-8], whole[:-4] + b"abcd"):
        file.write_bytes(broken)
        with pytest.raises(DQError, match=r"units/000.*damaged"):
            trace.load_unit(0)


def work(folder, env):
    """What a process of a calibration does; runs in a fork."""
    os.environ.update(env)
    PartialState._reset_state()
    trace = traced(PIXART, folder)
    for index in range(trace.finished, len(trace.units)):
        unit = trace.units[index]
        seen = trace.observe(unit, Needs(rows=8, gram=True, absmax=True))
        if PartialState().is_main_process:
            fields = ("x", "hat", "gram", "absmax", "low", "bucket", "branch")
            rows = {f"{name}.{key}": getattr(item, key) for name, item in seen.layers.items() for key in fields}
            trace.save_unit(index, rows, {})
        trace.advance(unit, packed(unit))


def start(folder, **env):
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, env))
    process.start()
    return process


def end(process):
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """-> seconds of an undisturbed process, and what it leaves, checksums by kind."""
    folder = tmp_path_factory.mktemp("whole")
    record(PIXART, folder, 9)
    began = time.perf_counter()
    assert end(start(folder)) == 0
    seconds = time.perf_counter() - began
    return seconds, {prefix: disk_bytes(folder, prefix) for prefix in ("units/", "full/", "hat/")}


def test_killed_at_any_moment_it_ends_with_the_same_bytes(whole, tmp_path):
    seconds, left = whole
    record(PIXART, tmp_path, 9)
    codes = []
    for share in (0.3, 0.5, 0.6):
        process = start(tmp_path)
        time.sleep(share * seconds)
        process.kill()
        codes.append(end(process))
    assert -9 in codes
    assert end(start(tmp_path)) == 0
    assert {prefix: disk_bytes(tmp_path, prefix) for prefix in left} == left


def test_two_processes_give_the_bytes_of_one(whole, tmp_path):
    record(PIXART, tmp_path, 9)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    both = [start(tmp_path, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert [end(process) for process in both] == [0, 0]
    _, left = whole
    assert {prefix: disk_bytes(tmp_path, prefix) for prefix in left} == left
    assert Store(tmp_path).keys("pieces/")  # the work was shared out
