"""Stored activation scales per step: searched, or from a network of the timestep."""

from __future__ import annotations

import torch

from dq.fit import tables
from dq.plan import LayerPlan, TensorPlan

BUCKETS = 10
EDGES = tuple(100.0 * i for i in range(1, BUCKETS))


def plan(act: str = "int4/tensor/table", columns: int = 32, splits=()) -> LayerPlan:
    weight = TensorPlan.parse("int8/channel")
    return LayerPlan("linear", (8, columns), weight, TensorPlan.parse(act), splits=splits, steps=BUCKETS)


def drifting(rows: int = 400, spread: float = 4.0, columns: int = 32):
    """Rows of normal values whose deviation grows `spread` times over the buckets, and the bucket of each row.

    The values are the same quantiles in every bucket, so that the best step is exactly proportional to the deviation.
    """
    generator = torch.Generator().manual_seed(0)
    share = (torch.randperm(rows * columns, generator=generator) + 0.5) / (rows * columns)
    normal = (2 * share - 1).erfinv() * 2**0.5
    sigma = torch.logspace(0, 1, BUCKETS, base=spread)
    x = normal.reshape(1, rows, columns) * sigma[:, None, None]
    return x.reshape(-1, columns), torch.arange(BUCKETS).repeat_interleave(rows)


def one_range(x: torch.Tensor, layer: LayerPlan, importance: torch.Tensor | None = None) -> torch.Tensor:
    """(1, parts) scales of one range for all steps: the same search over all values at once."""
    everything = torch.zeros(len(x), dtype=torch.long)
    return tables.finite_set(tables.boil_down(x, everything, layer, 1, importance), layer.act)


def best_step(x: torch.Tensor, act: TensorPlan) -> torch.Tensor:
    """The step of least squared error of all values, by direct search in steps of half a percent."""
    full = x.abs().amax() / act.spec.grid().max()
    steps = full * torch.linspace(0.2, 1.0, 161)
    return steps[torch.stack([(act.spec.snap(x / s) * s - x).square().mean() for s in steps]).argmin()]


def true_error(x, bucket, scale, act: TensorPlan) -> torch.Tensor:
    """(buckets,) mean squared error of all values under a table (buckets, 1)."""
    step = scale[bucket]
    return torch.stack([(act.spec.snap(x / step) * step - x)[bucket == i].square().mean() for i in range(BUCKETS)])


def test_each_bucket_gets_nearly_its_best_step():
    (x, bucket), layer = drifting(), plan()
    found = tables.finite_set(tables.boil_down(x, bucket, layer, BUCKETS), layer.act, power=2.0)
    best = torch.stack([best_step(x[bucket == i], layer.act) for i in range(BUCKETS)])
    assert (found[:, 0] / best - 1).abs().max() < 0.02


def test_a_table_is_never_worse_than_any_static_range_for_its_step():  # TFMQ P3
    (x, bucket), layer = drifting(), plan()
    table = tables.finite_set(tables.boil_down(x, bucket, layer, BUCKETS), layer.act)
    own = true_error(x, bucket, table, layer.act)
    for static in (one_range(x, layer), *table.unbind(0)):
        other = true_error(x, bucket, static.reshape(1, 1).expand(BUCKETS, 1), layer.act)
        assert (own <= 1.01 * other).all()
    static = true_error(x, bucket, one_range(x, layer).expand(BUCKETS, 1), layer.act)
    assert (static / own)[0] > 4


def test_a_bucket_that_saw_nothing_takes_the_nearest():
    (x, bucket), layer = drifting(), plan()
    keep = (bucket != 0) & (bucket != 5) & (bucket != 6)
    values = tables.boil_down(x[keep], bucket[keep], layer, BUCKETS)
    found = tables.finite_set(values, layer.act)
    assert values.filled.tolist() == [i not in (0, 5, 6) for i in range(BUCKETS)]
    assert found[0] == found[1] and found[5] == found[4] and found[6] == found[7]


