"""Which choice each layer gets: a multiple-choice knapsack with one or more limits, as an integer program.

    minimise sum_i E[i, c_i]   subject to   sum_i cost_k[i, c_i] <= limit_k for every k,   one choice c_i an item

E is the harm a choice does, additive over layers (MixDQ, arXiv 2405.17873, section 3.3; scipy's HiGHS solves it within
a second for some hundred layers). Items are layers, or several that are tied to one choice. `greedy` is what ViDiT-Q
(arXiv 2406.02540) does, `fixed` and `drawn` are what mixed precision has to beat.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix, vstack

GAP = 1e-4  # relative distance from the best possible sum at which the solver stops
SECONDS = 60.0
FINE = 1e6  # the errors are scaled so that the sum is about this: HiGHS takes 1e-6 for nothing


@dataclass(frozen=True)
class Item:
    """One decision. errors: (choices,), additive harm. costs: (limits, choices)."""

    name: str
    errors: np.ndarray
    costs: np.ndarray

    def __post_init__(self):
        if self.costs.ndim != 2 or self.costs.shape[1] != len(self.errors):
            raise ValueError(f"item {self.name!r}: costs {self.costs.shape} for {len(self.errors)} choices")


class Infeasible(ValueError):
    """No plan stays under the limits. least: (limits,) the least each cost can be on its own."""

    def __init__(self, least: np.ndarray, alone: bool):
        super().__init__("no choice of formats stays under the limits")
        self.least, self.alone = least, alone


def solve(items: Sequence[Item], limits: Sequence[float]) -> list[int]:
    """The choice of every item, in order. Infeasible when nothing fits."""
    bounds = np.asarray(limits, np.float64)
    least = np.sum([item.costs.min(1) for item in items], axis=0)
    if (least > bounds).any():
        raise Infeasible(least, True)
    errors = np.concatenate([item.errors for item in items])
    rows = np.concatenate([item.costs for item in items], axis=1)
    scale = FINE / (_typical(items) or 1.0)
    one = block_diag([np.ones((1, len(item.errors))) for item in items], format="csr")
    matrix = vstack([one, csr_matrix(rows / bounds[:, None])], format="csr")
    low = np.concatenate([np.ones(len(items)), np.full(len(bounds), -np.inf)])
    high = np.concatenate([np.ones(len(items)), np.ones(len(bounds))])
    with _quiet():
        found = milp(
            errors * scale,
            constraints=LinearConstraint(matrix, low, high),  # pyright: ignore[reportArgumentType]
            integrality=np.ones(len(errors)),
            bounds=Bounds(0, 1),
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
    if found.x is None:
        raise Infeasible(least, False)
    return _topped_up(items, _read(items, found.x), bounds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what HiGHS prints past all its options; what other threads print meanwhile comes afterwards."""
    with _printing, contextlib.ExitStack() as stack:
        try:
            sys.stdout.flush()
            kept = stack.enter_context(tempfile.TemporaryFile())
            before = os.dup(1)
        except (OSError, AttributeError, ValueError):  # there is no such output
            yield
            return
        try:
            os.dup2(kept.fileno(), 1)
            yield
        finally:
            with contextlib.suppress(OSError, AttributeError):  # C buffers what it prints into a file
                ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
            os.dup2(before, 1)
            os.close(before)
            kept.seek(0)
            for line in kept:
                if not line.startswith(b"Highs"):
                    os.write(1, line)


_printing = threading.Lock()


def _typical(items: Sequence[Item]) -> float:
    """A sum of errors as large as those of the plans in question: every item at its median choice."""
    return float(sum(np.median(item.errors) for item in items))


def _read(items: Sequence[Item], x: np.ndarray) -> list[int]:
    edges = np.cumsum([0, *(len(item.errors) for item in items)])
    return [int(np.argmax(x[a:b])) for a, b in pairwise(edges)]


def _topped_up(items: Sequence[Item], chosen: list[int], limits: np.ndarray) -> list[int]:
    """What the solver's tolerance left over: any better choice that still fits, the most helpful first."""
    total = cost(items, chosen)
    while True:
        better = []
        for index, item in enumerate(items):
            after = total[:, None] - item.costs[:, [chosen[index]]] + item.costs
            gain = np.where((after <= limits[:, None]).all(0), item.errors[chosen[index]] - item.errors, 0)
            better.append((float(gain.max()), index, int(gain.argmax())))
        gain, index, choice = max(better)
        if gain <= 0:
            return chosen
        total = total - items[index].costs[:, chosen[index]] + items[index].costs[:, choice]
        chosen[index] = choice


def cost(items: Sequence[Item], chosen: Sequence[int]) -> np.ndarray:
    """(limits,) what a plan costs."""
    return np.sum([item.costs[:, choice] for item, choice in zip(items, chosen, strict=True)], axis=0)


def error(items: Sequence[Item], chosen: Sequence[int]) -> float:
    """The predicted harm of a plan."""
    return float(sum(item.errors[choice] for item, choice in zip(items, chosen, strict=True)))


def greedy(items: Sequence[Item], limits: Sequence[float]) -> list[int]:
    """Every item at its cheapest; then the most harmed one to its least harmful choice, as long as that fits."""
    bounds, chosen = np.asarray(limits, np.float64), [int(item.costs[0].argmin()) for item in items]
    total = cost(items, chosen)
    if (total > bounds).any():
        raise Infeasible(total, True)
    for index in sorted(range(len(items)), key=lambda i: -items[i].errors[chosen[i]]):
        item = items[index]
        for choice in np.argsort(item.errors):
            after = total - item.costs[:, chosen[index]] + item.costs[:, choice]
            if (after <= bounds).all():
                chosen[index], total = int(choice), after
                break
    return chosen


def drawn(items: Sequence[Item], limits: Sequence[float], seed: int) -> list[int]:
    """A random plan that fills the first limit: random choices, then random changes while they lead towards it."""
    dice, bounds = np.random.default_rng(seed), np.asarray(limits, np.float64)
    chosen = [int(dice.integers(len(item.errors))) for item in items]
    total = cost(items, chosen)
    for index in dice.permutation(np.repeat(np.arange(len(items)), 8)):
        item = items[index]
        over = (total > bounds).any()
        after = total[:, None] - item.costs[:, [chosen[index]]] + item.costs
        fits = after[0] < total[0] if over else (after <= bounds[:, None]).all(0) & (after[0] > total[0])
        if fits.any():
            chosen[index] = int(dice.choice(np.flatnonzero(fits)))
            total = cost(items, chosen)  # anew: where a forbidden choice was left, differences of its cost are rough
    if (total > bounds).any():
        raise Infeasible(np.sum([item.costs.min(1) for item in items], axis=0), False)
    return chosen


def curve(items: Sequence[Item], limits: Sequence[float], along: int, points: int = 24) -> list[list[int]]:
    """Plans from the least to the most that limit number `along` can be, the other limits as they are."""
    low = sum(item.costs[along].min() for item in items)
    high = sum(item.costs[along][item.errors.argmin()] for item in items)
    plans = []
    for value in np.linspace(low, max(high, low), points):
        bounds = np.array(limits, np.float64)
        bounds[along] = value * (1 + 1e-9)
        try:
            plans.append(solve(items, bounds))
        except Infeasible:
            continue
    return plans
