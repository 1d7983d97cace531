"""Rounding to nearest, GPTQ, scale search, learned rounding: on the grid to the bit, never worse than nearest."""

import pytest
import torch

from dq import formats
from dq.fit import rounding
from dq.fit.adaround import Rounding
from dq.plan import LayerPlan, TensorPlan

GRIDS = [f"int{bits}/group:32" for bits in range(2, 9)]
GRIDS += [
    "int4/channel",
    "int4/tensor",
    "int4a/group:32",
    "int4a/channel",
    "int3a/tensor",
    "fp4/channel",
    "fp4/group:32",
]
GRIDS += ["int4/group:32+channel", "int3/group:32+channel"]
GRIDS += ["fp8/channel", "fp8/tensor", "e3m0/group:32", "fp6_e2m3/channel", "nvfp4", "mxfp4", "mxfp8"]
GRIDS += ["lut4/channel", "lut3/tensor"]
each_grid = pytest.mark.parametrize("grid", GRIDS)
ROWS, COLUMNS = 24, 150  # more than one block of columns, ragged groups


def plan_of(grid, rows=ROWS, columns=COLUMNS, **more):
    return LayerPlan("linear", (rows, columns), TensorPlan.parse(grid), **more)


def weights(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(columns=COLUMNS, count=2000, seed=1):
    """Correlated, of unequal size per channel."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, columns // 6, generator=generator) @ torch.randn(
        columns // 6, columns, generator=generator
    )
    loud = torch.rand(columns, generator=generator) * 2
    return (mixed / (columns // 6) ** 0.5 + 0.3 * torch.randn(count, columns, generator=generator)) * loud


def moment(x):
    return x.t() @ x / x.shape[0]


def assert_on_grid(rounded, plan, scales):
    spec, grain = plan.weight.spec, plan.weight.grain
    for (first, last), scale in zip(plan.parts, scales, strict=True):
        part = rounded[:, first:last]
        assert torch.equal(spec.decode(spec.encode(part, grain, *scale), grain), part)


@each_grid
@pytest.mark.parametrize("splits", [(), (64,)], ids=["whole", "split"])
def test_gptq_is_on_the_grid_and_never_worse_than_nearest(grid, splits):
    plan, weight, gram = plan_of(grid, splits=splits), weights(), moment(inputs())
    plain, plain_scales = rounding.nearest(weight, plan)
    rounded, scales = rounding.gptq(weight, plan, gram)
    assert_on_grid(plain, plan, plain_scales)
    assert_on_grid(rounded, plan, scales)
    for mine, theirs in zip(scales, plain_scales, strict=True):
        assert torch.equal(mine.scale, theirs.scale)
    lost = (rounded - weight) @ gram
    before = (plain - weight) @ gram
    each, each_before = (lost * (rounded - weight)).sum(1), (before * (plain - weight)).sum(1)
    assert (each <= each_before * (1 + 1e-4)).all()  # row by row
    share = rounding.error(rounded, weight, gram) / rounding.error(plain, weight, gram)
    coarse = plan.weight.spec.bits > 2 and grid != "e3m0/group:32"
    assert share < (0.6 if coarse else 0.9)


@pytest.mark.parametrize("grid", ["int4/group:32", "int4/channel", "int3a/channel", "int4/group:32+channel", "nvfp4"])
def test_coordinate_descent_is_on_the_grid_and_each_sweep_is_no_worse(grid):
    plan, weight, gram = plan_of(grid, splits=(64,)), weights(), moment(inputs())
    losses = []
    for sweeps in range(4):
        rounded, scales = rounding.coordinate_descent(weight, plan, gram, sweeps)
        assert_on_grid(rounded, plan, scales)
        losses.append(rounding.error(rounded, weight, gram))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]
    scales = rounding.mse_scales(weight, plan, gram.diagonal())
    assert torch.equal(rounding.coordinate_descent(weight, plan, gram, 0)[0], rounding.on_grid(weight, plan, scales))


def test_no_single_weight_can_be_moved_to_a_better_point_after_coordinate_descent():
    """Where sweeps end: a coordinate-wise minimum, which rounding column after column is not."""
    plan, weight, gram = plan_of("int4/channel", 4, 20), weights(4, 20), moment(inputs(20))
    ends = {}
    for name, (rounded, scales) in {
        "descent": rounding.coordinate_descent(weight, plan, gram, 30),
        "gptq": rounding.gptq(weight, plan, gram, search=True),
    }.items():
        least, ends[name] = rounding.error(rounded, weight, gram), 0
        for row in range(4):
            for column in range(20):
                for step in (-1, 1):
                    moved = rounded.clone()
                    moved[row, column] += step * scales[0].scale[row, 0]
                    moved = rounding.on_grid(moved, plan, scales)
                    ends[name] += rounding.error(moved, weight, gram) < least * (1 - 1e-5)
    assert ends["descent"] == 0 < ends["gptq"]


def test_gptq_gains_twofold_at_four_bits():
    x = inputs(256, 4000)
    plan, weight = plan_of("int4/group:64", 64, 256), weights(64, 256)
    plain, _ = rounding.nearest(weight, plan)
    rounded, _ = rounding.gptq(weight, plan, moment(x))
    outputs = [((matrix - weight) @ x.t()).square().mean() for matrix in (plain, rounded)]
    assert outputs[1] < outputs[0] / 2


@each_grid
def test_independent_inputs_leave_nearest(grid):
    plan, weight = plan_of(grid), weights()
    gram = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)).diag()
    assert torch.equal(rounding.gptq(weight, plan, gram)[0], rounding.nearest(weight, plan)[0])


def test_gptq_is_the_textbook_algorithm():
    """Against the published form: inverse, its Cholesky factor, one column at a time."""
    plan, weight, gram = plan_of("int3/channel"), weights(), moment(inputs())
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(COLUMNS)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    scale = plan.weight.spec.fit(weight, plan.weight.grain).scale
    left, expected = weight.double(), torch.zeros(ROWS, COLUMNS)
    for k in range(COLUMNS):
        expected[:, k] = plan.weight.spec.fake(left[:, k : k + 1].float(), "channel", scale=scale)[:, 0]
        wrong = (left[:, k] - expected[:, k]) / upper[k, k]
        left[:, k:] -= wrong[:, None] * upper[k, k:]
    rounded, _ = rounding.gptq(weight, plan, gram, order=False)
    assert (rounded == expected).float().mean() > 0.995  # ties within fp32 rounding may part


def test_order_takes_the_loud_columns_first():
    plan, weight, x = plan_of("int3/group:32"), weights(), inputs() * torch.linspace(0.05, 3, COLUMNS)
    errors = [
        rounding.error(rounding.gptq(weight, plan, moment(x), order=o)[0], weight, moment(x)) for o in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_fewer_rows_than_columns_and_unseen_inputs(damp):
    x = inputs(count=20)
    x[:, 7] = 0
    plan, weight, gram = plan_of("int4/channel"), weights(), moment(x)
    rounded, scales = rounding.gptq(weight, plan, gram, damp=damp)
    plain, _ = rounding.nearest(weight, plan)
    assert_on_grid(rounded, plan, scales)
    assert rounding.error(rounded, weight, gram) < 0.5 * rounding.error(plain, weight, gram)
    assert torch.equal(rounded[:, 7], plain[:, 7])
    assert torch.equal(rounding.gptq(weight, plan, torch.zeros_like(gram))[0], plain)


def test_moments_that_are_not_finite_are_refused():
    gram = moment(inputs())
    gram[3, 3] = torch.nan
    with pytest.raises(formats.FormatError, match="second moments of the input: got 1 non-finite"):
        rounding.gptq(weights(), plan_of("int4/channel"), gram)


def test_error_is_the_mean_squared_output_error():
    x, weight = inputs(), weights()
    other = weight + 0.01 * weights(seed=6)
    direct = (x @ (other - weight).t()).square().sum(1).mean()
    torch.testing.assert_close(rounding.error(other, weight, moment(x)), float(direct), rtol=1e-3, atol=0)


def test_given_scales_are_used_and_the_search_keeps_the_better():
    plan, weight, gram = plan_of("int3/channel"), weights(), moment(inputs())
    weight[:, 0] *= 6  # outliers that cost the others their resolution
    wanted = [formats.Scales(plan.weight.spec.fit(weight, plan.weight.grain).scale * 0.7)]
    rounded, scales = rounding.gptq(weight, plan, gram, scales=wanted)
    assert torch.equal(scales[0].scale, wanted[0].scale)
    assert_on_grid(rounded, plan, wanted)
    absmax = rounding.error(rounding.gptq(weight, plan, gram)[0], weight, gram)
    searched, scales = rounding.gptq(weight, plan, gram, search=True)
    assert rounding.error(searched, weight, gram) < absmax
    assert_on_grid(searched, plan, scales)


@each_grid
def test_searched_scales_never_lose_in_any_block(grid):
    plan, weight = plan_of(grid), weights().pow(3) * 100
    weight[1, :40] = 0
    spec, grain = plan.weight.spec, plan.weight.grain
    plain, rounded = (
        spec.fake(weight, grain, *s[0]) for s in (rounding.fit_scales(weight, plan), rounding.mse_scales(weight, plan))
    )
    losses = [rounding._block_sum((matrix - weight).square(), grain) for matrix in (plain, rounded)]
    losses = [loss.sum() for loss in losses] if grain.two_level else losses  # found for each block, then rounded
    assert (losses[1] <= losses[0]).all()
    if spec.bits <= 4:
        assert losses[1].sum() < 0.99 * losses[0].sum()
    found = rounding.mse_scales(weight, plan)
    assert_on_grid(rounding.nearest(weight, plan, found)[0], plan, found)


def test_search_counts_columns_by_weight():
    plan, weight = plan_of("int3/channel"), weights()
    weight[:, 0] *= 5
    important = torch.full((COLUMNS,), 1e-3)
    important[0] = 1000.0
    first, equal = (
        (rounding.nearest(weight, plan, found)[0] - weight)[:, 0].square().sum()
        for found in (rounding.mse_scales(weight, plan, important), rounding.mse_scales(weight, plan))
    )
    assert first < 0.2 * equal


@each_grid
def test_learned_rounding_starts_at_the_weight_and_ends_next_to_it(grid):
    plan, weight = plan_of(grid, splits=(64,)), weights()
    weight[1, :40] = 0
    plain, scales = rounding.nearest(weight, plan)
    made = Rounding(weight, plan, scales)
    low, high = made.low, made.high
    inside = (weight >= low) & (weight <= high)
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(made.soft()[inside], weight[inside], rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.minimum((plain - low).abs(), (plain - high).abs()), torch.zeros_like(low))
    for end, value in ((1.0, high), (-1.0, low)):
        made.choice.data.fill_(end)
        assert torch.equal(made.hard(), value)
        assert_on_grid(made.hard(), plan, scales)
    made.choice.data.fill_(0)
    assert made.regulariser(2.0) == made.choice.numel()
    made.choice.data.fill_(50)
    assert made.regulariser(2.0) == 0


def test_learned_rounding_steps_over_a_binade_to_the_next_grid_point():
    plan = plan_of("fp4/channel", 1, 8)
    weight = torch.tensor([[6.0, 1.9, 2.1, -1.9, -2.1, 3.9, 0.2, -6.0]])
    made = Rounding(weight, plan, [formats.Scales(torch.ones(1, 1))])
    assert made.low.tolist() == [[4.0, 1.5, 2.0, -2.0, -3.0, 3.0, 0.0, -6.0]]
    assert made.high.tolist() == [[6.0, 2.0, 3.0, -1.5, -2.0, 4.0, 0.5, -4.0]]
    torch.testing.assert_close(made.hard(), torch.tensor([[6.0, 2.0, 2.0, -2.0, -2.0, 4.0, 0.0, -6.0]]))


def test_learned_rounding_starts_where_it_is_held_on_the_side_of_the_weight():
    """A binade's first point has half the gap below it that it has above."""
    plan, scales = plan_of("fp4/channel", 1, 6), [formats.Scales(torch.ones(1, 1))]
    weight = torch.tensor([[3.2, -3.2, 4.5, 2.3, 9.0, 0.0]])
    held = torch.tensor([[4.0, -4.0, 4.0, 4.0, 6.0, 0.5]])
    made = Rounding(weight, plan, scales, held)
    assert made.low.tolist() == [[3.0, -4.0, 4.0, 3.0, 4.0, 0.0]]
    assert made.high.tolist() == [[4.0, -3.0, 6.0, 4.0, 6.0, 0.5]]
    assert torch.equal(made.hard(), held), "what is held stays until training moves it"
    torch.testing.assert_close(made.soft(), torch.tensor([[3.55, -3.55, 4.5, 3.55, 6.0, 0.275]]))


@each_grid
def test_learned_rounding_starts_at_any_choice_of_grid_points(grid):
    plan, weight = plan_of(grid), weights()
    held, scales = rounding.gptq(weight, plan, moment(inputs()))
    made = Rounding(weight, plan, scales, held)
    torch.testing.assert_close(made.hard(), held)
    towards = torch.where(weight < held, made.low, made.high)
    there = (towards - held) * (weight - held) > 0
    beyond = (weight < made.low) | (weight > made.high)
    assert (there | beyond | torch.isclose(weight, held, atol=1e-6)).all(), "the other point is on the weight's side"


def test_scale_aware_rounding_moves_weights_of_every_gap_as_far():
    plan, scales = plan_of("e3m0/channel", 1, 3), [formats.Scales(torch.ones(1, 1))]
    weight = torch.tensor([[0.375, 3.0, 12.0]])  # half-way in gaps of 0.25, 2 and 8
    moved = []
    for aware in (False, True):
        made = Rounding(weight, plan, scales, scale_aware=aware)
        torch.testing.assert_close(made.soft(), weight)
        made.choice.data += 1e-3
        moved.append((made.soft() - weight)[0])
    torch.testing.assert_close(moved[0] / moved[0][0], torch.tensor([1.0, 8.0, 32.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(moved[1] / moved[1][0], torch.ones(3), rtol=0.05, atol=0)


@pytest.mark.parametrize("grid", ["int4/group:32", "fp4/group:32"])
def test_learned_rounding_beats_nearest_on_unseen_inputs(grid):
    plan, weight = plan_of(grid), weights()
    x, unseen = inputs(count=4000).split(2000)
    plain, scales = rounding.nearest(weight, plan)
    made = Rounding(weight, plan, scales)
    optimizer, steps = torch.optim.Adam([made.choice], lr=2e-2), 300
    for step in range(steps):
        loss = ((made.soft() - weight) @ x.t()).square().sum(0).mean() / 0.001
        if step > steps // 5:
            loss = loss + 0.01 * made.regulariser(20 - 18 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned, nearest = (((each - weight) @ unseen.t()).square().mean() for each in (made.hard(), plain))
    assert learned < 0.8 * nearest


def test_rows_that_gptq_would_make_worse_stay_at_nearest():
    plan, weight, gram = plan_of("int2/channel", 2000, 18), weights(2000, 18), moment(inputs(18))
    tight = [formats.Scales(plan.weight.spec.fit(weight, plan.weight.grain).scale * 0.5)]  # some weights are clipped
    met = rounding._factor(gram, 0.01, True)
    descended, loss = rounding._descend(weight, plan, tight, met)
    plain, _ = rounding.nearest(weight, plan, tight)
    exact, plain_loss = (rounding._quadratic(matrix - weight, gram) for matrix in (descended, plain))
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=1e-5)
    worse = exact > plain_loss * 1.001
    assert worse.any()
    assert torch.equal(rounding.gptq(weight, plan, gram, scales=tight)[0][worse], plain[worse])


def test_losses_of_wide_matrices_are_whole():
    matrix, x = weights(3, 1100), inputs(1100, 50)
    torch.testing.assert_close(rounding._quadratic(matrix, moment(x)), (matrix @ x.t()).square().mean(1))


def test_factor_in_double_precision_before_more_damping():
    gram = moment(inputs(count=20).double()).float()  # singular, and in fp32 not even positive
    _, added = rounding.cholesky(gram, 3e-7)
    torch.testing.assert_close(float(added[0]), 3e-7 * float(gram.diagonal().mean()))


@each_grid
def test_blocks_of_zeros_stay_zeros(grid):
    plan, weight = plan_of(grid), weights()
    weight[2], weight[3, :64] = 0, 0
    rounded, scales = rounding.gptq(weight, plan, moment(inputs()))
    assert rounded.isfinite().all()
    assert_on_grid(rounded, plan, scales)
    assert torch.equal(rounded[2], weight[2])
