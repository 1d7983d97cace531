"""Q-Sched: factors of a scheduler's inputs that suit a quantized model. arXiv 2509.01624.

    step(c_eps[k] e, t_k, c_x[k] x),   c = argmax_c mean over prompts of score(run under c)

c_x and c_eps run straight from a value at the first step to one at the last: four numbers, as the paper's evaluation
takes. Deviations: the numbers are found one at a time with shrinking steps (the paper: a full grid of two); the score
is the calibration's, by default closeness to the full-precision run of the same noise; and what was found on half of
the prompts has to score better on the other half, else nothing is corrected.
"""

from __future__ import annotations

from collections.abc import Sequence

from dq.around import descent
from dq.around.runs import Search
from dq.surroundings import Correction

NEEDS_PAIRS = False
STEP, LEAST, MOST = 0.04, 0.0025, 100  # first and last step of the search, and how many times it may look
SPAN = 0.3  # factors stay within 1 +- this


def find(search: Search) -> tuple[Correction | None, list[str]]:
    """Factors that score better than none on the prompts that were held out, else None; and what to say of them."""
    stock = search.score([], held_out=True)

    def correction(four: Sequence[float]) -> Correction:
        first, last, *sampled = four
        output, sample = _line(first, last, search.distinct), _line(sampled[0], sampled[1], search.distinct)
        return search.correction("scale", {"output": output, "sample": sample})

    def score(four: Sequence[float]) -> float:
        if any(abs(value - 1) > SPAN for value in four):
            return -float("inf")
        return search.score([correction(four)])

    best, _, looked = descent.climb(score, [1.0] * 4, STEP, LEAST, MOST)
    found = correction(best)
    corrected = search.score([found], held_out=True)
    said = f"qsched: score on held-out prompts {stock:.5g} without, {corrected:.5g} with; looked {looked} times"
    if not corrected > stock:
        return None, [f"{said}: no correction"]
    return found, [said]


def _line(first: float, last: float, steps: int) -> tuple[float, ...]:
    """Numbers from `first` to `last` in equal strides, rounded to what is worth storing."""
    return tuple(round(first + (last - first) * index / max(steps - 1, 1), 6) for index in range(steps))
