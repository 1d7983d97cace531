"""How sure a figure is: 95 % intervals by the bootstrap, always the same for the same figures.

A mean over pictures: percentiles of the mean over resamples (scipy). A distance between sets of pictures: 1.96
standard deviations over resamples to both sides, because a resample repeats pictures and is therefore farther from
everything than the set it comes from. Resampled are prompts, each with the pictures of all seeds, since those resemble
each other.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000
AT_ONCE = 1_000_000  # numbers of one batch of resamples
SEED = 0


def of_mean(values: Sequence[float], groups: Sequence) -> tuple[float, float] | None:
    """Interval of a mean, None for fewer than two groups; groups: the prompt of each value."""
    places = _places(groups)
    if len(places) < 2:
        return None
    sums = np.array([sum(values[i] for i in rows) for rows in places])
    counts = np.array([len(rows) for rows in places])
    found = stats.bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(places)),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def of_distance(value: float, measure: Callable[[list[int]], float], draws: Iterator) -> tuple[float, float]:
    """Interval of `value`; measure: the distance of the pictures of these numbers; draws: from `resamples`."""
    found = [measure(rows) for rows in draws]
    reach = 1.96 * float(np.std(found, ddof=1))
    return value - reach, value + reach


def resamples(groups: Sequence, count: int) -> Iterator[list[int]]:
    """Numbers of the pictures of `count` resamples of whole groups."""
    places, rng = _places(groups), np.random.default_rng(SEED)
    for _ in range(count):
        yield [i for place in rng.integers(len(places), size=len(places)) for i in places[place]]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _places(groups: Sequence) -> list[list[int]]:
    """Numbers of the members of each group, in order of appearance."""
    found: dict = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return list(found.values())
