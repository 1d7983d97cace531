"""What got better or worse between two runs, or between two entries: `python -m eval compare A B`.

A and B are folders of runs, or RUN/PIPELINE or RUN/PIPELINE/ENTRY below one. Both sides drew the same prompts from the
same seeds, so items are compared in pairs: with d_n = b_n - a_n, the mean of d with its 95 % bootstrap interval, and
the two-sided Wilcoxon signed-rank test of whether d leans to one side. What is tested are prompts, each with the mean
over its seeds, which resemble each other; prompts that are equal say nothing and are left out. Many figures are tested
at once, so p is corrected after Holm over all rows of one comparison:

    p_holm(k) = max_{j <= k} min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

Figures of a whole set (FID) have no items: their intervals are set side by side and nothing is tested. Bytes are
exact; milliseconds and memory are measured once and not tested either.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from dq.errors import DQError, nearest
from eval import intervals
from eval.markdown import line
from eval.runs import Run

Place = Run | str | Path
LEVEL = 0.05  # of the family of tests
COSTS = {"bytes": "", "ms_per_step": "ms", "peak_gib": "GiB"}  # figures of an entry that are not scores


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, and the pipeline and entry of it that are meant (None: all)."""

    run: Run
    pipeline: str | None = None
    entry: str | None = None


@dataclass(frozen=True)
class Row:
    """One figure on both sides. `change`: B - A, with its interval; `wins`, `losses`: prompts B does better, worse.

    verdict   better | worse | mixed (most prompts go one way, the mean the other) | same | no difference shown |
              too few differ (of the prompts, for so many tests) | not tested |
              intervals apart: better | intervals apart: worse | intervals overlap
    """

    pipeline: str
    entry: str
    metric: str
    unit: str
    a: float
    b: float
    change: float
    low: float | None = None
    high: float | None = None
    wins: int | None = None
    losses: int | None = None
    p: float | None = None
    p_holm: float | None = None
    verdict: str = "not tested"


def side(place: Place) -> Side:
    """A run, or RUN, RUN/PIPELINE or RUN/PIPELINE/ENTRY -> what it names; DQError for what is not there."""
    if isinstance(place, Run):
        return Side(place)
    path = Path(place)
    home = next((folder for folder in (path, *path.parents) if (folder / "manifest.json").is_file()), None)
    if home is None:
        raise DQError(f"{str(place)!r} is no evaluation run and lies in none; give the folder of `python -m eval run`")
    run, parts = Run(home), path.relative_to(home).parts
    if len(parts) > 2:
        raise DQError(f"got {str(place)!r}, expected RUN, RUN/PIPELINE or RUN/PIPELINE/ENTRY")
    for name, known in zip(parts, (lambda: run.pipelines, lambda: run.entries(parts[0])), strict=False):
        if name not in known():
            raise DQError(f"run {str(home)!r} has no {name!r}; {nearest(name, known())}")
    return Side(run, *parts)


def compare(a: Place, b: Place, metric: str | None = None) -> list[Row]:
    """Rows of every figure (or of `metric`) that both sides have, tested and corrected together.

    DQError when the sides have other items, nothing in common, or one is an entry and the other is not.
    """
    one, two = side(a), side(b)
    if (one.entry is None) != (two.entry is None):
        raise DQError("one side is an entry and the other is not; give two runs, two pipelines or two entries")
    _check_items(one.run, two.run)
    found = [row for pair in _pairs(one, two) for row in _rows(one.run, two.run, pair)]
    if not found:
        raise DQError("the two sides have no figure of an entry in common; name two entries by RUN/PIPELINE/ENTRY")
    known = {row.metric for row in found}
    if metric is not None and metric not in known:
        raise DQError(f"the two sides do not both have {metric!r}; {nearest(metric, known)}")
    return _corrected([row for row in found if metric in (None, row.metric)])


