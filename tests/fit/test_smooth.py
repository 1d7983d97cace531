"""Smoothing, rotation and branch of one layer: chosen by output error, one choice an input, never worse than none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dq.fit import groups, moments, smooth, weights
from dq.fit.drafts import draft
from dq.kernels import reference
from dq.layers import hadamard
from dq.methods import svdquant, viditq
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import LayerSeen, Seen, Unit

EXACT = TensorPlan.parse("int8/group:1")  # a scale for each weight: rounding leaves fp32's own error


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(outputs=48, inputs=64, seed=0):
    module = nn.Linear(inputs, outputs)
    module.weight.data = torch.randn(outputs, inputs, generator=generator(seed + 100)) / inputs**0.5
    return module


def plan_of(module, weight="int4/group:16", act="int8/token", **more):
    kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
    parsed = TensorPlan.parse(act) if act else None
    return LayerPlan(kind, tuple(module.weight.shape), TensorPlan.parse(weight), parsed, **more)


def rows(count=256, inputs=64, loud=(3, 17, 40), factor=60.0, seed=0):
    """(count, inputs) Gaussian rows with outlier channels."""
    x = torch.randn(count, inputs, generator=generator(seed))
    x[:, list(loud)] *= factor
    return x


def seen_of(x, module=None, **more):
    """What a trace tells of inputs x: two step buckets, everything measured."""
    dim = 1 if x.dim() > 2 else -1
    flat = x.movedim(dim, -1).flatten(0, -2)
    half = flat.abs().amax(0)
    absmax = torch.stack([torch.stack([half, half * 0.5])] * 2)
    patches = flat if x.dim() == 2 else columns(x, module)
    gram = patches.t() @ patches / len(patches)
    ends = [torch.full((2, 2), float(value)) for value in (x.min(), x.max())]
    zeros = torch.zeros(len(x), dtype=torch.long)
    found = LayerSeen(x, x, zeros, zeros, absmax=absmax, low=ends[0], high=ends[1], gram=gram)
    return replace(found, **more)


def columns(x, module):
    """(pixels, in * taps) patches of a convolution with padding."""
    return nn.functional.unfold(x, module.kernel_size, padding=module.padding).movedim(1, -1).flatten(0, 1)


def shared(module, plan, x, **more):
    return smooth.Shared({"layer": plan}, {"layer": module}, seen_of(x, module, **more))


@torch.no_grad()
def error(made, module, x):
    """Output error as a share of the output's power."""
    y = module(x)
    return float((made(x) - y).square().sum() / y.square().sum())


def decibels(worse, better):
    return 10 * torch.log10(torch.tensor(worse / better)).item()


# --- the vector ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.25, 0.0), (0.75, 0.25)])
def test_balance_is_the_published_formula_with_geometric_mean_one(alpha, beta):
    x = rows()
    first, second = linear(seed=0), linear(outputs=32, seed=1)
    both = smooth.Shared({"a": plan_of(first), "b": plan_of(second)}, {"a": first, "b": second}, seen_of(x))
    found = smooth.balance(both, alpha, beta)
    tops = torch.cat([first.weight, second.weight]).detach().abs().amax(0)
    expected = tops**beta / x.abs().amax(0) ** alpha
    assert torch.allclose(found, expected / expected.log().mean().exp(), rtol=1e-4)
    assert abs(float(found.log().mean())) < 1e-5


def test_balance_of_a_convolution_is_over_channels_and_all_taps():
    module = nn.Conv2d(8, 6, 3, padding=1)
    x = torch.randn(3, 8, 5, 5, generator=generator()) * torch.linspace(0.5, 9, 8).reshape(1, -1, 1, 1)
    found = smooth.balance(shared(module, plan_of(module, act="int8a/tensor"), x, absmax=None), 0.5, 0.5)
    tops = (module.weight.detach().abs().amax((0, 2, 3)) / x.abs().amax((0, 2, 3))) ** 0.5
    assert torch.allclose(found, tops / tops.log().mean().exp(), rtol=1e-4)


def test_channels_without_input_or_weight_get_the_mean():
    module, x = linear(), rows()
    x[:, 5], module.weight.data[:, 9] = 0, 0
    found = smooth.balance(shared(module, plan_of(module), x), 0.5, 0.5)
    assert found.isfinite().all() and (found > 0).all()
    assert found[5] == found[9] == pytest.approx(1.0, abs=1e-4)
    silent = smooth.balance(shared(module, plan_of(module), torch.zeros(4, 64)), 0.5, 0.5)
    assert torch.equal(silent, torch.ones(64))


