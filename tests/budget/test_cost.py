"""Milliseconds of layers: measured in the model, under every choice, kept, and put together. No test of a speed."""

from types import SimpleNamespace

import torch

from dq import cookbook, planning
from dq.budget import choices, cost


def test_every_layer_is_timed_in_the_model_under_every_choice(tmp_path, monkeypatch):
    """Passes rotate the choices; a second search reads the figures and runs only those that tell what is between."""
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "SECONDS", 0.0)
    passes, timed = [], cost._timed
    monkeypatch.setattr(
        cost, "_timed", lambda model, chosen, *more: passes.append(chosen) or timed(model, chosen, *more)
    )
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
    recipe = cookbook.get("int8-weight")
    plan = planning.make_plan(model, recipe)
    menus = choices.menus(plan, recipe)
    seen = SimpleNamespace(keys=[0], calls_per_step=2.0, call=lambda index: ((torch.ones(4, 64),), {}))
    before = [layer.forward for layer in model]
    costs = cost.measure(model, menus, seen, plan, progress=False)
    assert [layer.forward for layer in model] == before, "the model is as it was"
    assert all({chosen[name] for chosen in passes} == set(menu) for name, menu in menus.items())
    assert len(passes) == 2 + max(map(len, menus.values()))
    assert all(value > 0 for values in costs.ms.values() for value in values)
    assert costs.ms["0"] == costs.ms["1"], "layers of a shape share their figures"
    count = len(passes)
    cost.measure(model, menus, seen, plan, progress=False)
    assert len(passes) - count == 2 + cost.MIXED


def test_layers_slower_than_full_precision_pay_for_what_they_hold_up():
    """10 + 0.5 excess beside the layer: the slow one of the third pass takes 4 ms more than in full precision."""
    times = {"a": {None: 2.0, "fast": 1.0, "slow": 6.0}}
    passes = [{"a": "fast"}, {"a": None}, {"a": "slow"}]
    fixed, more = cost._between(passes, times, [10.0, 13.0, 18.0])
    assert (fixed, more) == (10.0, 0.5)
    assert [cost._with_more(times["a"], choice, more) for choice in (None, "fast", "slow")] == [2.0, 1.0, 8.0]
    assert cost._between(passes, times, [10.0, 13.0, 14.0])[1] == 0.0, "nothing is paid back"
