"""What a report says, before it has a look: every figure of a run as plain JSON, and the cells of its tables.

A recipe with an emulated kernel gets no milliseconds: its arithmetic is not the one that would be shipped. The worst
prompts of a recipe are ranked by the first metric of RANKED that has a value for each picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.runs import Run
from eval.suite import FULL

# how far a picture is from full precision, as eyes see it first
RANKED = ("lpips", "feature_distance", "psnr", "ssim")
FIRST = (*RANKED, "caption_accuracy", "clip", "fid", "kid")  # the columns that come first
WORST = 10  # prompts per recipe
SPREADS = (
    "With a score comes its 95 % bootstrap interval, with milliseconds their quartiles. "
    "A score is bold where it is the best and no other recipe's interval reaches it."
)
ACRONYMS = ("psnr", "ssim", "lpips", "fid", "kid", "clip", "sqnr")


def summary(run: Run) -> dict[str, Any]:
    """All that the report says, as plain JSON: manifest, and by pipeline its metrics, entries and what is missing."""
    pipelines = {}
    for name in run.pipelines:
        entries = {entry: _entry(run, name, entry) for entry in run.entries(name)}
        pipelines[name] = {
            "metrics": metrics_of(entries),
            "entries": entries,
            "missing": said_of(entries, "missing"),
            "notes": said_of(entries, "note"),
        }
    manifest = run.manifest | {"suite": run.suite.to_dict()}  # with every default, whatever the file left out
    return {"suite": run.suite.name, "items": len(run.items), "manifest": manifest, "pipelines": pipelines}


def _entry(run: Run, pipeline: str, entry: str) -> dict[str, Any]:
    given, scores = run.figures(pipeline, entry), run.scores(pipeline, entry)
    drawn = sum(run.has(pipeline, entry, item.index) for item in run.items)
    keep = ("value", "low", "high", "unit", "better", "count", "note", "missing", "instead")
    waits = not given.get("missing") and (drawn < len(run.items) or not scores)
    return {
        "missing": given.get("missing"),
        "unfinished": f"{drawn} of {len(run.items)} pictures drawn; run the suite again" if waits else None,
        "drawn": drawn,
        "figures": {key: _finite(value) for key, value in given.items() if key != "missing"},
        "emulated": bool(given.get("emulated")),
        "scores": {name: {key: _finite(score[key]) for key in keep if key in score} for name, score in scores.items()},
        "worst": None if entry == FULL else _worst(run, scores),
    }


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _worst(run: Run, scores: Mapping[str, dict]) -> dict[str, Any] | None:
    """The items a recipe does worst, worst first; None without values for each picture."""
    for name in RANKED:
        values = np.array(scores.get(name, {}).get("per_item") or [], np.float64)
        if len(values) == len(run.items) and np.isfinite(values).any():
            sign = 1 if scores[name]["better"] == "higher" else -1
            order = [index for index in np.argsort(sign * values, kind="stable") if np.isfinite(values[index])]
            items = [run.items[index] for index in order[:WORST]]
            listed = [vars(item) | {"value": float(values[item.index])} for item in items]
            return {"metric": name, "median": float(np.nanmedian(values)), "items": listed}
    return None


def metrics_of(entries: Mapping[str, dict]) -> dict[str, dict[str, str]]:
    """Unit and direction of every metric that some entry has a value for, in the order of columns."""
    found = {}
    for entry in entries.values():
        for name, score in entry["scores"].items():
            if score.get("value") is not None:
                found.setdefault(name, {"unit": score["unit"], "better": score["better"]})
    place = {name: next((i for i, head in enumerate(FIRST) if name.startswith(head)), len(FIRST)) for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: place[name])}


def said_of(entries: Mapping[str, dict], key: str) -> list[dict[str, Any]]:
    """Texts that scores have under `key`, each once: the metrics and entries it is said of, [] for all entries."""
    found: dict[tuple, list[str]] = {}
    for name, entry in entries.items():
        for metric, score in entry["scores"].items():
            if score.get(key):
                found.setdefault((metric, score[key], score.get("instead")), []).append(name)
    rows: dict[tuple, dict] = {}
    for (metric, text, instead), names in found.items():
        every = names == [name for name, entry in entries.items() if metric in entry["scores"]]
        of = [] if every else names
        row = rows.setdefault((text, *of), {"metrics": [], "text": text, "instead": [], "entries": of})
        row["metrics"].append(metric)
        row["instead"] += [instead] if instead else []
    return list(rows.values())


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a figure, its interval or share, and whether it is the best of its column."""

    text: str
    detail: str = ""
    best: bool = False

    def __str__(self) -> str:
        shown = f"**{self.text}**" if self.best else self.text
        return f"{shown} ({self.detail})" if self.detail else shown