# --- what a transform does -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("rotate", [0, 4, 64])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_transform_changes_nothing_when_nothing_is_rounded(smoothed, rotate):
    module, x = linear(), rows()
    plan = plan_of(module, act=None)
    vector = smooth.balance(shared(module, plan, x), 0.5, 0.5) if smoothed else None
    made = smooth.transformed(module, replace(plan, weight=EXACT), smooth.Transform(vector, (0.5, 0.5), rotate))
    assert made.plan.smooth == smoothed and made.plan.rotate == rotate
    assert error(made, module, x) < 1e-10
    assert error(made.pack(torch.float32), module, x) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("rotate", [0, 4])
def test_a_convolution_is_transformed_along_its_channels(rotate):
    module = nn.Conv2d(12, 6, 3, padding=1)
    x = torch.randn(3, 12, 5, 5, generator=generator()) * torch.linspace(0.5, 9, 12).reshape(1, -1, 1, 1)
    plan = plan_of(module, act=None)
    vector = smooth.balance(shared(module, plan, x), 0.5, 0.5)
    made = smooth.transformed(module, replace(plan, weight=EXACT), smooth.Transform(vector, (0.5, 0.5), rotate))
    assert error(made, module, x) < 1e-10 and error(made.pack(torch.float32), module, x) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_moments_are_those_of_the_transformed_input(kind):
    module = linear(12, 16) if kind == "linear" else nn.Conv2d(16, 6, 3, padding=1)
    x = rows(200, 16, (2,)) if kind == "linear" else torch.randn(4, 16, 6, 6, generator=generator())
    act = "int4/group:4" if kind == "linear" else "int8a/tensor"
    around = shared(module, plan_of(module, act=act), x)
    change = smooth.Transform(smooth.balance(around, 0.5, 0.5), (0.5, 0.5), 4)
    made = smooth.transformed(module, around.plan, change)
    z = made.transform(x)
    flat = z if kind == "linear" else columns(z, module)
    expected = flat.t() @ flat / len(flat)
    assert torch.allclose(moments.transformed(around.seen, made), expected, atol=1e-4 * float(expected.abs().max()))
    noise = moments.noise(around.seen, made)
    rounder = reference.input_rounder(made.plan, -1 if kind == "linear" else 1)
    gap = (rounder(z, None) - z).square().movedim(1, -1).flatten(0, -2).mean(0)
    assert torch.allclose(noise, gap.repeat_interleave(1 if kind == "linear" else 9)) and (noise > 0).all()


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["int8/token", "int4/group:16"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_never_worse_than_nothing_and_says_the_truth(seed, rank, act):
    module, x = linear(seed=seed), rows(seed=seed, factor=1.0 + 3 * seed)
    plan = plan_of(module, act=act)
    found = smooth.search(shared(module, plan, x), smooth.SmoothSearch(rank, rotations=smooth.orders(plan)))
    assert found.error <= found.before and found.tried > 6

    def measured(change):
        made = smooth.transformed(module, plan, change)
        if rank:
            smooth.add_branch(made, x, rank)
        return error(made, module, x)

    assert measured(found.best) == pytest.approx(found.error, rel=1e-4)
    assert measured(smooth.Transform()) == pytest.approx(found.before, rel=1e-4)


def test_nothing_wins_where_every_smoothing_hurts():
    module, x = linear(), rows(factor=1.0)
    misleading = torch.logspace(-2, 2, 64)[torch.randperm(64, generator=generator(3))].expand(2, 2, 64)
    found = smooth.search(shared(module, plan_of(module), x, absmax=misleading), smooth.SmoothSearch())
    assert found.best.label == "none" and found.error == found.before
    assert found.reason == f"best of {found.tried}: input as it is"


@pytest.mark.parametrize(("act", "gain"), [("int8/token", 6), ("int4/token", 4), ("int4/group:16", 3)])
def test_outlier_channels_are_smoothed_away(act, gain):
    module, x = linear(), rows()
    found = smooth.search(shared(module, plan_of(module, act=act), x), smooth.SmoothSearch())
    assert found.best.smooth is not None and decibels(found.before, found.error) > gain
    assert found.best.smooth[[3, 17, 40]].max() < found.best.smooth.median()
    assert found.best.label in found.reason and found.reason.endswith(" dB")


def test_outliers_that_move_from_row_to_row_are_rotated_away():
    """A vector per channel cannot follow them; a rotation need not know where they are."""
    module, x = linear(inputs=64), torch.randn(512, 64, generator=generator())
    where = torch.randint(64, (512,), generator=generator(1))
    x[torch.arange(512), where] *= 60.0
    plan = plan_of(module, weight="int8/channel", act="int4/token")
    around = shared(module, plan, x)
    without = smooth.search(around, smooth.SmoothSearch())
    found = smooth.search(around, smooth.SmoothSearch(rotations=smooth.orders(plan)))
    assert found.best.rotate == 64 and decibels(without.error, found.error) > 3


def test_unsigned_codes_win_for_one_sided_inputs():
    module, x = linear(), nn.functional.gelu(2 * torch.randn(256, 64, generator=generator()))
    plan = plan_of(module, weight="int8/channel", act="int4/group:16")
    around = shared(module, plan, x)
    found = smooth.search(around, svdquant.wish(plan, around, 0, svdquant.OPTIONS))
    assert found.best.act is not None and found.best.act.format == "int4a"
    formats = [str(act) for act in svdquant.wish(plan, around, 0, svdquant.OPTIONS).acts]
    assert formats == ["int4a/group:16", "int4a/group:16/dynamic/0.171875"]
    centred = shared(module, plan, x - x.mean())
    assert [str(act) for act in svdquant.wish(plan, centred, 0, svdquant.OPTIONS).acts] == ["int4a/group:16"]


def test_codes_cover_a_part_of_the_range_where_that_leaves_less_error():
    """Of long tails; values that are all as large as the largest want all of it."""
    module, make = linear(), generator()
    tails = torch.randn(256, 64, generator=make) * torch.randn(256, 64, generator=make)
    even = torch.randint(0, 2, (256, 64), generator=make) * 2.0 - 1
    plan = plan_of(module, weight="int8/channel", act="int4/group:64")
    for x, least in ((tails, 0.1), (even, 0.0)):
        around = shared(module, plan, x)
        wish = svdquant.wish(plan, around, 0, svdquant.OPTIONS | {"clip": True})
        found = smooth.search(around, wish)
        without = smooth.search(around, svdquant.wish(plan, around, 0, svdquant.OPTIONS))
        assert (found.best.act or plan.act).clip < 1 if least else (found.best.act or plan.act).clip == 1
        assert decibels(without.error, found.error) >= least


@pytest.mark.parametrize(
    ("inputs", "act", "expected"),
    [
        (256, "int8/token", (128,)),
        (256, "int4/group:64", (128, 64)),
        (320, "int4/group:64", (80, 64)),
        (1152, "int4/group:64", (128, 64)),
        (128, "int4/group:128", (128,)),
        (72, "int4/group:64", (72,)),
        (7, "int8/token", ()),
    ],
)
def test_orders_worth_trying(inputs, act, expected):
    plan = LayerPlan("linear", (8, inputs), TensorPlan.parse("int4/group:64"), TensorPlan.parse(act))
    assert smooth.orders(plan) == expected
    for order in expected:
        replace(plan, rotate=order).check("layer")
        assert hadamard.hadamard(order).shape == (order, order)


# --- layers that share an input --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (linear(64, 64, seed) for seed in range(3))
        self.to_out = linear(64, 64, 3)


def attention(weight="int4/group:16", act="int4/group:16"):
    """(unit, seen) of an attention whose q, k and v share one input with outlier channels."""
    module, x = Attention(), rows()
    names = ("to_q", "to_k", "to_v", "to_out")
    unit = Unit("attn", module, {f"attn.{name}": plan_of(getattr(module, name), weight, act) for name in names})
    seen = {name: seen_of(x, source="attn.to_q") for name in list(unit.layers)[:3]}
    seen["attn.to_out"] = seen_of(rows(loud=(50,), seed=7), source="attn.to_out")
    return unit, Seen(seen, 2, (500.0,), lambda stream: iter(()))


def test_layers_with_one_input_are_grouped_and_others_are_not():
    unit, seen = attention()
    assert [list(group.plans) for group in groups.shared(unit, seen)] == [list(unit.layers)[:3], ["attn.to_out"]]
    unit.layers["attn.to_v"] = replace(unit.layers["attn.to_v"], act=TensorPlan.parse("int8/token"))
    del seen.layers["attn.to_k"]
    assert [list(group.plans) for group in groups.shared(unit, seen)] == [
        [name] for name in unit.layers if "k" not in name
    ]


@pytest.mark.parametrize("fit", [svdquant, viditq], ids=["svdquant", "viditq"])
def test_layers_with_one_input_get_one_transform(fit):
    unit, seen = attention()
    made = fit.fit(unit, seen, {"rank": 8, "share": 0.13})
    assert list(made) == list(unit.layers)
    q, k, v, out = made.values()
    assert q.smooth is not None and torch.equal(q.smooth, k.smooth) and torch.equal(q.smooth, v.smooth)
    assert q.plan.rotate == k.plan.rotate == v.plan.rotate and q.plan.act == k.plan.act == v.plan.act
    assert out.smooth is None or not torch.equal(out.smooth, q.smooth)
    assert q.plan.reason == k.plan.reason and q.plan.reason.startswith(f"best of {q.tried}: ")


@pytest.mark.parametrize("fit", [svdquant, viditq], ids=["svdquant", "viditq"])
def test_activations_that_stay_in_floating_point_are_left_as_they_are(fit):
    unit, seen = attention(weight="int4/channel", act=None)
    for name in unit.layers:  # a vector would help these weights
        unit.layer(name).weight.data[:, [3, 17, 40]] /= 60
    for found in fit.fit(unit, seen, {"rank": 8, "share": 0.13}).values():
        assert found.smooth is None and not found.plan.rotate and not found.plan.rank


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (1024, 256), (3072, 3072)])
@pytest.mark.parametrize("weight", ["int4/group:64", "nvfp4", "int8/channel"])
@pytest.mark.parametrize("element", [2, 4])
def test_the_branch_is_as_large_as_its_share_allows(weight, shape, element):
    plan = LayerPlan("linear", shape, TensorPlan.parse(weight))
    rank = groups.affordable_rank(plan, 10_000, 0.13, element)

    def share(rank):
        branch = element * rank * sum(shape)
        return branch / (branch + plan.packed_bytes)

    assert share(rank) <= 0.13 < share(rank + 1)
    assert groups.affordable_rank(plan, 2, 0.13, element) == min(2, rank)


