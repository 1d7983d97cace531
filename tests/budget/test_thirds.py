"""Formats of inputs by thirds of a run: what is chosen, what it costs, and what one format for all steps leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dq
from dq import cookbook
from dq.budget import choices, margins, search
from dq.budget.limits import Budget
from dq.budget.search import Measured, Part, Search
from dq.errors import DQError
from dq.fit import phases
from dq.fit.phases import Schedule
from dq.host import mark
from dq.plan import LayerPlan, Plan, TensorPlan
from tests.fit.test_phases import Denoiser, loop

INT4, INT8 = TensorPlan.parse("int4/group:64"), TensorPlan.parse("int8/token")
LAYER = LayerPlan("linear", (48, 64), TensorPlan.parse("int4/group:64"), INT4)
MENU = (None, replace(LAYER, act=INT8), LAYER)
DICE = np.random.default_rng(0)


def row(scale: float, products: int) -> Measured:
    """A layer whose 4-bit inputs cost most late; errors of thirds add up."""
    weight, noise = 0.1 * scale, np.array([[0, 0, 0], [0.01, 0.01, 0.02], [0.3, 0.5, 2.0]]) * scale
    thirds = noise + np.array([[0.0], [weight / 3], [weight / 3]])
    whole = noise.sum(1) + np.array([0.0, weight, weight])
    return Measured(MENU, np.concatenate([thirds, whole[:, None]], 1), [4096, 1000, 1000], [], 3072, products)


def searched(by_thirds: bool) -> Search:
    rows = {name: row(scale, count) for name, scale, count in (("a", 1.0, 100), ("b", 3.0, 100), ("c", 0.2, 400))}
    rows = {name: each.by_thirds() if by_thirds else each for name, each in rows.items()}
    return Search("r", "m", {"": Part(rows)}, {"denoiser": 0, "pipeline": 0})


def test_every_way_through_the_thirds_is_a_choice_of_the_same_bytes():
    found = row(1.0, 1).by_thirds()
    kinds = [choice.phases if choice else None for choice in found.choices]
    assert found.choices[:3] == MENU and len(kinds) == 3 + 2**3 - 2
    assert {tuple(each.act for each in kind) for kind in kinds[3:]} == {
        (a, b, c) for a in (INT4, INT8) for b in (INT4, INT8) for c in (INT4, INT8) if not a == b == c
    }
    assert set(found.bytes[1:]) == {1000}


@torch.no_grad()
def test_errors_by_thirds_are_those_that_each_third_has_in_its_own_format():
    weight, draw = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    own = margins.Margins.empty(LAYER, (str(INT4), str(INT8)))
    own.rows += torch.rand(4, 48, generator=draw)
    own.columns += torch.rand(4, 64, generator=draw)
    for text, level in ((str(INT4), 1.0), (str(INT8), 0.01)):
        own.acts[text][:3] += level * torch.rand(3, generator=draw)
        own.acts[text][3] = own.acts[text][:3].sum()
    base = Measured(MENU, margins.energies(weight, MENU, own), [1, 1, 1], [], 1)
    found = base.by_thirds()
    for choice, errors in zip(found.choices, found.errors, strict=True):
        if choice is not None and choice.late:
            inputs = [float(own.acts[str(act)][third]) for third, act in enumerate((choice.act, *choice.late))]
            alone = margins.energies(weight, (replace(choice, act=None, late=()),), own)[0]
            assert errors == pytest.approx(alone + np.append(inputs, sum(inputs)))


def test_inputs_of_all_steps_in_one_format_do_more_harm_at_the_same_mean_bits():
    for limit in (4.3, 4.5, 5.0):
        one, three = (search.choose(Budget(act_bits=limit)) for search in (searched(False), searched(True)))
        harm = [
            sum(search.parts[""].layers[n].harm[c] for n, c in found[""].items())
            for search, found in ((searched(False), one), (searched(True), three))
        ]
        assert searched(True).act_bits_of(three) <= limit and searched(False).act_bits_of(one) <= limit
        assert harm[1] < harm[0]
    with pytest.raises(DQError, match=r"act_bits is 3, the least possible is 4"):
        searched(True).choose(Budget(act_bits=3))


def test_milliseconds_of_a_way_are_the_mean_of_its_thirds():
    found = replace(row(1.0, 1), ms=[9.0, 6.0, 3.0]).by_thirds()
    place = found.choices.index(replace(LAYER, late=(INT4, INT8)))
    assert found.ms[place] == pytest.approx((3 + 3 + 6) / 3)


def test_protected_thirds_keep_the_bits_that_a_layer_offers():
    found, limits = searched(True), {"act_bits": 5.35, "thirds": True}
    free = acts(found, Budget(**limits))
    kept = acts(found, Budget(**limits, protect=("early",)))
    assert any(row[0] < 8 for row in free.values()) and all(row[0] == 8 for row in kept.values())
    assert all(row == [8, 4, 4] for row in kept.values()), "no bits are left for the other thirds"
    with pytest.raises(DQError, match=r"act_bits is 5, the least possible is 5\.33"):
        found.choose(Budget(act_bits=5, thirds=True, protect=("late",)))


def acts(found: Search, budget: Budget) -> dict[str, list[int]]:
    """Bits of each layer's input by third."""
    chosen, rows = found.choose(budget)[""], found.parts[""].layers
    picked = {name: rows[name].choices[index] for name, index in chosen.items()}
    return {name: [act.spec.bits for act in search._acts(choice)] for name, choice in picked.items()}