def columns(metrics: Mapping[str, dict], entries: Mapping[str, dict]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Heads, and the cells of every entry that could be made: size, time, memory, then every metric."""
    heads = ["size", "ms per step", "peak GiB", *(head(name, metric) for name, metric in metrics.items())]
    able = {name: entry for name, entry in entries.items() if not entry["missing"]}
    best = {name: _best(name, metric, able) for name, metric in metrics.items()}
    return heads, {
        name: [*costs(entry), *(_score(entry["scores"].get(metric, {}), best[metric] == name) for metric in metrics)]
        for name, entry in able.items()
    }


def head(name: str, metric: Mapping[str, str]) -> str:
    """`psnr` -> `PSNR, dB ↑`: the arrow points to where better is."""
    unit = short(metric["unit"])
    return f"{spoken(name)}{unit and ', '}{unit} {'↑' if metric['better'] == 'higher' else '↓'}"


def short(unit: str) -> str:
    """A unit as it is shown: `dB`, but neither 1 nor words, which the metric's file has."""
    return unit if unit != "1" and len(unit) <= 3 else ""


def spoken(name: str) -> str:
    """`clip_score` -> `CLIP score`."""
    return " ".join(word.upper() if word in ACRONYMS else word for word in name.replace("_", " ").split())


def costs(entry: Mapping[str, Any]) -> list[Cell]:
    """Size, milliseconds and memory of an entry of the report."""
    given = entry["figures"]
    size, full = given.get("bytes"), given.get("full_bytes")
    low, high = given.get("ms_spread") or (None, None)
    share = f"{size / full:.2f}x" if size and full and size != full else ""
    ms = _score({"value": given.get("ms_per_step"), "low": low, "high": high})
    return [
        Cell("–") if size is None else Cell(f"{size / 2**20:.1f} MiB", share),
        Cell("emulated") if entry["emulated"] else ms,
        _score({"value": given.get("peak_gib")}),
    ]


def _score(score: Mapping[str, Any], best: bool = False) -> Cell:
    value, low, high = (score.get(key) for key in ("value", "low", "high"))
    if value is None:
        return Cell("–")
    places = decimals(value, score.get("unit", ""))
    detail = "" if low is None or high is None else f"{low:.{places}f} to {high:.{places}f}"
    return Cell(f"{value:.{places}f}", detail, best)


def decimals(value: float, unit: str) -> int:
    """Digits after the point that a figure is shown with: three that count, of decibels one."""
    if unit == "dB" or value == 0 or not math.isfinite(value):
        return 1
    return min(max(2 - math.floor(math.log10(abs(value))), 0), 5)


def _best(name: str, metric: Mapping[str, str], entries: Mapping[str, dict]) -> str | None:
    """The recipe that is best by a metric; None where the interval of another one reaches its score."""
    scores = {entry: found["scores"].get(name, {}) for entry, found in entries.items() if entry != FULL}
    scores = {entry: score for entry, score in scores.items() if score.get("value") is not None}
    if len(scores) < 2:
        return None
    best = (max if metric["better"] == "higher" else min)(scores, key=lambda entry: scores[entry]["value"])
    value = scores.pop(best)["value"]
    ends = [[end for end in (s.get("low"), s["value"], s.get("high")) if end is not None] for s in scores.values()]
    return None if any(min(reach) <= value <= max(reach) for reach in ends) else best


def said(found: Mapping[str, Any]) -> str:
    """One line: how much was drawn, when, where and with what."""
    manifest = found["manifest"]
    suite, versions = manifest["suite"], ", ".join(f"{name} {text}" for name, text in manifest["versions"].items())
    drawn = f"{found['items']} pictures an entry, {suite['steps']} steps, seeds {', '.join(map(str, suite['seeds']))}"
    return f"{drawn}. Commit {manifest['commit']}, {manifest['machine']}, {versions}. {SPREADS}"


def remarks(pipeline: Mapping[str, Any]) -> list[str]:
    """Sentences below a table: entries and metrics that are missing, and what the metrics say of their figures."""
    lines = [
        f"`{name}` is {state}: {entry[state]}"
        for name, entry in pipeline["entries"].items()
        for state in ("missing", "unfinished")
        if entry[state]
    ]
    for row in pipeline["missing"]:
        instead = f"; in its place: {', '.join(map(spoken, row['instead']))}" if row["instead"] else ""
        lines.append(f"No {subject(row)}: {row['text']}{instead}")
    return lines + [f"{subject(row)}: {row['text']}" for row in pipeline["notes"]]


def subject(row: Mapping[str, Any]) -> str:
    """What a row of `said_of` is about: `FID, KID`, or `FID of int8` when it is not said of all entries."""
    of = f" of {', '.join(row['entries'])}" if row["entries"] else ""
    return f"{', '.join(map(spoken, row['metrics']))}{of}"
