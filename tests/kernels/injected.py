"""Backends and times that tests of the choice put in place of real ones."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch

from dq import kernels, layers
from dq.kernels import choice, dense
from dq.plan import LayerPlan, TensorPlan


def backend(rank: int, spoiled: Callable = lambda y: y, refused: str | None = None) -> types.SimpleNamespace:
    """A backend that answers as `dense` does, spoiled."""

    def build(op, plan, conv):
        run = dense.build(op, plan, conv)
        return lambda x, t: spoiled(run(x, t))

    return types.SimpleNamespace(
        RANK=rank, STATUS="stable", why_not=lambda *_: refused, label=lambda *_: "injected", build=build
    )


class Times:
    """In place of `choice.clocked`: milliseconds by backend, 1 for others; asked says what was timed, call by call."""

    def __init__(self, **ms: float):
        self.ms, self.asked = ms, []

    def __call__(self, runs):
        self.asked.append(list(runs))
        return {name: self.ms.get(name, 1.0) for name in runs}


def inject(monkeypatch, tmp_path, ms: dict[str, float], **backends) -> Times:
    """Choose by measurement among `dense`, `reference` and these backends, in a cache of its own, with given times."""
    monkeypatch.setattr(kernels.backends()["dense"], "emulated", lambda op, plan: False)  # a contender like others
    monkeypatch.setenv("DQ_CHOICE", "measured")
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    found = backends | {name: kernels.backends()[name] for name in ("dense", "reference")}
    found = dict(sorted(found.items(), key=lambda item: item[1].RANK))
    monkeypatch.setattr(kernels, "backends", lambda: found)
    times = Times(**ms)
    monkeypatch.setattr(choice, "clocked", times)
    return times


def linear(shape=(24, 40), dtype=torch.float32, act="int8/token", seed=0, **more):
    """A packed linear of random weights."""
    torch.manual_seed(seed)
    plan = LayerPlan("linear", shape, TensorPlan.parse("int8/channel"), TensorPlan.parse(act) if act else None, **more)
    return layers.pack("layer", torch.nn.Linear(shape[1], shape[0]).to(dtype).requires_grad_(False), plan, dtype)
