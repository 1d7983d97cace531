"""Block reconstruction: trained on the unit's output, kept only if held-out calls gain, the unit left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dq.fit import reconstruct, rounding
from dq.fit.drafts import draft
from dq.fit.reconstruct import AdaRound, Settings
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import Seen, Unit, UnitCall


class Block(nn.Module):
    """Two linears and a norm; gives a tuple with a tensor, a dict and something that passes through."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x, scale=1.0, rest=None):
        y = x + scale * self.down(torch.relu(self.up(self.norm(x))))
        return y, {"mean": y.mean(1), "count": 3}, rest


@pytest.fixture
def unit():
    torch.manual_seed(0)
    block = Block().train()
    return Unit("blocks.0", block, {"blocks.0.up": plan(48, 24), "blocks.0.down": plan(24, 48)})


def plan(rows: int, columns: int, act: str | None = None, steps: int = 1) -> LayerPlan:
    parsed = TensorPlan.parse(act) if act else None
    return LayerPlan("linear", (rows, columns), TensorPlan.parse("int3/channel"), parsed, steps=steps)


def seen_of(unit: Unit, calls: int = 12, buckets: int = 1) -> Seen:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(24, 24, generator=generator) / 5
    inputs = [torch.randn(2, 16, 24, generator=generator) @ mix for _ in range(calls)]

    def replay(stream):
        assert stream == "hat"
        for i, x in enumerate(inputs):
            with torch.no_grad():
                output = copy.deepcopy(unit.module).eval()(x, scale=0.5)
            yield UnitCall((x,), {"scale": 0.5}, output, i % buckets)

    return Seen({}, buckets, (), replay)


def rounded(unit: Unit) -> tuple[dict, dict]:
    """Drafts at the nearest grid points, and the weights before."""
    made, targets = {}, {}
    for name, layer in unit.layers.items():
        made[name] = draft(unit.layer(name), layer)
        targets[name] = made[name].weight.data.clone()
        weight, made[name].scales = rounding.nearest(targets[name], layer)
        made[name].weight.data.copy_(weight)
    return made, targets


def learned(unit: Unit, seen: Seen, **settings) -> tuple[dict, reconstruct.Outcome]:
    made, targets = rounded(unit)
    learning = AdaRound(made, targets)
    given = Settings(**{"steps": 200, "lr": 0.3, "batch": 1, **settings})
    return made, reconstruct.reconstruct(unit, seen, made, learning.parameters, given, learning)


def test_learned_rounding_beats_nearest_on_held_out_calls(unit):  # Q-Diffusion P3
    made, outcome = learned(unit, seen_of(unit))
    assert outcome.kept and outcome.after <= 0.8 * outcome.before
    for name, layer in made.items():
        units = layer.weight.data / layer.scales[0].scale
        floor = torch.floor(unit.layer(name).weight.data / layer.scales[0].scale)
        assert torch.allclose(units, units.round(), atol=1e-4), "on the grid"
        assert ((units.round() - floor >= 0) & (units.round() - floor <= 1)).all(), "0 or 1 above floor"
        packed = layer.pack(torch.float32)
        assert torch.allclose(packed.dense_weight(), layer.weight.data, atol=1e-6), "what was learned is what ships"


def test_rounding_is_decided_at_the_end(unit):  # Q-Diffusion P3
    made, targets = rounded(unit)
    learning = AdaRound(made, targets, strength=3e4)
    reconstruct.reconstruct(unit, seen_of(unit), made, learning.parameters, Settings(200, 0.6, 1), learning)
    shares = torch.cat([rounding.share().flatten() for rounding in learning.roundings.values()])
    assert (torch.minimum(shares, 1 - shares) < 0.05).float().mean() > 0.98


