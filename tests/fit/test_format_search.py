"""Floating formats of layers by output error: never worse than a fixed one, as the data ask, one an input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dq import formats as number_formats
from dq.fit import formats, moments, rounding, smooth, static
from dq.fit.drafts import draft
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import LayerSeen, Seen

WIDE = torch.exp2(torch.arange(64).remainder(6).float())  # channels over six binades


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return module


def even_weight():
    return torch.rand(48, 64, generator=generator(1)) * 2 - 1


def normal(seed=2, rows=48):
    return torch.randn(rows, 64, generator=generator(seed))


def given(modules, x, weight="fp4/channel", act=None):
    """(shared, seen) of linears that read x (rows, in)."""
    zeros = torch.zeros(len(x), dtype=torch.long)
    absmax = x.abs().amax(0).expand(1, 2, -1)
    layer = LayerSeen(x, x, zeros, zeros, absmax=absmax, gram=x.t() @ x / len(x))
    parsed = TensorPlan.parse(act) if act else None
    plans = {
        k: LayerPlan("linear", tuple(m.weight.shape), TensorPlan.parse(weight), parsed) for k, m in modules.items()
    }
    return smooth.Shared(plans, modules, layer), Seen(dict.fromkeys(modules, layer), 1, (), lambda stream: iter(()))


def chosen(module, x, **more):
    return formats.choose(*given({"layer": module}, x, **more))["layer"]


def test_formats_of_equal_bits_take_each_others_place():
    for bits, names in formats.SPLITS.items():
        assert all(number_formats.get(name).bits == bits and number_formats.get(name).name == name for name in names)
        assert all(formats.splits(number_formats.get(name)) == names for name in names)
    for name in ("int4", "int8a", "nvfp4", "e2m2"):
        assert formats.splits(number_formats.get(name)) == (name,)


def test_weights_get_the_format_that_their_values_ask_for():
    assert chosen(linear(even_weight()), normal(rows=256)).weight.format == "e1m2", "evenly spread: evenly spaced"
    assert chosen(linear(normal() / WIDE), normal(rows=256) * WIDE).weight.format == "e3m0", "six binades that count"
    assert chosen(linear(normal()), normal(rows=256)).weight == TensorPlan.parse("fp4/channel")
    assert chosen(linear(normal()), normal(rows=256), weight="int4/channel").weight.format == "int4"


def test_activations_get_one_format_for_all_layers_of_an_input():
    wide = linear(normal() / WIDE.square())
    both = given(
        {"wide": wide, "even": linear(even_weight() / WIDE.square())},
        normal(rows=256) * WIDE.square(),
        act="e3m4/token",
    )
    plans = formats.choose(*both)
    assert plans["wide"].act == plans["even"].act and plans["wide"].act.format in ("fp8", "fp8_e5m2")
    assert chosen(linear(normal()), normal(rows=256), act="fp8/token").act.format == "e2m5", "Gaussian rows"
    kept = formats.choose(*both, acts=False)
    assert all(str(plan.act) == "e3m4/token" for plan in kept.values())


@pytest.mark.parametrize("act", [None, "fp6_e3m2/token"])
def test_what_is_chosen_is_never_worse_than_what_was_planned(act):
    for seed in range(4):
        module, x = linear(normal(seed) * torch.rand(48, 1, generator=generator(seed)).exp()), normal(seed + 9, 256)
        shared, seen = given({"layer": module}, x * WIDE.sqrt(), act=act)
        best = formats.choose(shared, seen)["layer"]
        errors = {}
        for weight in formats.SPLITS[4]:
            for rounded in formats.SPLITS[6] if act else (None,):
                plan = (
                    shared.plan
                    if rounded is None
                    else replace(shared.plan, act=replace(shared.plan.act, format=rounded))
                )
                plan = replace(plan, weight=replace(plan.weight, format=weight))
                errors[plan.weight, plan.act] = measured(module, plan, shared.seen)
        assert errors[best.weight, best.act] <= min(errors.values()) * (1 + 1e-5)


@torch.no_grad()
def measured(module, plan, layer) -> float:
    """Output error with the better of two weight ranges."""
    made, found = draft(module, plan), []
    for scales in (
        rounding.fit_scales(made.weight.data, plan),
        rounding.mse_scales(made.weight.data, plan, layer.gram.diagonal()),
    ):
        made.scales = scales
        found.append(float((made(layer.x) - module(layer.x)).square().sum()))
    return min(found)


def test_stored_activation_ranges_come_in_the_format_of_least_error():
    module, x = linear(normal()), normal(rows=512)
    shared, seen = given({"layer": module}, x, act="e3m4/tensor/static")
    wish, names = static.StaticWish(smooth=False, shift=False, rotate=False, round="nearest"), formats.SPLITS[8]
    made = formats.stored(module, shared.plan, shared.seen, seen, wish, names)
    alone = {name: formats.stored(module, shared.plan, shared.seen, seen, wish, (name,)) for name in names}
    errors = {name: float((each(x) - module(x)).detach().square().sum()) for name, each in alone.items()}
    assert made.plan.act.format == min(errors, key=errors.get) == "e2m5" and float(made.act_scale.detach()) > 0


def test_noise_of_stored_floating_scales_is_measured():
    module, x = linear(normal()), normal(rows=512)
    shared, seen = given({"layer": module}, x, act="fp8/tensor/static")
    wish = static.StaticWish("minmax", smooth=False, shift=False, rotate=False, margins=(1.0,), round="nearest")
    made = formats.stored(module, shared.plan, shared.seen, seen, wish, ("fp8",))
    rounded = shared.plan.act.spec.fake(x, "tensor", made.act_scale.detach())
    torch.testing.assert_close(moments.noise(shared.seen, made), (rounded - x).square().mean(0))


def test_factors_that_are_powers_of_two_move_into_the_weight_exactly():
    module, x = linear(normal() / 3), normal(rows=256) * WIDE.square()
    shared, _ = given({"layer": module}, x, act="fp4/token")
    found = smooth.search(shared, smooth.SmoothSearch(alphas=(0.5, 1.0), reach=3))
    factors = found.best.smooth
    assert torch.equal(factors.log2(), factors.log2().round()), "powers of two"
    assert factors.max() / factors.min() == 8, "as far apart as the format's exponent reaches"
    assert found.error < 0.9 * found.before
    made = smooth.transformed(module, shared.plan, found.best)
    assert torch.equal(made.weight.data * factors, module.weight.data), "no rounding error"
    free = smooth.search(shared, smooth.SmoothSearch(alphas=(0.5, 1.0)))
    assert not torch.equal(free.best.smooth.log2(), free.best.smooth.log2().round())
