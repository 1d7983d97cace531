"""DGQ: which axis has the outliers, groups of channels next to each other, the start token apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dq
from dq import cookbook
from dq.fit import drafts, moments
from dq.host import peft
from dq.layers import packed_layers
from dq.methods import dgq, mixdq
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import LayerSeen, Seen, Unit, UnitCall
from tests.methods.test_methods_dit import UNITS, fitted, models, observed

__all__ = ["fitted", "models", "observed"]  # fixtures
LOUD = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "ff.net.0.proj")  # of tiny-pixart: one channel 6 times the median
BOTH = pytest.mark.parametrize("kind", ["linear", "conv2d"])


def layer_of(kind: str, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, 16) if kind == "linear" else nn.Conv2d(width, 16, 3, padding=1)


def plan_of(kind: str, act: str = "int6/tensor/static", **more) -> LayerPlan:
    weight, shape = TensorPlan.parse("int8/channel"), tuple(layer_of(kind).weight.shape)
    return LayerPlan(kind, shape, weight, TensorPlan.parse(act), **more)


@BOTH
def test_the_axis_of_the_outliers_is_found(kind):  # DGQ P1
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        for by_channel in (True, False):
            x = torch.randn(4, 64, 32, generator=dice)
            x[(..., slice(3, 6)) if by_channel else (slice(None), slice(3, 6))] *= 30
            x = x if kind == "linear" else x.transpose(1, 2).reshape(4, 32, 8, 8)
            layer = layer_of(kind)
            unit = Unit("layer", layer, {"layer": plan_of(kind)})
            found = dgq.ends(unit, [UnitCall((half,), {}, None, 0) for half in x.split(2)])["layer"]
            assert found.by_channel == by_channel and len(found.channels) == 32 and len(found.positions) == 64


def test_groups_keep_the_quiet_channels():  # DGQ P2
    dice = torch.Generator().manual_seed(0)
    x, layer = torch.randn(512, 320, generator=dice), nn.Linear(320, 16)
    loud = torch.randperm(320, generator=dice)[:6]
    x[:, loud] *= 30
    quiet = torch.ones(320, dtype=torch.bool).index_fill_(0, loud, False)
    plan = LayerPlan("linear", (16, 320), TensorPlan.parse("int8/channel"), TensorPlan.parse("int6/tensor/static"))
    seen = LayerSeen(x, x, torch.zeros(512, dtype=torch.long), torch.zeros(512, dtype=torch.long))
    found = dgq.Ends(torch.stack([x.amin(0), x.amax(0)], 1), torch.zeros(1, 2))
    decibels = {}
    for groups in (1, 8):
        made = dgq._fitted(layer, plan, seen, found, Seen({}, 1, (), iter), {"groups": groups})
        z = made.transform(x)
        noise = made._round(z, made.act_scale[0]).detach() - z
        inside = quiet if made.permute is None else quiet[made.permute]
        decibels[groups] = float(10 * torch.log10(z[:, inside].square().mean() / noise[:, inside].square().mean()))
    assert decibels[1] < 5 and decibels[8] > 20, decibels


@BOTH
def test_an_order_of_channels_changes_nothing_by_itself_and_ships(kind, tmp_path):
    layer = layer_of(kind)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    made = drafts.draft(layer, plan_of(kind, permute=True, splits=(5, 20)), None, order)
    made.act_scale.data.copy_(torch.tensor([[0.11, 0.12, 0.13]]))
    x = torch.randn(2, 7, 32) if kind == "linear" else torch.randn(2, 32, 6, 6)
    packed = made.pack(torch.float32)
    assert torch.equal(packed.permute.long(), order) and packed.permute.dtype is torch.int32
    assert torch.allclose(packed(x), made(x), atol=1e-4)
    assert torch.allclose(packed.dense_weight(), layer.weight, atol=0.02)
    truth = layer(x).detach()
    assert float((packed(x) - truth).square().mean() / truth.square().mean()) < 0.01
    other = drafts.draft(layer, plan_of(kind, permute=True, splits=(5, 20)), None, order.flip(0)).pack(torch.float32)
    assert not torch.equal(other.weight, packed.weight)


@BOTH
def test_an_adapter_fuses_in_the_order_of_the_channels(kind):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    made = drafts.draft(layer_of(kind), plan_of(kind, permute=True), None, order)
    made.act_scale.data.fill_(0.12)
    packed, x = made.pack(torch.float32), torch.randn(2, 32, 6, 6) if kind == "conv2d" else torch.randn(2, 7, 32)
    before, down, up = packed(x), torch.randn(2, made.plan.columns), torch.randn(16, 2)
    peft.widen(packed, down, up)
    added = (up @ down).reshape(packed.plan.shape)
    truth = nn.functional.linear(x, added) if kind == "linear" else nn.functional.conv2d(x, added, padding=1)
    assert torch.allclose(packed(x) - before, truth, atol=1e-3)


def test_moments_are_those_of_the_permuted_input():
    x, order = torch.randn(64, 32), torch.randperm(32)
    made = drafts.draft(layer_of("linear"), plan_of("linear", permute=True), None, order)
    seen = LayerSeen(x, x, torch.zeros(64), torch.zeros(64), gram=x.t() @ x / 64)
    z = made.transform(x)
    assert torch.allclose(moments.transformed(seen, made), z.t() @ z / 64, atol=1e-5)


def test_without_rounded_activations_there_is_no_order_to_keep():
    with pytest.raises(dq.DQError, match="permute is for rounded activations"):
        replace(plan_of("linear"), act=None, permute=True).check("layer")


class Text(nn.Module):
    """Keys of a text, one loud channel apart from the start token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_k = nn.Linear(64, 64)

    def forward(self, x):
        return self.to_k(x)


