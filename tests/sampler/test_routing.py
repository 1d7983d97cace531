"""The rule that chooses input formats step by step, on a trained model: its limits, its guards, and the plan."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.hooks import apply_group_offloading

import dq
from dq import planning
from dq.fit import routes
from dq.host import mark
from dq.layers import packed_layers
from dq.sampler import routing
from dq.sampler.caches import parts
from pipelines import tiny
from tests import zoo
from tests.models import UNET, load

MODEL, STEPS = "tiny-pixart", 4
WISH = dq.Recipe("routed", ("int4/group:64", "int4/group:64"), ("int8/channel", "int8a/tensor"))
LATE = dq.TensorPlan.parse("int8/token")


def quantized(threshold: float | None, first: dq.TensorPlan | None = None, **fields):
    """tiny-pixart in 4-bit weights; under a rule that errors are the change itself, or with one format of inputs."""
    pipe = tiny.load(MODEL)
    plan = planning.make_plan(pipe.transformer, WISH)
    for name, layer in plan.layers.items():
        if layer.act is not None and routing.block_of(name, parts.blocks(pipe.transformer)):
            rule = {} if threshold is None else {"late": (LATE,), "route": (1.0, 0.0)}
            plan.layers[name] = replace(layer, act=first or layer.act, **rule)
    dq.quantize(pipe, replace(plan, route=threshold, **fields), progress=False)
    return pipe


def drawn(pipe, steps: int = STEPS) -> torch.Tensor:
    return tiny.pictures(pipe, MODEL, ["a red circle"], num_inference_steps=steps)


class Seen(routing.Router):
    """A router that keeps what it saw and decided: {block: change} and {block: late} of every step."""

    def turn(self, call: int) -> None:
        super().turn(call)
        self.changes = [*getattr(self, "changes", []), self.here]
        late = {block: [rule.turn.now for rule in rules] for block, rules in self.rules.items()}
        self.decided = [*getattr(self, "decided", []), late]


def watched(pipe) -> Seen:
    role = routing.of(pipe.transformer)
    role.watcher = Seen(role.watcher.rules, role.watcher.threshold)
    return role.watcher


def test_switched_off_it_is_the_plain_recipe_to_the_bit():
    pipe, plain = quantized(0.5), drawn(quantized(None))
    ruled = drawn(pipe)
    dq.set_route(pipe, False)
    assert torch.equal(drawn(pipe), plain) and not torch.equal(ruled, plain)
    dq.set_route(pipe, True)
    assert torch.equal(drawn(pipe), ruled)


def test_a_threshold_below_all_errors_is_the_late_format_throughout():
    assert torch.equal(drawn(quantized(-1.0)), drawn(quantized(None, LATE)))


def test_eight_bits_are_where_a_block_changed_much_and_in_the_first_step():
    pipe = quantized(0.5)
    seen = watched(pipe)
    drawn(pipe)
    assert len(seen.decided) == STEPS and all(all(late) for late in seen.decided[0].values())
    for before, decided in zip(seen.changes, seen.decided[1:], strict=False):
        for block, late in decided.items():
            assert set(late) == {int(float(before[block]) > 0.5)}
    later = [late for decided in seen.decided[1:] for row in decided.values() for late in row]
    assert 0 < sum(later) < len(later), "the threshold lies among the changes"
    assert routing.share(pipe.transformer) == pytest.approx(seen.late / seen.total)


def test_no_step_of_a_run_before_decides_in_the_next_one():
    pipe = quantized(0.5)
    first, seen = drawn(pipe), watched(pipe)
    assert torch.equal(drawn(pipe), first)
    assert all(all(late) for late in seen.decided[0].values())


def test_a_block_that_was_left_out_takes_the_late_format_when_it_runs_again():
    pipe = quantized(1e9, cache="deltacache:10")
    seen = watched(pipe)
    drawn(pipe, 6)
    ran = [bool(changes) for changes in seen.changes]
    assert ran == [True, True, False, False, True, True], "the first, the last, and one after two that were left out"
    late = [any(map(any, decided.values())) for decided in seen.decided]
    assert [late[step] for step, there in enumerate(ran) if there] == [True, False, True, False]


def test_saved_and_loaded_it_decides_the_same(tmp_path):
    pipe = quantized(0.5, cache="deltacache:0.3")
    wanted = drawn(pipe, 6)
    pipe.transformer.save_pretrained(tmp_path)
    again = tiny.load(MODEL)
    again.transformer = load(tmp_path)
    assert torch.equal(drawn(again, 6), wanted)
    assert mark.plan_of(again.transformer).to_dict() == mark.plan_of(pipe.transformer).to_dict()
    said = " ".join(dq.explain(again).notes)
    assert (
        "predicts an error above 0.5" in said and "of the work of its layers so far was in their late format" in said
    )
    dq.set_route(again, False)
    assert any("rule: switched off" in note for note in dq.explain(again).notes)
    dq.dequantize(again)
    assert routing.of(again.transformer) is None


def test_copies_and_offloaded_models_decide_as_well():
    pipe, cpu = quantized(0.5), torch.device("cpu")
    wanted, own = drawn(pipe), pipe.transformer
    pipe.transformer = copy.deepcopy(own)
    assert torch.equal(drawn(pipe), wanted)
    pipe.transformer = own
    apply_group_offloading(own, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(drawn(pipe), wanted)


@pytest.mark.slow
def test_blocks_that_are_compiled_decide_as_well():
    pipe, seen = quantized(0.5), []
    wanted = drawn(pipe)
    for block in pipe.transformer.transformer_blocks[:2]:
        block.compile(backend=lambda graph, _: seen.append(graph) or graph.forward)
    assert (drawn(pipe) - wanted).abs().max() < 1e-3 and seen
    torch._dynamo.reset()


def test_a_rule_is_fitted_to_the_runs_and_keeps_to_the_mean_bits():
    pipe, call = tiny.load(MODEL), {k: v for k, v in tiny.CALL[MODEL].items() if k != "num_inference_steps"}
    seen = dq.Calibration(prompts=["a red circle"], steps=STEPS, samples=STEPS, call_kwargs=call)
    keep = [r"transformer_blocks\.[1-9]"]
    report = dq.quantize(pipe, "sixbit-int4", calibration=seen, keep=keep, progress=False)
    plan = mark.plan_of(pipe.transformer)
    late = {name for name, layer in plan.layers.items() if layer.late}
    assert late and all(plan.layers[name].route and name.startswith("transformer_blocks.0.") for name in late)
    assert plan.route is not None and plan.cache == ""
    assert any("rule of" in note and "bits on average" in note for note in report.notes)
    drawn(pipe)
    assert 0.25 <= routing.share(pipe.transformer) < 1


def test_the_line_is_that_of_least_squares():
    x = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    assert routes.line(torch.stack([x, 2 * x + 0.5], 1)) == pytest.approx((2.0, 0.5))
    assert routes.line(torch.stack([x, 2 * x + 0.5], 1), follow=False) == pytest.approx(
        (0.0, 2 * float(x.mean()) + 0.5)
    )
    assert routes.line(torch.stack([torch.ones(3).double(), x], 1)) == pytest.approx((0.0, float(x.mean())))
    assert routes.correlation(torch.stack([x, -x], 1)) == pytest.approx(-1)


@pytest.mark.parametrize("wanted, late", [(4.0, 0), (6.0, 4), (7.9, 7), (8.0, 8)])
def test_the_threshold_leaves_as_many_steps_late_as_the_mean_bits_allow(wanted, late):
    errors = {"a": torch.arange(1.0, 5.0), "b": torch.arange(5.0, 9.0)}
    found, mean = routes.threshold(errors, {"a": 0, "b": 0}, {"a": 10, "b": 10}, {"a": (4, 8), "b": (4, 8)}, wanted)
    assert sum(float(value > found) for values in errors.values() for value in values) == late
    assert mean == 4 + 4 * late / 8


def made(recipe: str):
    seen = dq.Calibration(prompts=["a red circle"], steps=4, samples=4)
    return dq.quantize(tiny.load(MODEL), recipe, calibration=seen, progress=False)


@pytest.mark.parametrize(
    "ask, message",
    [
        (
            lambda: dq.quantize(zoo.build(UNET), "sixbit-int4", calibration=lambda model: None),
            "no list of transformer",
        ),
        (lambda: made("gptq-w4a8+sixbit"), "expected a mean between the bits"),
        (lambda: made("int8+sixbit"), "and a method"),
        (lambda: made("svdquant-int4-late8+sixbit"), "sets late, which"),
        (lambda: dq.set_route(quantized(None), False), "has no rule in its plan"),
        (lambda: quantized(0.5, switch=(300.0,)), "expected one of them"),
        (lambda: quantized(0.5, timestep=None), "timestep"),
        (
            lambda: dq.quantize(tiny.load(MODEL), "sixbit-int4", calibration=dq.Calibration(), tune=dq.Tune()),
            "leave tune",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(ask, message):
    with pytest.raises(dq.DQError, match=message) as error:
        ask()
    assert "\n" not in str(error.value)


def test_a_layer_with_half_a_rule_is_refused():
    plan = mark.plan_of(quantized(0.5).transformer)
    name = next(name for name, layer in plan.layers.items() if layer.late)
    plan.layers[name] = replace(plan.layers[name], route=(1.0,))
    with pytest.raises(dq.DQError, match="expected a slope and an offset"):
        dq.quantize(tiny.load(MODEL), plan, progress=False)


def test_every_layer_with_a_rule_has_a_turn_of_its_own():
    layers = [layer for layer in packed_layers(quantized(0.5).transformer).values() if layer.plan.late]
    assert len({id(layer.clock) for layer in layers}) == len(layers)
