"""Rounded attention as a part of a plan: chosen by calibration calls, saved, shown, beside a fitted recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import DiffusionPipeline

import dq
from dq.attentionplan import INT8, WISHES, AttentionPlan, Wish
from dq.errors import DQError
from dq.fit import attention as choosing
from dq.fusions import attention
from dq.host import mark
from dq.layers import attending
from dq.plan import Plan
from dq.trace import capture
from dq.trace.records import Store
from pipelines import tiny

NAME, PART = "tiny-pixart", "transformer"
STEPS = 2


def calibration(**more):
    call = {key: value for key, value in tiny.CALL[NAME].items() if key != "num_inference_steps"}
    return dq.Calibration(["a red circle", "a blue square"], STEPS, 4, call_kwargs=call, **more)


def drawn(pipe):
    return tiny.pictures(pipe, NAME, ["a green triangle"], num_inference_steps=STEPS)


def planned(pipe):
    return mark.plan_of(getattr(pipe, PART)).attention


@cache
def cosines(folder) -> dict[str, list[float]]:
    """Of the first choice of sageattention2, recorded from the model as it is."""
    pipe = tiny.load(NAME)
    model = getattr(pipe, PART)
    capture.capture(pipe, {PART: model}, calibration(), folder, False)
    plans = attending.planned(model, WISHES["sage2"].choices[0])
    return choosing.cosines(model, {name: [plan] for name, plan in plans.items()}, Store(folder / PART))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calls")


def test_exactly_the_modules_under_the_threshold_stay_in_floating_point(folder):
    found = {name: value[0] for name, value in cosines(folder).items()}
    threshold = sorted(found.values())[5]
    model = getattr(tiny.load(NAME), PART)
    wish = Wish((WISHES["sage2"].choices[0],), "", threshold)
    plans, said = choosing.chosen(model, wish, Store(folder / PART))
    under = {name for name, plan in plans.items() if not plan.rounds}
    assert under == {name for name, value in found.items() if value < threshold} and len(under) == 5
    assert all(f"under {threshold:g}" in plans[name].reason for name in under)
    assert "in floating point in 5 modules" in said
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_next_choice_serves_what_the_first_one_cannot(folder):
    model, first = getattr(tiny.load(NAME), PART), replace(WISHES["sage2"].choices[0], q="int2/token", k="int2/token")
    plans, _ = choosing.chosen(model, Wish((first, INT8), "", 0.998), Store(folder / PART))
    assert INT8 in plans.values() and all("cosine" in plan.reason for plan in plans.values())


def test_without_a_threshold_the_best_choice_is_taken(folder):
    model, wish = getattr(tiny.load(NAME), PART), WISHES["adalog"]
    few = replace(wish, choices=(wish.choices[0], wish.choices[1], wish.choices[6]))
    menus = {name: list(few.choices) for name in attending.planned(model, INT8)}
    found = choosing.cosines(model, menus, Store(folder / PART))
    plans, _ = choosing.chosen(model, few, Store(folder / PART))
    assert all(plans[name] == few.choices[values.index(max(values))] for name, values in found.items())


def test_a_start_token_is_kept_apart_in_attention_to_a_text_alone():
    model = getattr(tiny.load(NAME), PART)
    plans = attending.planned(model, WISHES["dgq"].choices[0])
    assert {name.rpartition(".")[2]: plan.start for name, plan in plans.items()} == {"attn1": False, "attn2": True}


def test_a_fitted_recipe_takes_attention_along_and_both_are_reloaded_exactly(tmp_path):
    pipe = tiny.load(NAME)
    report = dq.quantize(pipe, "gptq-w4a8+sageattention2", calibration=calibration(), progress=False)
    plans = planned(pipe)
    assert len(plans) == 12 and all(plan.reason for plan in plans.values())
    assert any(line.startswith("attention: ") for line in report.notes)
    pictures = drawn(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert planned(again) == plans and [plan.reason for plan in planned(again).values()] == [
        plan.reason for plan in plans.values()
    ]
    assert torch.equal(drawn(again), pictures)
    notes = [line for line in dq.explain(again).notes if "attention is emulated" in line]
    assert notes and "int4/thread" in str(notes) + str(plans)


def test_without_data_every_module_gets_the_first_choice_and_pictures_differ_by_it_alone():
    pipe, plain = tiny.load(NAME), tiny.load(NAME)
    dq.quantize(pipe, "sageattention2", progress=False)
    dq.quantize(plain, "int8", progress=False)
    assert set(planned(pipe).values()) == {WISHES["sage2"].choices[0]} and not planned(plain)
    model = getattr(pipe, PART)
    assert not torch.equal(drawn(pipe), drawn(plain))
    attention.attach(model)
    assert torch.equal(drawn(pipe), drawn(plain))


def test_plans_of_attention_are_read_strictly():
    plan = Plan({}, attention={"a": AttentionPlan("int4/token", p="fp8", reason="why")})
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for row, message in (
        ({"q": 4}, "plan: attention of 'a': q is 4"),
        ({"r": "int8"}, "plan: attention of 'a': unknown field 'r'"),
        ({"q": "int8/row"}, "attention of 'a': q is 'int8/row'"),
    ):
        with pytest.raises(DQError, match=message):
            Plan.from_dict(plan.to_dict() | {"attention": {"a": row}})


def test_a_plan_for_other_modules_and_attention_twice_are_refused():
    pipe = tiny.load(NAME)
    with pytest.raises(DQError, match="attention of 'nowhere' of the plan is not in PixArtTransformer2DModel"):
        dq.quantize(pipe, Plan({}, attention={"nowhere": INT8}), progress=False)
    with pytest.raises(DQError, match="sets attention, which 'sageattention-int8' has already"):
        dq.quantize(pipe, "sageattention-int8+sageattention2", progress=False)