def _check_items(a: Run, b: Run) -> None:
    """Refuse runs whose items are not the same prompts and seeds in the same order."""
    mine, theirs = ([(item.prompt, item.seed) for item in run.items] for run in (a, b))
    what = "a test of pairs needs runs of the same prompts and seeds"
    if len(mine) != len(theirs):
        raise DQError(f"the runs have {len(mine)} and {len(theirs)} items; {what}")
    for index, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        if x != y:
            raise DQError(f"item {index} is {x[0]!r} (seed {x[1]}) in one run and {y[0]!r} (seed {y[1]}); {what}")


def _pairs(a: Side, b: Side) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """((pipeline, entry) of A, of B) that belong together: those of equal names, or the two that were named."""
    if a.entry is not None:
        return [((a.pipeline, a.entry), (b.pipeline, b.entry))]
    if a.pipeline is not None and b.pipeline is not None:
        names = [(a.pipeline, b.pipeline)]
    else:
        mine, theirs = ([one.pipeline] if one.pipeline else one.run.pipelines for one in (a, b))
        names = [(name, name) for name in mine if name in theirs]
    return [((x, entry), (y, entry)) for x, y in names for entry in a.run.entries(x) if entry in b.run.entries(y)]


def _rows(a: Run, b: Run, pair: tuple[tuple[str, str], tuple[str, str]]) -> list[Row]:
    mine, theirs = a.scores(*pair[0]), b.scores(*pair[1])
    names = ["" if x == y else f" → {y}" for x, y in zip(*pair, strict=True)]
    head = tuple(name + more for name, more in zip(pair[0], names, strict=True))
    rows = [
        _scored(head, name, mine[name], theirs[name], [item.prompt for item in a.items])
        for name in mine
        if None not in (mine[name].get("value"), theirs.get(name, {}).get("value"))
    ]
    costs = a.figures(*pair[0]), b.figures(*pair[1])
    emulated = any(cost.get("emulated") for cost in costs)
    for name, unit in COSTS.items():
        values = [cost.get(name) for cost in costs]
        if None not in values and not (emulated and name == "ms_per_step"):  # that time would not be of the format
            rows.append(Row(*head, name, unit, *values, values[1] - values[0], verdict=_cost_verdict(name, *values)))
    return rows


def _cost_verdict(name: str, a: float, b: float) -> str:
    if name != "bytes":
        return "not tested"
    return "same" if a == b else "better" if b < a else "worse"


def _scored(head: tuple[str, str], name: str, a: dict, b: dict, prompts: list[str]) -> Row:
    """One metric of a pair; its p is not yet corrected and its verdict only says which way it leans."""
    row = Row(*head, name, a["unit"], a["value"], b["value"], b["value"] - a["value"])
    sign = 1 if a["better"] == "higher" else -1
    if not a.get("per_item") or not b.get("per_item"):
        return replace(row, verdict=_apart(a, b, sign))
    if not len(a["per_item"]) == len(b["per_item"]) == len(prompts):
        counts = f"{len(a['per_item'])} and {len(b['per_item'])} values for {len(prompts)} items"
        raise DQError(f"{name} of {' '.join(head)} has {counts}; finish both runs, then compare")
    gaps = np.array(b["per_item"], np.float64) - np.array(a["per_item"], np.float64)
    both = np.flatnonzero(np.isfinite(gaps))  # an item that one side could not score has none
    if not len(both):
        return row
    kept, asked = gaps[both].tolist(), [prompts[index] for index in both]
    low, high = intervals.of_mean(kept, asked) or (None, None)
    grouped: dict[str, list[float]] = {}
    for prompt, gap in zip(asked, kept, strict=True):
        grouped.setdefault(prompt, []).append(gap)
    means = np.array([intervals.mean(group) for group in grouped.values()])
    wins, losses = int((sign * means > 0).sum()), int((sign * means < 0).sum())
    found = {"change": intervals.mean(kept), "low": low, "high": high, "wins": wins, "losses": losses}
    return replace(row, **found, p=_p(means), verdict=_leaning(sign * means))


def _apart(a: dict, b: dict, sign: int) -> str:
    ends = [score.get(end) for score in (a, b) for end in ("low", "high")]
    if None in ends:
        return "not tested"
    if ends[2] <= ends[1] and ends[0] <= ends[3]:
        return "intervals overlap"
    return f"intervals apart: {'better' if sign * (b['value'] - a['value']) > 0 else 'worse'}"