def test_wide_layers_have_the_published_rank():
    plan = LayerPlan("linear", (3072, 3072), TensorPlan.parse("int4/group:64"))
    assert groups.affordable_rank(plan, svdquant.RANK, svdquant.BRANCH_SHARE, 2) == 32


# --- branch and rounding ---------------------------------------------------------------------------------------------


WISHES = [
    weights.WeightWish(0, "nearest"),
    weights.WeightWish(0),
    weights.WeightWish(4, "nearest"),
    weights.WeightWish(4, iterations=3),
]


@torch.no_grad()
@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_fitted_weight_is_never_worse_than_nearest_and_ships_as_it_is(kind, wish):
    module = linear() if kind == "linear" else nn.Conv2d(16, 12, 3, padding=1)
    x = rows() if kind == "linear" else torch.randn(4, 16, 8, 8, generator=generator())
    plan = plan_of(module, weight="int4/group:16", act="int8/token" if kind == "linear" else "int8a/tensor")
    around = shared(module, plan, x)
    change = smooth.Transform(smooth.balance(around, 0.5, 0.5), (0.5, 0.5), 16)
    plain = error(smooth.transformed(module, plan, change), module, x)
    made = smooth.transformed(module, plan, change)
    errors = weights.fit(made, module, around.seen, wish)
    assert errors[0] == pytest.approx(plain, rel=0.2) and min(errors) <= errors[0]
    assert error(made, module, x) <= 1.02 * plain
    assert len(errors) == 1 or errors[1] < 0.9 * errors[0]
    assert made.plan.rank in (0, wish.rank)
    assert torch.equal(made.rounded_weight(), made.weight), "the weight lies on the grid of the scales it ships with"
    packed = made.pack(torch.float32)
    kept = reference.weight_decoder(packed.plan)(packed.tensors()).reshape(packed.plan.shape)
    assert torch.equal(kept, made.rounded_weight())
    assert torch.allclose(packed(x), made(x), atol=1e-4 * float(made(x).abs().max()))


