"""What a backend must prove before it serves, and that every backend here does, in every format that it accepts."""

from __future__ import annotations

import pytest
import torch

from dq import kernels
from dq.kernels import Conv, proof
from tests.kernels.injected import backend
from tests.kernels.test_kernels import ACTS, WEIGHTS, plan

BACKENDS = [name for name in kernels.backends() if name not in ("triton", "reference")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONVS = {
    "3x3": ((48, 24, 3, 3), Conv((1, 1), (1, 1), (1, 1), 1)),
    "strided": ((20, 7, 3, 3), Conv((2, 2), (0, 0), (1, 1), 1)),
    "dilated": ((17, 8, 3, 3), Conv((1, 1), (2, 2), (2, 2), 1)),
    "depthwise": ((32, 1, 3, 3), Conv((1, 1), (1, 1), (1, 1), 32)),
    "one dimension": ((16, 8, 5), Conv((1,), (2,), (1,), 1)),
}


def verdict(name, op, p, conv=None, dtype=torch.float32):
    return proof.why_wrong(name, op, p, conv, torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_proves_right_for_linears(name, act, dtype):
    for weight in (*WEIGHTS, "int3/group:32", "int5/channel", "int4a/group:64"):
        for more in ({}, {"rank": 5}, {"rank": 6, "smooth": True, "rotate": 8}, {"splits": (16,)}):
            p = plan("linear", (72, 96), weight, act, **more)
            if kernels.backends()[name].why_not("linear", p, "cpu") is None:
                assert verdict(name, "linear", p, None, dtype) is None, (weight, more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_proves_right_for_convolutions(name, case, dtype):
    shape, conv = CONVS[case]
    kind = f"conv{len(shape) - 2}d"
    for weight in ("int8/channel", "int4/group:16", "int4/channel"):
        for act in (None, "int8/tensor", "int8a/tensor", "int8/tensor/static"):
            p = plan(kind, shape, weight, act)
            if kernels.backends()[name].why_not("conv", p, "cpu", conv) is None:
                assert verdict(name, "conv", p, conv, dtype) is None, (weight, act)


SPOILED = {
    "scales 2 % off": lambda y: y * 1.02,
    "a column of another": lambda y: torch.cat([y[..., 1:], y[..., :1]], -1),
    "the last column": lambda y: torch.cat([y[..., :-1], torch.zeros_like(y[..., :1])], -1),
    "one row": lambda y: torch.cat([y[:-1], y[:-1][-1:]]),
    "NaN": lambda y: torch.where(torch.arange(y.shape[-1]) == 3, torch.nan, y),
    "a shape": lambda y: y[..., :-1],
    "a dtype": lambda y: y.double(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", SPOILED)
def test_small_errors_are_found_in_every_dtype(monkeypatch, what, dtype):
    monkeypatch.setattr(kernels, "backends", lambda: {"spoiled": backend(1, SPOILED[what])})
    reason = verdict("spoiled", "linear", plan("linear", (40, 64)), None, dtype)
    assert reason is not None and reason.startswith("wrong on a small problem: ")


@pytest.mark.parametrize("left_out", ["bias", "down"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_or_a_branch_left_out_is_found(monkeypatch, left_out, dtype):
    found = backend(1)
    build = found.build
    found.build = lambda op, p, conv: lambda x, t: build(op, p, conv)(x, t._replace(**{left_out: None}))
    monkeypatch.setattr(kernels, "backends", lambda: {"spoiled": found})
    assert "off by" in verdict("spoiled", "linear", plan("linear", (40, 64), rank=4), None, dtype)


def test_the_small_problem_has_the_remainders_and_parts_of_the_layer():
    p = plan("linear", (1152, 4608 + 8), "int4/group:64", "int8/token", rank=64, splits=(2304,), smooth=True, rotate=8)
    small, _ = proof.miniature(p, None)
    assert small.shape == (80, 128 + 128 + 8) and small.splits == (128,) and small.rank == 32
    assert not small.smooth and not small.rotate
    small, conv = proof.miniature(plan("conv2d", (320, 1, 3, 3)), Conv((1, 1), (1, 1), (1, 1), 320))
    assert small.shape[1:] == (1, 3, 3) and small.shape[0] % conv.groups == 0 and conv.groups == 4


def test_a_backend_that_refuses_the_small_problem_proves_itself_on_the_layers_sizes(monkeypatch):
    sizes = []
    found = backend(1, lambda y: sizes.append(y.shape[-1]) or y)
    found.why_not = lambda op, p, device, conv=None: None if p.shape[0] == 512 else "too small"
    monkeypatch.setattr(kernels, "backends", lambda: {"choosy": found})
    assert verdict("choosy", "linear", plan("linear", (512, 64))) is None and set(sizes) == {512}