def _p(gaps: np.ndarray) -> float:
    """Two-sided Wilcoxon signed-rank p of gaps (N,); zeros are left out first, so that few changes are exact."""
    changed = gaps[gaps != 0]
    return float(stats.wilcoxon(changed).pvalue) if len(changed) else 1.0


def _leaning(gains: np.ndarray) -> str:
    """better, worse, mixed or same: what the row would say if its test were significant."""
    changed = gains[gains != 0]
    if not len(changed):
        return "same"
    ranks = float((np.sign(changed) * stats.rankdata(np.abs(changed))).sum())
    if ranks * changed.mean() <= 0:
        return "mixed"
    return "better" if ranks > 0 else "worse"


def _corrected(rows: list[Row]) -> list[Row]:
    """The rows with Holm's p in place, and verdicts only where it stays below LEVEL."""
    tested = sorted((index for index, row in enumerate(rows) if row.p is not None), key=lambda index: rows[index].p)
    done, highest = list(rows), 0.0
    for place, index in enumerate(tested):
        row = rows[index]
        highest = max(highest, min(1.0, (len(tested) - place) * row.p))
        verdict = row.verdict
        if verdict != "same" and highest >= LEVEL:
            least = 2.0 ** (1 - row.wins - row.losses)  # p when all that differ go one way
            verdict = "too few differ" if len(tested) * least >= LEVEL else "no difference shown"
        done[index] = replace(row, p_holm=highest, verdict=verdict)
    return done


def differences(a: Place, b: Place) -> list[str]:
    """Lines that say how the two runs were made differently: settings, commit, versions, machine."""
    runs = side(a).run, side(b).run
    shared = set.intersection(*({entry.name for entry in run.suite.entries} for run in runs))
    one, two = (_settings(run, shared) for run in runs)
    keys = [key for key in dict.fromkeys([*one, *two]) if one.get(key) != two.get(key)]
    return [f"{key}: {one.get(key, 'none')} in A, {two.get(key, 'none')} in B" for key in keys]


def _settings(run: Run, shared: set[str]) -> dict[str, object]:
    """What a run was made with; of recipes those that both runs have."""
    made = {key: run.manifest.get(key) for key in ("commit", "versions", "machine")}
    suite = {key: value for key, value in run.suite.to_dict().items() if key not in ("name", "recipes")}
    return _flat(suite | {"recipes": {e.name: asdict(e) for e in run.suite.entries if e.name in shared}} | made)


def _flat(value, name: str = "") -> dict[str, object]:
    """Nested dicts as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}".strip(".")).items()}


def text(rows: list[Row], notes: list[str]) -> str:
    """Rows as a markdown table, how they add up, and notes: what `differences` says."""
    head = ["pipeline", "entry", "metric", "A", "B", "B - A (95 %)", "better / worse prompts", "p (Holm)", "verdict"]
    lines = [line(head), "|---" * len(head) + "|", *(line(_cells(row)) for row in rows), ""]
    count = {word: sum(row.verdict.endswith(word) for row in rows) for word in ("better", "worse")}
    rest = len(rows) - sum(count.values())
    lines.append(
        f"B is better in {count['better']} and worse in {count['worse']} of {len(rows)} rows; "
        f"{rest} are equal, undecided or not tested."
    )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _cells(row: Row) -> list[str]:
    change = f"{row.change:+,}" if isinstance(row.change, int) else f"{row.change:+.4g}"
    if row.low is not None:
        change += f" ({row.low:+.3g} to {row.high:+.3g})"
    items = "" if row.wins is None else f"{row.wins} / {row.losses}"
    unit = "" if row.unit in ("", "1") else f", {row.unit}"
    values = [f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (row.a, row.b)]
    p = "" if row.p_holm is None else "< 1e-4" if row.p_holm < 1e-4 else f"{row.p_holm:.2g}"
    return [row.pipeline, row.entry, row.metric + unit, *values, change, items, p, row.verdict]
