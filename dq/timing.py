"""Milliseconds of callables side by side: in turn, in one process, so that a machine that slows down slows all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def in_turn(
    runs: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 5, most: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of every call, by name: callables run alternately, once unmeasured, then for so many seconds.

    least, most  rounds, however long they take
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    while (done := len(next(iter(times.values())))) < least or (time.perf_counter() < until and done < most):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