@torch.no_grad()
def test_a_branch_takes_outlier_directions_out_of_the_weight():
    module, x = linear(64, 64), rows(factor=1.0)
    pair = [torch.randn(64, 2, generator=generator(seed)) for seed in (1, 2)]
    module.weight.data += 0.5 * pair[0] @ pair[1].t()
    plan, found = plan_of(module, weight="int4/channel"), {}
    for rank in (0, 2, 8):
        made = smooth.transformed(module, plan, smooth.Transform())
        weights.fit(made, module, seen_of(x), weights.WeightWish(rank, "nearest"))
        found[rank] = error(made, module, x)
        assert made.plan.rank == rank and (rank == 0 or made.proj_down.shape == (rank, 64))
    assert decibels(found[0], found[2]) > 10 and found[8] < found[2]


@torch.no_grad()
def test_gptq_makes_up_for_errors_where_inputs_go_together():
    module = linear(48, 64)
    mix = torch.randn(8, 64, generator=generator(5))
    train, new = (
        torch.randn(n, 8, generator=generator(n)) @ mix + 0.1 * rows(n, factor=1.0, seed=n) for n in (2000, 500)
    )
    plan = plan_of(module, weight="int4/channel", act=None)
    made = smooth.transformed(module, plan, smooth.Transform())
    weights.fit(made, module, seen_of(train), weights.WeightWish())
    assert error(made, module, new) < 0.5 * error(draft(module, plan), module, new)


