"""Search without gradients for a few numbers: one coordinate at a time, steps that shrink.

Every number is moved up and down by the step in turn; what scores better is kept, and the next move of that number
goes the same way first. When no move helps, the step is halved. Deterministic; for scores that are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def climb(
    score: Callable[[Sequence[float]], float], start: Sequence[float], step: float, least: float, most: int
) -> tuple[list[float], float, int]:
    """-> (numbers, score, evaluations) of the best found from `start` with steps from `step` down to `least`.

    most  evaluations of the score that may be made
    """
    best, value, used = list(start), score(start), 1
    ways = [1.0] * len(best)
    while step >= least and used < most:
        moved = False
        for index in range(len(best)):
            for way in (ways[index], -ways[index]):
                if used >= most:
                    break
                trial = [*best[:index], best[index] + way * step, *best[index + 1 :]]
                found = score(trial)
                used += 1
                if found > value:
                    best, value, ways[index], moved = trial, found, way, True
                    break
        if not moved:
            step /= 2
    return best, value, used