def test_a_search_comes_back_from_json():
    found = searched(True)
    again = Search.from_dict(found.to_dict())
    assert again.choose(Budget(act_bits=5)) == found.choose(Budget(act_bits=5))


def test_recipes_may_name_the_formats_of_inputs():
    recipe = cookbook.get("viditq-mp-w4a6")
    menu = choices.menu(replace(LAYER, weight=TensorPlan.parse("int4/channel"), act=INT8), recipe)
    assert {str(choice.act) for choice in menu if choice} == {"int8/token", "int6/token", "int4/token"}


def test_a_denoiser_that_sees_two_thirds_keeps_those():
    plan = Plan({"proj": replace(LAYER, late=(INT8, INT4)), "other": LAYER}, timestep="t")
    found = phases.switched(plan, Schedule((1, 2), (333.0,)))
    assert found.layers == {"proj": replace(LAYER, act=INT8, late=(INT4,)), "other": LAYER}
    assert found.switch == (333.0,)


@pytest.mark.parametrize(
    ("limits", "recipe", "message"),
    [
        ({"thirds": True, "act_bits": 5, "metric": "output"}, "svdquant-int4", "tells no thirds of a run apart"),
        ({"thirds": True, "act_bits": 5}, "svdquant-int4-late8", "has late ones of its own; leave one of them out"),
        ({"thirds": True, "bits": 5}, "int8", "only bytes and bits go without data"),
        ({"protect": ["late"], "act_bits": 5}, "svdquant-int4", "needs formats by thirds; pass thirds=True"),
        ({"protect": "late", "thirds": True, "act_bits": 5}, "svdquant-int4", "expected a list of 'early', 'middle'"),
        (
            {"protect": ["last"], "thirds": True, "act_bits": 5},
            "svdquant-int4",
            "expected a list of 'early', 'middle'",
        ),
        ({"act_bits": -1}, "int8", "act_bits is -1, expected a number above 0"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(limits, recipe, message):
    with pytest.raises(DQError, match=message):
        calibration = None if recipe == "int8" else (lambda model: None)
        dq.quantize(nn.Sequential(nn.Linear(64, 64)), recipe, budget=Budget(**limits), calibration=calibration)


LOUD = {"width": 64, "blocks": 3, "channels": tuple(range(0, 64, 16)), "gain": 30.0}


def test_a_budget_of_thirds_gives_a_fitted_model_that_switches(tmp_path):
    model, budget = Denoiser(**LOUD), Budget(act_bits=5.5, thirds=True, metric="prediction")
    report = dq.quantize(model, "svdquant-int4", calibration=loop, budget=budget, progress=False)
    plan = mark.plan_of(model)
    assert plan.switch == (700.0, 300.0)  # 10 steps: 3, 4 and 3
    late = [layer for layer in plan.layers.values() if layer.late]
    assert late and all(len(layer.late) == 2 for layer in late)
    assert any("bits per input" in note for note in report.notes)
    x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2))
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, Denoiser(**LOUD))
    for time in (900.0, 450.0, 50.0):
        assert torch.equal(again(x, torch.full((2,), time)), model(x, torch.full((2,), time)))