@torch.no_grad()
def test_the_worst_of_several_wishes_is_thrown_away():
    """Second moments of other inputs: GPTQ then hurts, and nearest stays."""
    module, x = linear(48, 64), rows(factor=1.0)
    wrong = torch.randn(64, 2, generator=generator(9))
    plan = plan_of(module, weight="int4/channel", act=None)
    made = smooth.transformed(module, plan, smooth.Transform())
    errors = weights.fit(made, module, seen_of(x, gram=wrong @ wrong.t() * 100), weights.WeightWish())
    assert errors[1] > errors[0]
    assert torch.equal(made.rounded_weight(), draft(module, plan).rounded_weight())


# --- the noise of the rounded input ----------------------------------------------------------------------------------


def together(count=1500, inputs=64, seed=0):
    """(count, inputs) rows that a quarter of as many directions explain, but for a hundredth of their power."""
    mix = torch.randn(inputs // 4, inputs, generator=generator(seed + 50))
    return torch.randn(count, inputs // 4, generator=generator(seed)) @ mix + 0.4 * torch.randn(
        count, inputs, generator=generator(seed + 1)
    )


@torch.no_grad()
def test_the_weight_for_a_rounded_input_is_the_one_of_least_squares():
    """W H (H + D)^-1 leaves W in the norm (H^-1 + D^-1)^-1, and any step away from it leaves more."""
    module, x = linear(12, 16), together(400, 16)
    made = draft(module, plan_of(module, act="int4/group:16"))
    met = moments.met(seen_of(x), made)
    weight = made.weight.data
    best = met.target(weight)
    torch.testing.assert_close(best @ met.rounded, weight @ met.clean, rtol=1e-3, atol=1e-3)
    least = met.error(best, weight - best)
    assert least == pytest.approx(float(((weight @ met.lost()) * weight).sum()), rel=1e-3)
    assert least < 0.95 * met.error(weight, torch.zeros_like(weight))
    for seed in range(5):
        step = 0.05 * torch.randn(best.shape, generator=generator(seed))
        assert met.error(best + step, weight - best - step) > least


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("act", ["int4/group:64", None])
def test_weights_that_know_the_noise_of_their_input_gain_where_inputs_go_together(act, rank):
    module = linear(48, 64)
    plan, left = plan_of(module, weight="int4/group:64", act=act), {}
    for noise in (True, False):
        made = smooth.transformed(module, plan, smooth.Transform())
        weights.fit(made, module, seen_of(together()), weights.WeightWish(rank, noise=noise))
        left[noise] = error(made, module, together(500))
    gain = decibels(left[False], left[True])
    assert gain > 1 if act else gain == 0


@torch.no_grad()
def test_directions_that_only_some_rows_have_are_not_let_go_of():
    """Text of one prompt says nothing of another's: a later half of rows in directions that the earlier one lacks."""
    module, earlier, later = linear(48, 64), together(500, 64, 3), together(500, 64, 30)
    x, left = torch.cat([earlier, later]), {}
    plan = plan_of(module, weight="int8/channel", act="int4/group:64")
    seen = seen_of(x, gram=earlier.t() @ earlier / 500)
    for noise in (True, False):
        made = smooth.transformed(module, plan, smooth.Transform())
        weights.fit(made, module, seen, weights.WeightWish(noise=noise))
        left[noise] = error(made, module, later)
    assert left[True] < 1.05 * left[False]
