"""What layers are seen to see, against direct computation from the full inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dq.plan import LayerPlan, TensorPlan
from dq.trace import observe
from dq.trace.observe import CallInfo, Observer, finish, join
from dq.trace.seen import Needs, Unit

WEIGHT = TensorPlan.parse("int8/channel")
KINDS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
CONVS = [
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, (1, 3), padding=(0, 2), dilation=(1, 2)),
    nn.Conv2d(3, 5, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(3, 5, 4, padding="same"),
    nn.Conv2d(3, 5, 1),
    nn.Conv1d(3, 5, 3, padding=1),
    nn.Conv3d(3, 5, (2, 3, 3), stride=(1, 2, 1), padding=(1, 1, 0)),
]


def unit_of(module):
    found = {name: layer for name, layer in module.named_modules() if type(layer) in KINDS}
    plans = {name: LayerPlan(KINDS[type(layer)], tuple(layer.weight.shape), WEIGHT) for name, layer in found.items()}
    return Unit("", module, {name or "layer": plan for name, plan in plans.items()})


class Holder(nn.Module):
    """A unit of one layer under a name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def seen_by(module, inputs, needs, infos=None, hats=None, pieces=1, buckets=3):
    """Run a module as a unit over inputs (and hats) and give what its layers saw."""
    unit = unit_of(module)
    unit.layer = lambda name: module.get_submodule(name)
    infos = infos or [CallInfo(i, i, i % buckets, (0,), 7 + i) for i in range(len(inputs))]
    observer = Observer(unit, needs, len(inputs), buckets, hats is not None)
    total = {}
    with torch.no_grad():
        for piece in range(pieces):
            for i in range(piece, len(inputs), pieces):
                with observer.watch(infos[i], hat=False):
                    module(inputs[i])
                if hats is not None:
                    with observer.watch(infos[i], hat=True):
                        module(hats[i])
            total, torn = join((total, observer.take()))
            assert not torn
    return finish(total)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_moments_of_a_linear_are_means_over_its_rows():
    xs, hats = [[normal(2, 5, 6, seed=i + s) for i in range(4)] for s in (0, 10)]
    seen = seen_by(Holder(nn.Linear(6, 3)), xs, Needs(rows=1000, gram=True), hats=hats)["layer"]
    x, hat = (torch.cat(part).reshape(-1, 6) for part in (xs, hats))
    torch.testing.assert_close(seen.gram, hat.t() @ hat / 40)
    assert torch.equal(seen.x, x) and torch.equal(seen.hat, hat)
    assert seen.bucket.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [0] * 10
    alone = seen_by(Holder(nn.Linear(6, 3)), xs, Needs(rows=8, gram=True))["layer"]
    assert alone.hat is alone.x
    torch.testing.assert_close(alone.gram, x.t() @ x / 40)


def test_samples_have_the_asked_size_and_match_between_the_streams():
    xs = [normal(2, 50, 6, seed=i) for i in range(4)]
    hats = [x + 1 for x in xs]
    seen = seen_by(Holder(nn.Linear(6, 3)), xs, Needs(rows=10), hats=hats)["layer"]
    assert seen.x.shape == (10, 6) and torch.equal(seen.hat, seen.x + 1)
    counts = [int((seen.x[:, None] == x.reshape(-1, 6)).all(-1).any(1).sum()) for x in xs]
    assert counts == [2, 3, 2, 3] and len(seen.x.unique(dim=0)) == 10


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_patches_times_the_weight_are_the_output(conv):
    space = (7, 6, 5)[: len(conv.kernel_size)]
    x, layer = normal(2, 3, *space), observe._Layer(conv, False)
    out = conv(x).detach()
    assert layer.positions(x) == out[:, 0].numel()
    picked = torch.randperm(layer.positions(x), generator=torch.Generator().manual_seed(1))[:9]
    patches = layer.columns(x, picked)
    expected = out.movedim(1, -1).reshape(-1, 5)[picked]
    torch.testing.assert_close(patches @ conv.weight.detach().reshape(5, -1).t() + conv.bias.detach(), expected)


