"""The integer program: optimal, within its limits, better than greedy and random, and honest when nothing fits."""

import itertools
import os

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from dq import cookbook
from dq.budget import allocate, choices, sampled
from dq.budget.allocate import Item
from dq.layers import parameter_bytes
from dq.plan import LayerPlan, TensorPlan


def items(count=6, options=4, seed=0, limits=1):
    """Decisions whose harm falls and whose cost rises with the number of the choice."""
    dice = np.random.default_rng(seed)
    found = []
    for i in range(count):
        errors = np.sort(dice.lognormal(0, 2, options))[::-1].copy()
        costs = np.sort(dice.uniform(1, 10, (limits, options)), axis=1) * dice.uniform(1, 5)
        found.append(Item(str(i), errors, costs))
    return found


def brute(rows, limits):
    plans = itertools.product(*(range(len(row.errors)) for row in rows))
    return min((p for p in plans if (allocate.cost(rows, p) <= limits).all()), key=lambda p: allocate.error(rows, p))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [1, 2])
def test_the_program_finds_what_trying_everything_finds(seed, limits):
    rows = items(seed=seed, limits=limits)
    bounds = 1.3 * allocate.cost(rows, [1] * len(rows))
    found = allocate.solve(rows, bounds)
    assert (allocate.cost(rows, found) <= bounds).all()
    assert allocate.error(rows, found) == pytest.approx(allocate.error(rows, brute(rows, bounds)), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_way_of_choosing_is_better(seed):
    rows = items(count=60, seed=seed)
    bounds = 1.2 * allocate.cost(rows, [1] * len(rows))
    best = allocate.error(rows, allocate.solve(rows, bounds))
    for other in (allocate.greedy(rows, bounds), allocate.drawn(rows, bounds, seed), [1] * len(rows)):
        assert (allocate.cost(rows, other) <= bounds).all()
        assert best <= allocate.error(rows, other) * (1 + 1e-4)


def test_random_plans_fill_the_limit():
    rows = items(count=80, seed=1)
    bounds = 1.4 * allocate.cost(rows, [0] * len(rows))
    for seed in range(5):
        assert 0.97 * bounds[0] <= allocate.cost(rows, allocate.drawn(rows, bounds, seed))[0] <= bounds[0]


def test_what_cannot_fit_is_refused_with_the_least_that_can():
    rows = items()
    with pytest.raises(allocate.Infeasible) as refusal:
        allocate.solve(rows, [1.0])
    assert refusal.value.least[0] == pytest.approx(sum(row.costs[0].min() for row in rows))


def test_errors_of_tiny_size_are_told_apart():
    rows = [Item(row.name, row.errors * 1e-12, row.costs) for row in items()]
    bounds = 1.3 * allocate.cost(rows, [1] * len(rows))
    found = allocate.solve(rows, bounds)
    assert allocate.error(rows, found) == pytest.approx(allocate.error(rows, brute(rows, bounds)), rel=1e-6)


def test_more_room_never_does_more_harm():
    rows = items(count=40, seed=3)
    harms = [allocate.error(rows, plan) for plan in allocate.curve(rows, [np.inf], 0)]
    assert len(harms) > 10
    assert all(later <= before * (1 + 1e-4) for before, later in itertools.pairwise(harms))


def test_regression_on_random_plans_finds_the_layers_that_the_first_guess_got_wrong():
    dice = np.random.default_rng(0)
    menus = {str(i): [None, *formats("int6/channel", "int4/channel", "int2/channel")] for i in range(20)}
    truth = {name: np.outer(np.array([0, 1, 4, 16]), np.ones(4)) * dice.lognormal(0, 1.5) for name in menus}
    guess = {name: table * dice.lognormal(0, 1) for name, table in truth.items()}

    def measured(plans):
        rows = [sum(truth[n][c] for n, c in zip(menus, plan, strict=True)) for plan in plans]
        return np.array(rows) * dice.lognormal(0, 0.02, (len(rows), 1))

    drawn, held_out = sampled.plans(menus, 300, 1), sampled.plans(menus, 60, 2)
    fitted = sampled.fitted(guess, menus, drawn, measured(drawn))
    true = measured(held_out)[:, -1]

    def rank(errors):
        return spearmanr([sum(errors[n][c, -1] for n, c in zip(menus, p, strict=True)) for p in held_out], true)[0]

    assert rank(fitted) > rank(guess)
    assert rank(fitted) > 0.98
    layers = [[errors[name][2, -1] for name in menus] for errors in (fitted, truth)]
    assert spearmanr(*layers)[0] >= 0.8


def test_regression_finds_the_way_of_rounding_that_suits_an_operation():  # Qua2SeDiMo: planted, and not in the guess
    dice = np.random.default_rng(0)
    ways = formats("lut4/channel", "int4a/channel", "lut3/channel", "int3a/channel")
    menus = {f"blocks.{i}.{name}": [None, *ways] for i in range(12) for name in ("attn", "ff")}
    level = np.outer([0, 1, 1, 4, 4], np.ones(4))
    guess = {name: level * dice.lognormal(0, 1) for name in menus}
    harm = {("attn", "inta/channel"): 2.5, ("ff", "lut/channel"): 2.5}  # one likes tables, the other even steps
    truth = {
        name: table
        * np.array([harm.get((name.split(".")[-1], sampled.way(choice)), 1.0) for choice in menus[name]])[:, None]
        for name, table in guess.items()
    }

    def measured(plans):
        rows = [sum(truth[n][c] for n, c in zip(menus, plan, strict=True)) for plan in plans]
        return np.array(rows) * dice.lognormal(0, 0.05, (len(rows), 1))

    drawn, held_out = sampled.plans(menus, 96, 1), sampled.plans(menus, 60, 2)
    fitted, true = sampled.fitted(guess, menus, drawn, measured(drawn)), measured(held_out)[:, -1]
    for name, errors in fitted.items():
        better, worse = (1, 2) if name.endswith("attn") else (2, 1)
        assert errors[better, -1] < 0.7 * errors[worse, -1] and errors[better + 2, -1] < 0.7 * errors[worse + 2, -1]

    def rank(errors):
        return spearmanr([sum(errors[n][c, -1] for n, c in zip(menus, p, strict=True)) for p in held_out], true)[0]

    assert rank(fitted) > max(0.97, rank(guess))


def test_ways_of_the_same_bits_are_drawn_alike():
    ways = formats("lut4/channel", "int4a/channel", "lut4/tensor", "lut3/channel")
    plans = sampled.plans({str(i): [None, *ways] for i in range(50)}, 40, 0)
    counts = np.bincount(np.array(plans).ravel(), minlength=5)
    assert counts[0] == 0 and counts[1:4].min() > 0.85 * counts[1:4].max()


def formats(*texts: str) -> list[LayerPlan]:
    return [LayerPlan("linear", (64, 64), TensorPlan.parse(text)) for text in texts]


def test_layers_kept_for_random_plans_take_no_more_than_the_model():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    plan = LayerPlan("linear", (64, 64), TensorPlan.parse("int8/channel"))
    menus = {str(index): choices.menu(plan, cookbook.get("int8-weight")) for index in range(4)}
    layers = sampled._Layers(model, menus, torch.float32, None)
    for name, menu in menus.items():
        for choice in range(1, len(menu)):
            made = layers.get(name, choice)
            assert torch.equal(made.weight, layers.get(name, choice).weight)
    held = parameter_bytes(*layers.kept.values())
    assert 0.9 * parameter_bytes(model) < held <= parameter_bytes(model)
    assert len(layers.kept) < sum(len(menu) - 1 for menu in menus.values())


def test_random_plans_stay_under_the_limit_where_choices_are_forbidden_by_their_cost():
    found = items(40, 5)
    for item in found:
        item.costs[:, 4] = 1e18
    for seed in range(20):
        limit = float(sum(item.costs[0, 2] for item in found))
        plan = allocate.drawn(found, [limit], seed)
        assert 4 not in plan and 0.95 * limit < allocate.cost(found, plan)[0] <= limit


def awkward(seed: int) -> tuple[list[Item], np.ndarray]:
    """Errors over many orders of magnitude, for which HiGHS maps a solution back and says so."""
    dice = np.random.default_rng(seed)
    costs = [np.sort(dice.lognormal(0, 3, (2, 6)), axis=1)[:, ::-1] for _ in range(400)]
    items = [Item(str(i), np.sort(dice.lognormal(0, 4, 6)) * 1e8, cost) for i, cost in enumerate(costs)]
    least, most = (sum(side(item.costs, 1) for item in items) for side in (np.min, np.max))
    return items, least + 0.3 * (most - least)


def test_the_solver_prints_nothing_and_keeps_nobodys_lines_back(capfd, monkeypatch):
    real = allocate.milp

    def loud(*args, **options):
        os.write(1, b"Highs::tells of itself\nanother thread's line\n")
        return real(*args, **options)

    monkeypatch.setattr(allocate, "milp", loud)
    for seed in range(3):
        allocate.solve(*awkward(seed))
    assert capfd.readouterr().out == 3 * "another thread's line\n"