def texts(count: int = 6) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(3)
    found = torch.randn(count, 2, 9, 64, generator=dice)
    found[..., 7] *= 12
    found[:, :, 0] = 40 * torch.randn(64, generator=dice)
    return list(found)


def test_a_model_of_groups_keeps_the_start_token_and_reloads(tmp_path):
    calls, exact = texts(), Text()
    errors = {}
    for groups in (1, 8):
        model, wish = Text(), cookbook.get("dgq-w4a6")
        wish = replace(wish, linear=("int8/channel", wish.linear[1]), options={"groups": groups})
        dq.quantize(model, wish, calibration=lambda given: [given(x) for x in calls], progress=False)
        (layer,) = packed_layers(model).values()
        assert layer.plan.start and layer.plan.permute == (groups > 1)
        assert 31 * float(layer.act_scale.max()) < 60, "no range is for the start token, which is twice as loud"
        quiet = sorted(float(scale) for scale in layer.act_scale[0])[:-1]
        assert all(31 * scale < 6 for scale in quiet), "all groups but that of the loud channel are for quiet ones"
        with torch.no_grad():
            y, truth = model(calls[0]), exact(calls[0])
        assert torch.allclose(y[:, 0], truth[:, 0], atol=1e-4)
        errors[groups] = float((y - truth)[:, 1:].square().mean() / truth[:, 1:].square().mean())
    assert errors[8] < 0.5 * errors[1], errors
    dq.save(model, tmp_path)
    again = dq.load(tmp_path, Text())
    assert torch.equal(again(calls[1]), model(calls[1]))


@torch.no_grad()
def test_groups_of_alike_channels_round_the_input_more_finely_than_as_many_in_order(fitted, observed):
    """A trained block on a prompt that nothing was fitted to: error of the output by the inputs' rounding alone."""
    unit, _, alike = fitted("tiny-pixart", "dgq-w4a6")
    ordered = fitted("tiny-pixart", "dgq-w4a6", permute=False)[2]
    inputs: dict[str, list[torch.Tensor]] = {f"{UNITS['tiny-pixart']}.{name}": [] for name in LOUD}
    looks = {name: lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2)) for name, rows in inputs.items()}
    mixdq.replayed(unit, observed["tiny-pixart"][2], looks)
    for name, rows in inputs.items():
        x, errors = torch.cat(rows), []
        y = unit.layer(name)(x)
        for made in (alike[name], ordered[name]):
            z = made.transform(x)
            pairs = (made._round(z, made.act_scale[0]), made.unrounded()), (z, made.rounded_weight())
            errors.append([float((made.product(*pair) - y).square().sum()) for pair in pairs])
        assert alike[name].plan.permute and not ordered[name].plan.permute
        assert len(alike[name].plan.parts) == len(ordered[name].plan.parts) == dgq.GROUPS
        (act, weight), (act_ordered, weight_ordered) = errors
        assert act < 0.8 * act_ordered, name
        assert weight < 1.1 * weight_ordered, f"{name}: the weight, whose scales are the groups', is as near"