def test_moments_of_a_convolution_are_over_its_patches():
    conv, xs = nn.Conv2d(3, 5, 3, stride=2, padding=1), [normal(2, 3, 6, 6, seed=i) for i in range(3)]
    seen = seen_by(Holder(conv), xs, Needs(rows=80, gram=True))["layer"]
    patches = F.unfold(torch.cat(xs), 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
    torch.testing.assert_close(seen.gram, patches.t() @ patches / len(patches))
    assert seen.x.shape == (3, 3, 6, 6)  # 80 pixels are two maps of 36, but every call gives one
    assert all(any(torch.equal(one, other) for other in torch.cat(xs)) for one in seen.x)
    grouped = seen_by(Holder(nn.Conv2d(4, 4, 3, groups=2)), [normal(2, 4, 6, 6)], Needs(rows=36, gram=True))["layer"]
    assert grouped.gram is None and grouped.x.shape == (1, 4, 6, 6)


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 2, 3, padding=1), nn.Conv1d(3, 2, 3), nn.Conv3d(3, 2, 3)], ids=str)
def test_every_call_gives_crops_of_its_own_map_and_rows_may_be_meant_for_each_step(conv):
    dims = len(conv.kernel_size)
    side = {1: 150, 2: 20, 3: 9}[dims]
    xs = [normal(2, 3, *[side] * dims, seed=i) + 100 * i for i in range(6)]
    crop = {1: 64, 2: 8, 3: 4}[dims]
    few = seen_by(Holder(conv), xs, Needs(rows=1))["layer"]
    assert few.x.shape == (6, 3, *[crop] * dims), "one crop of every call, however few rows are asked for"
    assert (few.x.flatten(1).mean(1) / 100).round().tolist() == [0, 1, 2, 3, 4, 5]
    many = seen_by(Holder(conv), xs, Needs(rows=4 * crop**dims, steps=True))["layer"]
    assert len(many.x) == 4 * 3 and many.bucket.bincount().tolist() == [4, 4, 4]
    for one in many.x:
        source = xs[int((one.mean() / 100).round())]
        windows = source
        for dim in range(dims):
            windows = windows.unfold(2 + dim, crop, 1)
        windows = windows.movedim(1, 1 + dims).flatten(0, dims)
        assert (windows == one).flatten(1).all(1).any(), "a piece of the map as it was"


def test_crops_hold_what_one_output_is_made_of():
    conv = nn.Conv2d(3, 2, 5, dilation=3)
    seen = seen_by(Holder(conv), [normal(1, 3, 30, 30)], Needs(rows=64))["layer"]
    assert seen.x.shape == (1, 3, 13, 13) and conv(seen.x).shape == (1, 2, 1, 1)


def test_ranges_are_by_bucket_and_branch_over_all_values():
    x = normal(4, 5, 6)
    infos = [CallInfo(0, 0, 2, (1, 1, 0, 0), 0)]
    seen = seen_by(Holder(nn.Linear(6, 3)), [x], Needs(absmax=True), infos)["layer"]
    for branch, part in ((1, x[:2]), (0, x[2:])):
        assert torch.equal(seen.absmax[2, branch], part.abs().amax((0, 1)))
        assert seen.low[2, branch] == part.min() and seen.high[2, branch] == part.max()
    assert not seen.absmax[:2].any() and not seen.low[:2].any() and not seen.high[:2].any()
    maps = normal(2, 3, 4, 4)
    conv = seen_by(Holder(nn.Conv2d(3, 2, 3)), [maps], Needs(absmax=True), [CallInfo(0, 0, 0, (0, 1), 0)])["layer"]
    assert torch.equal(conv.absmax[0, 1], maps[1].abs().amax((1, 2))) and len(conv.x) == 0


def test_branches_of_rows_and_maps_follow_the_batch():
    infos = [CallInfo(0, 0, 0, (1, 0), 3)]
    x = torch.cat([torch.ones(1, 8, 6), torch.zeros(1, 8, 6)])
    seen = seen_by(Holder(nn.Linear(6, 3)), [x], Needs(rows=9), infos)["layer"]
    assert torch.equal(seen.branch, seen.x[:, 0].long()) and set(seen.branch.tolist()) == {0, 1}
    frames = x.reshape(16, 6, 1, 1)  # frames folded into the batch
    seen = seen_by(Holder(nn.Conv2d(6, 3, 1)), [frames], Needs(rows=9), infos)["layer"]
    assert torch.equal(seen.branch, seen.x[:, 0, 0, 0].long()) and len(seen.x) == 9


