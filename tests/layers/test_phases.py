"""Late formats: inputs rounded to another format from a step on, under the same bytes of weights."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import dq
from dq import layers
from dq.errors import DQError
from dq.host import mark
from dq.layers import packed_layers
from dq.layers.clock import Clock
from dq.plan import LayerPlan, Plan, TensorPlan
from tests import zoo
from tests.models import FLUX, PIXART, in_one_phase, load, output, phased, same_state

EARLY, LATE = torch.full((2,), 900.0), torch.full((2,), 100.0)
SWITCH = (333.5,)


@pytest.fixture
def switching():
    """A transformer whose linears take 4-bit inputs at first and 8-bit ones from t < 333.5 on, and its plan."""
    model = zoo.build(PIXART)
    return model, phased(model, SWITCH)


def alone(plan: Plan, phase: int, step: torch.Tensor) -> torch.Tensor:
    model = zoo.build(PIXART)
    in_one_phase(model, plan, phase)
    return output(model, timestep=step)


@pytest.mark.parametrize(
    ("switch", "rising", "phases"),
    [
        ((333.5,), False, {1000: 0, 333.5: 0, 333.4: 1, 0: 1}),
        ((0.7,), True, {0.0: 0, 0.69: 0, 0.7: 1, 1.0: 1}),
        ((666.5, 333.5), False, {999: 0, 500: 1, 10: 2}),
    ],
)
def test_phases_follow_the_run_whichever_way_its_timesteps_go(switch, rising, phases):
    running = Clock((), switch, rising)
    for timestep, phase in phases.items():
        running.set(timestep)
        assert (running.now, running.phase.tolist()) == (phase, [phase])
        assert running.found(timestep)[1].tolist() == [phase]


def test_buckets_and_phases_are_told_side_by_side():
    running = Clock((300.0, 600.0), (450.0,))
    running.set(500)
    assert (running.index.item(), running.now) == (1, 0)
    running.set(400)
    assert (running.index.item(), running.now) == (1, 1)
    assert pickle.loads(pickle.dumps(running)).now == 1


def test_every_phase_is_the_model_quantized_to_its_own_format(switching):
    model, plan = switching
    early, late = output(model, timestep=EARLY), output(model, timestep=LATE)
    assert torch.equal(early, alone(plan, 0, EARLY)) and torch.equal(late, alone(plan, 1, LATE))
    assert not torch.equal(late, alone(plan, 0, LATE))


def test_later_formats_add_no_byte(switching):
    model, plan = switching
    one = zoo.build(PIXART)
    in_one_phase(one, plan, 0)
    assert same_state(model, one)


@pytest.mark.parametrize("rising", [False, True])
def test_three_formats_may_follow_each_other(rising):
    model = zoo.build(PIXART)
    switch = (300.0, 600.0) if rising else (600.0, 300.0)
    plan = phased(model, switch, rising, late=("int6/token", "int8/token"))
    for phase, step in enumerate((50.0, 450.0, 900.0) if rising else (900.0, 450.0, 50.0)):
        step = torch.full((2,), step)
        assert torch.equal(output(model, timestep=step), alone(plan, phase, step))


def test_saved_and_loaded_it_switches_at_the_same_step(switching, tmp_path):
    model, plan = switching
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert mark.plan_of(again).to_dict() == plan.to_dict()
    assert same_state(model, again)
    for step in (EARLY, LATE):
        assert torch.equal(output(again, timestep=step), output(model, timestep=step))


def test_copies_and_group_offload_switch_as_well(switching):
    model, _ = switching
    before = [output(model, timestep=step) for step in (EARLY, LATE)]
    twin, cpu = copy.deepcopy(model), torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    for each in (twin, model):
        assert all(torch.equal(output(each, timestep=step), y) for step, y in zip((EARLY, LATE), before, strict=True))


def test_no_picture_depends_on_its_batch_mates(switching):
    model, _ = switching
    given = zoo.ENTRIES[PIXART].inputs(torch.Generator().manual_seed(0), model.dtype)
    for step in (EARLY, LATE):
        with torch.no_grad():
            whole = model(**given | {"timestep": step})[0]
            mates = given["hidden_states"] * torch.tensor([1.0, 50.0]).reshape(2, 1, 1, 1)
            mated = model(**given | {"timestep": step, "hidden_states": mates})[0]
        assert torch.equal(whole[0], mated[0]) and not torch.equal(whole[1], mated[1])


def test_calls_in_several_threads_are_each_in_their_own_phase(switching):
    model, _ = switching
    steps = (EARLY, LATE, EARLY, LATE)
    truth = [output(model, timestep=step) for step in steps]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda step: output(model, timestep=step), steps))
            assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_explain_names_the_kernel_of_each_phase(switching):
    model, plan = switching
    dq.set_backend("cpu", model)
    report = dq.explain(model)
    row = next(row for row in report.layers if row.late)
    assert (row.act, row.late) == ("int4/group:32", ("int8/token",))
    assert "int4 x int4" in row.kernel and "int4 x int8" in row.late_kernels[0]
    count = sum(bool(layer.late) for layer in plan.layers.values())
    assert any(f"{count} of {count} layers" in note and "timestep < 333.5" in note for note in report.notes)
    assert f"{row.kernel}; then {row.late_kernels[0]}" in str(report)


def test_an_adapter_adds_its_term_in_every_phase_fused_or_not():
    pytest.importorskip("peft")
    model = zoo.build(FLUX)
    phased(model, (0.3,))
    name, draw = "transformer_blocks.0.attn.to_q", torch.Generator().manual_seed(1)
    rows, columns = model.get_submodule(name).plan.shape
    state = {f"transformer.{name}.lora_A.weight": torch.randn(4, columns, generator=draw)}
    state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=draw) * 0.1
    steps = [torch.full((2,), step) for step in (0.9, 0.1)]
    before = [output(model, timestep=step) for step in steps]
    model.load_lora_adapter(state, adapter_name="a")
    added = [output(model, timestep=step) for step in steps]
    model.fuse_lora()
    fused = [output(model, timestep=step) for step in steps]
    model.unfuse_lora()
    model.delete_adapters("a")
    for plain, unfused, once, step in zip(before, added, fused, steps, strict=True):
        assert (unfused - plain).norm() > 1e-3 * plain.norm()
        assert (once - unfused).norm() <= 1e-4 * unfused.norm()
        assert torch.equal(output(model, timestep=step), plain)


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


STEPS = [torch.full((2,), step) for step in (950.0, 600.0, 333.0, 50.0)]


def test_one_graph_serves_all_phases_and_writes_to_no_input(switching, compiler):
    model, _ = switching
    before, made = [output(model, timestep=step) for step in STEPS], []

    def noting(graph: torch.fx.GraphModule, inputs):
        made.append(graph)

        def run(*args):
            versions = [each._version for each in args if isinstance(each, torch.Tensor)]
            y = graph(*args)
            assert versions == [each._version for each in args if isinstance(each, torch.Tensor)]
            return y

        return run

    model.compile(fullgraph=True, backend=noting)
    for step, expected in zip(STEPS, before, strict=True):
        assert (output(model, timestep=step) - expected).norm() <= 1e-5 * expected.norm()
    assert len(made) == 1


def test_compiled_blocks_switch_with_the_model_around_them_in_no_more_graphs(compiler):
    model = zoo.build(FLUX)
    phased(model, (0.3,))
    steps = [step / 1000 for step in STEPS]
    before, counts = [output(model, timestep=step) for step in steps], []
    with torch._dynamo.config.patch(error_on_recompile=False):
        for each in (model, zoo.build(FLUX)):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            each.compile_repeated_blocks(fullgraph=True, backend="eager")
            found = [output(each, timestep=step) for step in steps]
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if each is model:
                assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, before, strict=True))
    assert counts[0] == counts[1]


# --- bad input ----------------------------------------------------------------------------------------------------

LINEAR = LayerPlan("linear", (8, 8), TensorPlan.parse("int4/channel"), TensorPlan.parse("int4/token"))
INT8 = (TensorPlan.parse("int8/token"),)


@pytest.mark.parametrize(
    ("layer", "plan", "message"),
    [
        (replace(LINEAR, act=None, late=INT8), {"switch": (5.0,)}, "late is for rounded activations, this layer has"),
        (replace(LINEAR, late=INT8), {}, "late has 1 formats, the plan 0 switches"),
        (LINEAR, {"switch": (5.0,)}, "no layer has late formats; leave it out"),
        (replace(LINEAR, late=2 * INT8), {"switch": (5.0, 7.0)}, "outside of a schedule whose timesteps fall"),
        (replace(LINEAR, late=2 * INT8), {"switch": (7.0, 5.0), "rising": True}, "whose timesteps rise"),
        (replace(LINEAR, late=INT8), {"switch": (-3.0,)}, "expected values above 0"),
        (replace(LINEAR, late=(TensorPlan.parse("int8/tensor/static"),)), {"switch": (5.0,)}, "expected dynamic"),
        (replace(LINEAR, late=(TensorPlan.parse("int8/tensor"),)), {"switch": (5.0,)}, "expected token or group"),
        (replace(LINEAR, late=INT8), {"switch": (5.0,), "timestep": None}, "late needs the plan's timestep"),
    ],
)
def test_a_plan_that_cannot_switch_is_refused_in_one_line(layer, plan, message):
    data = Plan({"proj": layer}, **{"timestep": "t", **plan}).to_dict()
    with pytest.raises(DQError, match=message) as refusal:
        Plan.from_dict(data)
    assert "\n" not in str(refusal.value)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(32, 32)

    def forward(self, sample, t):
        return self.proj(sample)


def test_a_model_without_the_timestep_argument_is_refused_before_anything_changes():
    model = Held()
    plan = Plan({"proj": replace(LINEAR, shape=(32, 32), late=INT8)}, timestep="sigma", switch=(5.0,))
    with pytest.raises(DQError, match="has no argument 'sigma'"):
        dq.quantize(model, plan, progress=False)
    assert type(model.proj) is nn.Linear


def test_a_switch_that_the_scheduler_never_reaches_is_refused():
    import pipelines.tiny as tiny

    pipe = tiny.load("tiny-pixart")
    plan = phased(copy.deepcopy(pipe.transformer), (2000.0,))
    with pytest.raises(DQError, match=r"switch at timestep 2000 is outside of the schedule, .* at most 1000"):
        dq.quantize(pipe, plan, progress=False)
    assert not packed_layers(pipe.transformer)


def test_a_layer_rounds_to_the_format_of_the_phase_bit_for_bit():
    made = layers.pack("proj", nn.Linear(32, 32), replace(LINEAR, shape=(32, 32), late=INT8), torch.float32)
    ones = [layers.pack("proj", made.dense(), each, torch.float32) for each in made.plan.phases]
    made.clock, x = Clock((), (5.0,)), torch.randn(3, 32)
    with torch.no_grad():
        for timestep, one in ((7, ones[0]), (3, ones[1])):
            made.clock.set(timestep)
            for name, value in made.named_parameters():
                one.put(name, value.data)
            assert torch.equal(made(x), one(x))
