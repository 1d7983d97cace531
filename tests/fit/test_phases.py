"""Fitting layers that switch formats: when they switch, and what the mixture of both formats is to the fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dq
from dq.errors import DQError
from dq.fit import drafts, moments, phases, smooth
from dq.fit.phases import Schedule
from dq.host import mark
from dq.layers import packed_layers
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from dq.trace.records import Store
from dq.trace.seen import LayerSeen
from tests.models import same_state

INT4, INT8 = TensorPlan.parse("int4/group:16"), TensorPlan.parse("int8/token")
LATE8 = Recipe("late", ("int4/group:16", "int4/group:16"), ("int8", None), late=("int8/token",), switch=(2 / 3,),
               method="svdquant")  # fmt: skip
PHASED = LayerPlan("linear", (24, 32), TensorPlan.parse("int4/group:16"), INT4, late=(INT8,))


def recorded(folder, moments_: list[tuple[int, float | None]]):
    """A folder of calls at these (step, timestep)."""
    store = Store(folder)
    for index, (step, time) in enumerate(moments_):
        info = {"run": 0, "step": step, "timestep": time, "branches": [0]}
        store.write(f"calls/{index:05}", {"info": info, "args": (), "kwargs": {}}, share=False)
    return folder


def schedule(tmp_path, recipe=LATE8, **parts) -> dict[str, Schedule]:
    folders = {part: recorded(tmp_path / part, found) for part, found in parts.items()}
    return phases.schedules(folders, "recipe", recipe.switch)


FALLING = [(step, 950.0 - 100 * step) for step in range(9)]


def test_the_last_third_of_the_steps_is_late(tmp_path):
    assert schedule(tmp_path, model=FALLING) == {"model": Schedule((0, 1), (400.0,), False)}  # between 450 and 350


def test_steps_are_counted_and_not_calls(tmp_path):
    """A second-order sampler calls twice at one step, guidance as two calls at every one of the later steps."""
    twice = sorted(FALLING + FALLING[3:] + FALLING[6:])
    assert schedule(tmp_path, model=twice)["model"].switch == (400.0,)


def test_timesteps_that_rise_switch_the_other_way_round(tmp_path):
    found = schedule(tmp_path, model=[(step, step / 9) for step in range(9)])["model"]
    assert found.rising and found.switch == pytest.approx((5.5 / 9,), abs=1e-6)


def test_calls_that_nobody_counted_are_ordered_by_their_timestep(tmp_path):
    assert schedule(tmp_path, model=[(-1, time) for _, time in FALLING])["model"].switch == (400.0,)


def test_of_two_experts_each_has_the_phases_of_the_run_that_it_sees(tmp_path):
    found = schedule(tmp_path, high=FALLING[:4], low=FALLING[4:])
    assert found == {"high": Schedule((0,), (), False), "low": Schedule((0, 1), (400.0,), False)}
    plan = Plan({"proj": replace(PHASED, late=())}, timestep="t")
    assert phases.planned(plan, LATE8, found["high"]) == plan
    low = phases.planned(plan, LATE8, found["low"])
    assert low.switch == (400.0,) and low.layers["proj"] == PHASED
    late_only = phases.planned(plan, LATE8, Schedule((1,)))
    assert late_only.switch == () and late_only.layers["proj"] == replace(PHASED, act=INT8, late=())


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (FALLING[:1], r"switch \[0.667\] of a run of 1 steps is outside of the schedule"),
        ([(0, None)], "called without one"),
        ([(0, 900.0), (1, 500.0), (2, 700.0)], "neither rise nor fall"),
    ],
)
def test_runs_that_cannot_be_cut_are_refused(tmp_path, calls, message):
    with pytest.raises(DQError, match=message):
        schedule(tmp_path, model=calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"switch": (1.5,)}, r"switch \[1.5\] is outside of the schedule, expected rising shares"),
        ({"switch": (0.0,)}, "outside of the schedule"),
        ({"switch": ()}, "1 late formats, 0 switches"),
        ({"method": ""}, "late formats need a schedule to be calibrated on"),
        ({"linear": ("int4", None)}, "late is for rounded activations, its linears have none"),
        ({"late": ("int99",)}, "int99"),
    ],
)
def test_a_recipe_that_cannot_switch_is_refused_in_one_line(changes, message):
    with pytest.raises(DQError, match=message) as refusal:
        Recipe.from_dict({**replace(LATE8, **changes).to_dict()})
    assert "\n" not in str(refusal.value)


def seen(rows: int = 96) -> LayerSeen:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=draw) * torch.linspace(0.2, 3, 32)
    phase = (torch.arange(rows) % 3 == 2).long()
    zeros = torch.zeros(rows, dtype=torch.long)
    return LayerSeen(x, x, zeros, zeros, gram=x.t() @ x / rows, phase=phase)


@torch.no_grad()
def test_every_row_of_a_draft_is_rounded_as_in_its_phase():
    layer, data = nn.Linear(32, 24), seen()
    made = drafts.draft(layer, PHASED)
    early, late = (drafts.draft(layer, each) for each in PHASED.phases)
    y = made(data.x, data.phase)
    for index, one in enumerate((early, late)):
        rows = data.phase == index
        torch.testing.assert_close(y[rows], one(data.x[rows]))


@torch.no_grad()
def test_the_noise_that_a_weight_is_fitted_to_is_the_mean_over_rows_of_all_phases():
    layer, data = nn.Linear(32, 24), seen()
    noises = []
    for index, plan in enumerate(PHASED.phases):
        rows = data.phase == index
        own = replace(data, x=data.x[rows], hat=data.hat[rows], phase=data.phase[rows])
        noises.append(moments.noise(own, drafts.draft(layer, plan)))
    mixed = moments.noise(data, drafts.draft(layer, PHASED))
    torch.testing.assert_close(mixed, (2 * noises[0] + noises[1]) / 3)
    assert (noises[1] < 0.1 * noises[0]).all()


@torch.no_grad()
def test_a_search_changes_the_format_of_its_own_bits_in_whatever_phase():
    layer, wanted = nn.Linear(32, 24), TensorPlan.parse("int4a/group:16")
    for plan in (PHASED, replace(PHASED, act=INT8, late=(INT4,))):
        made = smooth.transformed(layer, plan, smooth.Transform(act=wanted)).plan
        assert {made.act, *made.late} == {INT8, wanted} and (made.act == INT8) == (plan.act == INT8)
        assert smooth.narrowest(plan) == INT4


class Denoiser(nn.Module):
    """sample (batch, tokens, width), t -> the same; late inputs have loud channels."""

    def __init__(self, width: int = 32, blocks: int = 2, channels: tuple[int, ...] = (3,), gain: float = 40.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.loud = torch.ones(width).index_fill(0, torch.tensor(channels), gain)

    def forward(self, sample, timestep):
        x = self.first(sample) * torch.where(timestep.reshape(-1, 1, 1) < 300, self.loud, torch.ones_like(self.loud))
        for block in self.blocks:
            x = x + block(x)
        return x


def loop(model) -> None:
    draw = torch.Generator().manual_seed(1)
    for time in range(950, 0, -100):
        model(torch.randn(2, 16, len(model.loud), generator=draw), torch.full((2,), float(time)))


def test_a_fitted_model_switches_after_its_calibrated_steps_and_comes_back_from_disk(tmp_path):
    torch.manual_seed(0)
    model = Denoiser()
    report = dq.quantize(model, LATE8, calibration=loop, progress=False)
    plan = mark.plan_of(model)
    assert plan.switch == (300.0,)  # 10 steps: after the 7th, at 350, before the 8th, at 250
    late = [layer for layer in plan.layers.values() if layer.late]
    assert late and all(layer.late == (INT8,) for layer in late)
    assert any("switch formats at timestep < 300" in note for note in report.notes)
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, Denoiser())
    assert same_state(model, again)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
    for time in (900.0, 301.0, 299.0, 50.0):
        assert torch.equal(again(x, torch.full((2,), time)), model(x, torch.full((2,), time)))


def test_eight_bits_late_are_nearer_there_and_as_far_before():
    torch.manual_seed(0)
    truth, draw = Denoiser(), torch.Generator().manual_seed(3)
    x, errors = torch.randn(2, 64, 32, generator=draw), {}
    exact = replace(LATE8, linear=("int8/channel", "int4/group:16"))  # what is missed, inputs miss
    for recipe in (replace(exact, late=(), switch=()), exact):
        torch.manual_seed(0)
        model = Denoiser()
        dq.quantize(model, recipe, calibration=loop, progress=False)
        assert packed_layers(model)
        for time in (900.0, 50.0):
            t = torch.full((2,), time)
            with torch.no_grad():
                y = truth(x, t)
                errors[bool(recipe.late), time] = float((model(x, t) - y).norm() / y.norm())
    assert errors[True, 50.0] < 0.4 * errors[False, 50.0]
    assert errors[True, 900.0] < 1.25 * errors[False, 900.0]