class Attention(nn.Module):
    """q and k share an input; v has an equal one at another address; o runs thrice; p sees x changed in place."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.p = (nn.Linear(6, 6) for _ in range(5))

    def forward(self, x):
        x = x.clone()
        y = self.q(x) + self.k(x) + self.v(x.clone())
        for _ in range(3):
            y = self.o(y * 2)
        x += 1
        return y + self.p(x)


def test_shared_inputs_are_found_by_identity_and_summed_up_once():
    seen = seen_by(Attention(), [normal(2, 5, 6)], Needs(rows=4, gram=True))
    assert {name: item.source for name, item in seen.items()} == {"q": "q", "k": "q", "v": "v", "o": "o", "p": "p"}
    assert seen["k"].gram is seen["q"].gram and seen["k"].x is seen["q"].x
    assert torch.equal(seen["v"].gram, seen["q"].gram) and not torch.equal(seen["p"].gram, seen["q"].gram)


def test_a_shared_input_that_is_not_always_shared_is_told():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, y=None):
            return self.q(x) + self.k(x if y is None else y)

    module = Cross()
    unit = unit_of(module)
    unit.layer = module.get_submodule
    observer = Observer(unit, Needs(rows=4), 2, 1, False)
    for index, given in enumerate([(normal(5, 6),), (normal(5, 6), normal(5, 6, seed=1))]):
        with observer.watch(CallInfo(index, index, 0, (0,), 0), hat=False):
            module(*given)
    assert observer.torn == {"k"}


def test_rows_of_experts_are_not_paired_between_streams():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x):
            chosen = x[:, 0] > 0
            return self.experts[0](x[chosen]).sum() + self.experts[1](x[~chosen]).sum()

    x = normal(20, 6)
    seen = seen_by(Experts(), [x], Needs(rows=100, gram=True), hats=[-x.abs()])
    assert torch.equal(seen["experts.0"].hat, seen["experts.0"].x)  # the hat stream sends it nothing
    taken = x[x[:, 0] > 0]
    torch.testing.assert_close(seen["experts.0"].gram, taken.t() @ taken / len(taken))


def test_pieces_are_joined_in_order_whoever_summed_them_up():
    xs = [normal(1, 30, 6, seed=i) for i in range(5)]
    one, again = (seen_by(Holder(nn.Linear(6, 3)), xs, Needs(rows=9, gram=True, absmax=True), pieces=3) for _ in "ab")
    assert all(
        torch.equal(getattr(one["layer"], k), getattr(again["layer"], k)) for k in ("x", "gram", "absmax", "low")
    )
    plain = seen_by(Holder(nn.Linear(6, 3)), xs, Needs(rows=9, gram=True, absmax=True))["layer"]
    torch.testing.assert_close(one["layer"].gram, plain.gram)
    assert all(torch.equal(getattr(one["layer"], k), getattr(plain, k)) for k in ("absmax", "low", "high"))
    assert torch.equal(one["layer"].x.sort(0)[0], plain.x.sort(0)[0])


def test_only_what_is_asked_for_is_recorded():
    seen = seen_by(Holder(nn.Linear(6, 3)), [normal(2, 5, 6)], Needs(absmax=True))["layer"]
    assert len(seen.x) == 0 and seen.gram is None
    seen = seen_by(Holder(nn.Linear(6, 3)), [normal(2, 5, 6)], Needs(rows=4))["layer"]
    assert len(seen.x) == 4 and seen.absmax is seen.low is seen.gram is None


def test_memory_holds_one_call():
    """Inputs are held while their unit runs, then only samples stay."""
    module, held = Holder(nn.Linear(6, 3)), []
    unit = unit_of(module)
    unit.layer = module.get_submodule
    observer = Observer(unit, Needs(rows=6, gram=True, absmax=True), 3, 1, False)
    for index in range(3):
        with observer.watch(CallInfo(index, index, 0, (0,), 0), hat=False):
            module(normal(2, 500, 6, seed=index))
            held.append(len(observer._inputs))
        assert not observer._inputs and not observer._taken
    assert held == [1, 1, 1] and sum(len(part) for part in observer.sums["layer"].x) == 6