def test_the_unit_stays_as_it_was(unit):
    before, flags = copy.deepcopy(unit.module.state_dict()), [p.requires_grad for p in unit.module.parameters()]
    made, _ = learned(unit, seen_of(unit), steps=5)
    assert all(torch.equal(value, before[key]) for key, value in unit.module.state_dict().items())
    assert unit.module.training and type(unit.module.up) is nn.Linear
    assert [p.requires_grad for p in unit.module.parameters()] == flags
    assert all(p.grad is None for p in (*unit.module.parameters(), *made["blocks.0.up"].parameters()))
    assert made["blocks.0.up"].soft is None


def test_what_does_not_help_is_taken_back(unit):
    made, targets = rounded(unit)
    start = {name: layer.weight.data.clone() for name, layer in made.items()}
    learning = AdaRound(made, {name: -target for name, target in targets.items()})  # the wrong side of every point
    for choice in learning.parameters:
        choice.data.neg_()
    outcome = reconstruct.reconstruct(unit, seen_of(unit), made, learning.parameters, Settings(1, 1e-6, 1), learning)
    assert not outcome.kept
    assert all(torch.equal(layer.weight.data, start[name]) for name, layer in made.items())


def test_same_seed_same_bytes(unit):
    runs = [learned(unit, seen_of(unit), steps=20)[0] for _ in range(2)]
    assert all(torch.equal(runs[0][name].weight.data, runs[1][name].weight.data) for name in runs[0])


def test_plain_parameters_are_trained_under_no_grad_as_well(unit):
    made, _ = rounded(unit)
    biases = [layer.bias for layer in made.values()]
    start = [bias.detach().clone() for bias in biases]
    with torch.no_grad():
        outcome = reconstruct.reconstruct(unit, seen_of(unit), made, biases, Settings(40, 3e-3))
    assert outcome.kept and outcome.after < outcome.before
    assert not any(torch.equal(bias, value) for bias, value in zip(biases, start, strict=True))


def test_tables_see_the_bucket_of_each_call(unit):
    layers = {name: plan(*layer.shape, "int8/tensor/table", 3) for name, layer in unit.layers.items()}
    unit = Unit(unit.name, unit.module, layers)
    seen = seen_of(unit, buckets=3)
    made = {name: draft(unit.layer(name), layer) for name, layer in layers.items()}
    for layer in made.values():
        layer.act_scale.data.copy_(torch.tensor([[0.05], [0.05], [100.0]]))  # the last bucket's inputs become zeros
    module, clock = reconstruct.assembled(unit, made)
    errors = [reconstruct.measure(module, clock, [call]) for call in seen.calls("hat")]
    assert min(errors[2::3]) > 2 * max(*errors[0::3], *errors[1::3])


def test_error_adds_up_all_floating_tensors():
    target = (torch.ones(2, 3), {"a": 2 * torch.ones(4), "n": torch.tensor(7)}, None, "text")
    output = (2 * torch.ones(2, 3), {"a": torch.ones(4), "n": torch.tensor(9)}, None, "other")
    assert float(reconstruct.error(output, target)) == pytest.approx(1.25)


def test_one_layer_is_a_unit_too():
    torch.manual_seed(0)
    layer, mix = nn.Linear(24, 24), torch.randn(24, 24)
    unit = Unit("proj", layer, {"proj": plan(24, 24)})

    def replay(stream):
        for seed in range(6):
            x = torch.randn(64, 24, generator=torch.Generator().manual_seed(seed)) @ mix
            yield UnitCall((x,), {}, layer(x).detach(), 0)

    made, outcome = learned(unit, Seen({}, 1, (), replay))
    assert list(made) == ["proj"] and outcome.kept


def test_calls_are_read_once_and_few_of_them_kept_evenly_spread():
    read = []

    def calls(stream):
        for index in range(11):
            read.append(index)
            yield UnitCall((torch.tensor(index),), {}, torch.zeros(1), 0)

    kept = reconstruct.load(Seen({}, 1, (), calls), Settings(most=4), torch.device("cpu"))
    assert read == list(range(11)) and [int(call.args[0]) for call in kept] == [0, 4, 8]
