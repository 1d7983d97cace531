"""Low-rank factors against the exact SVD, and their alternation with rounding."""

import pytest
import torch

from dq.fit import lowrank, rounding
from dq.plan import LayerPlan, TensorPlan


def case(rows, columns, seed=0):
    """A weight with a falling spectrum, and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    few = min(rows, columns) // 4
    weight += torch.randn(rows, few, generator=generator) @ torch.randn(few, columns, generator=generator) * 0.01
    x = torch.randn(2 * columns, columns // 3, generator=generator) @ torch.randn(
        columns // 3, columns, generator=generator
    )
    x = (x * 0.2 + torch.randn(2 * columns, columns, generator=generator)) * (
        0.1 + 3 * torch.rand(columns, generator=generator)
    )
    return weight, x.t() @ x / x.shape[0]


@pytest.mark.parametrize(("rows", "columns"), [(400, 300), (300, 400), (64, 300), (700, 90)])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("rank", [4, 16])
def test_factors_reach_the_exact_truncated_svd(rows, columns, weighted, rank):
    weight, gram = case(rows, columns)
    root = torch.linalg.cholesky(gram.double()) if weighted else torch.eye(columns, dtype=torch.float64)
    best = torch.linalg.svdvals(weight.double() @ root)[rank:].norm()
    state = torch.get_rng_state()
    down, up = lowrank.factors(weight, rank, gram if weighted else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    assert ((weight - up @ down).double() @ root).norm() <= 1.01 * best
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    again = lowrank.factors(weight, rank, gram if weighted else None)
    assert torch.equal(again[0], down)
    assert torch.equal(again[1], up)


def test_weighing_matters():
    weight, gram = case(400, 300)
    lost = []
    for moments in (gram, None):
        down, up = lowrank.factors(weight, 16, moments)
        lost.append(rounding.error(up @ down, weight, gram))
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize("rows", [40, 300])
def test_edges_of_rank_and_moments(rows):
    weight, gram = case(rows, 60)
    down, up = lowrank.factors(weight, 400, gram)
    assert (down.shape, up.shape) == ((400, 60), (rows, 400))
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-5)
    down, up = lowrank.factors(weight, 0, gram)
    assert (down.shape, up.shape) == ((0, 60), (rows, 0))
    thin = torch.randn(5, 60, generator=torch.Generator().manual_seed(2))
    down, up = lowrank.factors(weight, 8, thin.t() @ thin)  # five directions carry everything
    torch.testing.assert_close(thin @ (up @ down).t(), thin @ weight.t(), rtol=0, atol=1e-4)
    down, up = lowrank.factors(torch.zeros_like(weight), 8, gram)
    assert torch.equal(up @ down, torch.zeros_like(weight))


def test_refining_is_never_worse_than_one_shot():
    weight, gram = case(128, 96)
    plan = LayerPlan("linear", (128, 96), TensorPlan.parse("int3/group:32"))

    def round_(rest):
        return rounding.nearest(rest, plan)

    def error(rounded, branch):
        return rounding.error(rounded + branch, weight, gram)

    down, up = lowrank.factors(weight, 8, gram)
    once = error(round_(weight - up @ down)[0], up @ down)
    rounded, scales, down, up = lowrank.refine(weight, 8, round_, gram, error)
    assert torch.equal(rounding.on_grid(rounded, plan, scales), rounded)
    assert error(rounded, up @ down) < once
    losses = iter([1.0, 2.0, 0.5])  # a rise ends it, the first turn is kept
    first = lowrank.refine(weight, 8, round_, gram, lambda *parts: next(losses))
    assert torch.equal(first[0], round_(weight - torch.matmul(*lowrank.factors(weight, 8, gram)[::-1]))[0])
    assert next(losses) == 0.5
