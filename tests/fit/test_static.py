"""Stored activation scales of one layer: ranges that no call seen exceeds by much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq.fit import static, walk
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import LayerSeen, Seen, Unit

BUCKETS = 3


def fitted(scale: str, loudest: float, wish=None):
    """A linear whose sample ends at about 4 while some call had `loudest` in the second bucket."""
    dice = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 8)
    x, bucket = torch.randn(96, 16, generator=dice), torch.arange(96) // 32
    absmax = torch.zeros(BUCKETS, 2, 16)
    for index in range(BUCKETS):
        absmax[index, 0] = x[bucket == index].abs().amax(0)
    absmax[1, 0, 5] = loudest
    seen = LayerSeen(x, x, bucket, torch.zeros(96, dtype=torch.long), absmax)
    plan = LayerPlan("linear", (8, 16), TensorPlan.parse("int8/channel"), TensorPlan.parse(f"int8/tensor/{scale}"))
    whole = Seen({"layer": seen}, BUCKETS, (300.0, 600.0), lambda stream: iter(()))
    wish = wish or static.StaticWish(smooth=False, shift=False, rotate=False, margins=(1.0,), round="nearest")
    return static.fit(layer, plan, seen, whole, wish).act_scale.data[:, 0] * 127


@pytest.mark.parametrize("ranges", ["search", "network"])
def test_a_searched_range_covers_half_of_the_largest_value_that_any_call_had(ranges):
    wish = static.StaticWish(ranges, smooth=False, shift=False, rotate=False, margins=(1.0,), round="nearest")
    tops = fitted("table", 40.0, wish)
    assert tops[1] >= static.FLOOR * 40 - 1e-4 and max(tops[0], tops[2]) < 6, "only where that call was"
    assert (fitted("table", 0.0, wish) < 6).all()


def test_one_range_covers_half_of_it_too():
    assert fitted("static", 40.0)[0] == pytest.approx(20, abs=1e-3) and fitted("static", 0.0)[0] < 6


def test_the_error_of_a_layer_with_a_table_is_that_of_each_row_at_its_own_step():
    dice = torch.Generator().manual_seed(0)
    bucket, layer = torch.arange(96) // 32, nn.Linear(16, 8)
    x = torch.randn(96, 16, generator=dice) * torch.tensor([0.01, 1.0, 100.0])[bucket, None]
    seen = LayerSeen(x, x, bucket, torch.zeros(96, dtype=torch.long))
    plan = LayerPlan("linear", (8, 16), TensorPlan.parse("int8/channel"), TensorPlan.parse("int8/tensor/table"))
    unit = Unit("layer", layer, {"layer": plan})
    whole = Seen({"layer": seen}, BUCKETS, (300.0, 600.0), lambda stream: iter(()))
    made = static.fit(layer, plan, seen, whole, static.StaticWish(smooth=False, shift=False, rotate=False))
    errors = []
    for index in range(BUCKETS):
        made.clock.index.fill_(index)
        errors.append(walk._error_db(unit, "layer", made, whole))
    assert min(errors) > 35 and max(errors) == min(errors), "whatever step the clock shows"


def test_steps_keep_ranges_of_their_own():
    """No neighbour widens them: every call gives a sample of each layer."""
    tops = fitted("table", 0.0)
    assert len({round(float(top), 4) for top in tops}) == BUCKETS
