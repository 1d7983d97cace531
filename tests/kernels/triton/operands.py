"""Random operands for Triton kernels, and how near their results have to be."""

from __future__ import annotations

import torch

from dq.formats import get
from tests.kernels.test_kernels import generator

SMALL = {"BM": 32, "BN": 32, "BK": 64, "GROUP": 2, "warps": 4, "stages": 2}


def randn(*shape, seed=0, dtype=torch.float32, spread=1.0):
    return (torch.randn(*shape, generator=generator(seed)) * spread).to(dtype)


def positive(*shape, seed=0):
    """In 0.5 .. 1.5."""
    return torch.rand(*shape, generator=generator(seed)) + 0.5


def codes(rows, k, seed=0, low=-127, high=127):
    return torch.randint(low, high + 1, (rows, k), generator=generator(seed)).to(torch.int8)


def exact(q, w):
    """Integer sums; those of the tests fit in fp32."""
    return (q.double() @ w.double().t()).float()


def near(found, truth):
    """int8 codes within one of those of the truth, and equal in all but a few places; scales to fp32 accuracy."""
    expected = get("int8").encode(truth, "token")
    off = (found.q[:, : truth.shape[1]].int() - expected.codes.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=0)
