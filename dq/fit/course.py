"""Where a tuning is in its course: which of its stages runs, and at which rate. Functions of the updates alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dq.fit.tune import Stage

REACH = 6.0  # sum of the rates of all updates: how far a parameter that is always pushed one way would go
MOST_RATE = 0.012  # of weights, in units of their step
TIMED = 4  # updates that are timed before it is decided how many there are


def place(stages: Sequence[Stage], update: int, total: int) -> tuple[int, int, int]:
    """(stage, updates done in it, of how many); 0 of how many while nobody knows how many updates come."""
    first, share = 0, 0.0
    for index, stage in enumerate(stages):
        share += stage.share
        last = total if index == len(stages) - 1 else round(share * total)
        if update < last or index == len(stages) - 1 or not total:
            return index, update - first, last - first if total else 0
        first = last
    raise AssertionError("the last stage has what is left")


def rate(done: int, of: int, times: float) -> float:
    """Cosine decay from what lets a parameter reach REACH; constant while nobody knows how many updates come."""
    of = of or 4 * TIMED * 100
    warm = min(1.0, (done + 1) / max(1.0, 0.02 * of))
    return min(MOST_RATE, 2 * REACH / of) * times * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done / of)))