def test_parts_have_scales_of_their_own():
    (x, bucket), layer = drifting(), plan(splits=(12,))
    x[:, 12:] *= 50
    found = tables.finite_set(tables.boil_down(x, bucket, layer, BUCKETS), layer.act)
    assert found.shape == (BUCKETS, 2) and (found[:, 1] / found[:, 0] > 30).all()


def test_important_channels_decide_where_to_clip():
    torch.manual_seed(0)
    x, layer = torch.randn(2000, 32), plan("int4/tensor/static")
    x[:, :4] *= 8
    weighed = torch.ones(32)
    weighed[:4] = 0
    assert one_range(x, layer, weighed) < 0.5 * one_range(x, layer)


def test_rare_large_values_survive_the_sample():
    x, layer = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)), plan("int8/tensor/static")
    x[17, 3], x[18, 3] = 40.0, -50.0
    values = tables.boil_down(x, torch.zeros(len(x), dtype=torch.long), layer, 1)
    assert values.value.amax() == 40 and values.value.amin() == -50
    assert abs(float(values.weight.sum()) - 1) < 1e-4
    assert torch.isclose(tables.widest(values, layer.act), torch.tensor([[50 / 127]]))


def test_network_finds_the_step_of_every_timestep():  # TDQ P1, P3
    (x, bucket), layer = drifting(), plan()
    values = tables.boil_down(x, bucket, layer, BUCKETS)
    found = tables.network(values, layer.act, EDGES)
    best = torch.stack([best_step(x[bucket == i], layer.act) for i in range(BUCKETS)])
    assert (found[:, 0] / best - 1).abs().max() < 0.02
    static = true_error(x, bucket, one_range(x, layer).expand(BUCKETS, 1), layer.act)
    assert (true_error(x, bucket, found, layer.act) < static).all()


def test_network_equals_the_static_scale_where_nothing_drifts():  # TDQ P3, second half
    (x, bucket), layer = drifting(spread=1.0), plan()
    values = tables.boil_down(x, bucket, layer, BUCKETS)
    found = true_error(x, bucket, tables.network(values, layer.act, EDGES), layer.act).mean()
    static = true_error(x, bucket, one_range(x, layer).expand(BUCKETS, 1), layer.act).mean()
    assert abs(found / static - 1) < 0.02


def test_a_network_knows_the_timesteps_between_those_it_saw():  # TDQ: what a table alone does not know
    (x, bucket), layer = drifting(), plan()
    kept = bucket % 2 == 0  # every other step is recorded
    values = tables.boil_down(x[kept], bucket[kept], layer, BUCKETS)
    best = torch.stack([best_step(x[bucket == i], layer.act) for i in range(BUCKETS)])
    network, table = tables.network(values, layer.act, EDGES)[:, 0], tables.finite_set(values, layer.act)[:, 0]
    unseen = torch.arange(BUCKETS) % 2 != 0
    assert (network / best - 1)[unseen].abs().max() < 0.06
    assert (table / best - 1)[unseen].abs().max() > 0.1


def test_network_starts_near_its_start_and_bakes_to_the_bit():  # TDQ P2, P4
    net = tables.Network(torch.tensor([0.5, 2.0]), 0.0, 1000.0)
    t = torch.linspace(0, 1000, 50)
    assert (net(t) / net.start - 1).abs().max() < 0.25
    torch.nn.init.normal_(net.layers[-1].weight)
    assert torch.equal(net.bake(t), net(t).detach()) and not net.bake(t).requires_grad


def test_networks_are_deterministic():
    (x, bucket), layer = drifting(rows=20), plan()
    values = tables.boil_down(x, bucket, layer, BUCKETS)
    first, second, other = (tables.network(values, layer.act, EDGES, 20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_maps_of_a_convolution_and_shifts():
    torch.manual_seed(0)
    x, bucket = torch.rand(6, 8, 4, 4), torch.arange(6) // 3
    shape, weight = (4, 8, 3, 3), TensorPlan.parse("int8/channel")
    layer = LayerPlan("conv2d", shape, weight, TensorPlan.parse("int8/tensor/table/-0.5"), steps=2)
    found = tables.widest(tables.boil_down(x, bucket, layer, 2), layer.act)
    assert found.shape == (2, 1) and (found <= 0.5 / 127 + 1e-6).all()
