"""The HTML page of a report: no script and no address outside of it, for phones and desks, light and dark.

Pictures are small JPEGs inside the page, videos strips of frames that the style sheet plays: SIDES are tried until it
stays below PAGE_BYTES. Differences are taken from the pictures as they were drawn, before anything is made smaller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import figures, summary
from eval.runs import Run
from eval.suite import FULL

TEMPLATE = Path(__file__).with_name("report.html.j2")
SHOWN = 8  # prompts in the picture grid of a pipeline
PAGE_BYTES = 8 * 2**20
SIDES = (256, 160, 96, 64)  # most pixels of a picture's side
SMALL = 128  # pixels of a side up to which pictures are shown enlarged
STATES = ("missing", "unfinished")  # what an entry may be
COSTS = {"bytes": ("MiB of the denoiser", 2**20), "ms_per_step": ("ms per step", 1)}  # horizontal axes, and their unit


@dataclass(frozen=True)
class Shown:
    """A picture as an address; of a video a strip of so many frames."""

    address: str
    frames: int


@dataclass(frozen=True)
class Album:
    """Pictures of one pipeline of a run, None where nothing was drawn."""

    run: Run
    pipeline: str
    side: int

    def picture(self, entry: str, index: int) -> Shown | None:
        if not self.run.has(self.pipeline, entry, index):
            return None
        return self._shown(self.run.frames(self.pipeline, entry, index))

    def difference(self, entry: str, index: int) -> Shown | None:
        """Of an entry to full precision, which has none itself; None for other sizes."""
        if entry == FULL or not all(self.run.has(self.pipeline, name, index) for name in (entry, FULL)):
            return None
        pair = [self.run.frames(self.pipeline, name, index) for name in (entry, FULL)]
        return self._shown(figures.difference(*pair)) if figures.alike(*pair) else None

    def _shown(self, frames) -> Shown:
        kept = figures.chosen(frames)
        return Shown(figures.data_uri(figures.strip(kept, self.side)), len(kept))


def render(run: Run, found: Mapping[str, Any]) -> str:
    """The page of a run from its summary, as small as it has to be."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader, given = FileSystemLoader(TEMPLATE.parent), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **given)
    environment.filters |= {"spoken": summary.spoken, "subject": summary.subject}
    template = environment.get_template(TEMPLATE.name)
    known = {name: _figures(pipeline) for name, pipeline in found["pipelines"].items()}
    text = ""
    for side in SIDES:
        sections = [
            {"name": name} | known[name] | _pictures(pipeline, Album(run, name, side))
            for name, pipeline in found["pipelines"].items()
        ]
        text = template.render(
            title=found["suite"],
            said=summary.said(found),
            tiles=_tiles(found),
            sections=sections,
            manifest=json.dumps(found["manifest"], indent=1, ensure_ascii=False),
            gain=figures.GAIN,
            size=_size(run),
            plays=any(run.is_video(name, FULL, item.index) for name in run.pipelines for item in run.items),
        )
        if len(text.encode()) <= PAGE_BYTES:
            break
    return text


def _size(run: Run) -> str:
    """`small` for pictures that the page shows larger than they are, pixels kept sharp, else `large`."""
    drawn = ((name, item.index) for name in run.pipelines for item in run.items if run.has(name, FULL, item.index))
    name, index = next(drawn, (None, 0))
    if name is None:
        return "small"
    return "small" if max(run.picture(name, FULL, index).size) <= SMALL else "large"


def _tiles(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    suite = found["manifest"]["suite"]
    entries = [entry for pipeline in found["pipelines"].values() for entry in pipeline["entries"].values()]
    return [
        ("pipelines", len(found["pipelines"])),
        ("entries", len(entries)),
        ("pictures", sum(entry["drawn"] for entry in entries)),
        ("prompts", found["items"] // len(suite["seeds"])),
        ("seeds", len(suite["seeds"])),
        ("steps", suite["steps"]),
    ]


def _figures(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """Table, remarks, plots and kernels of a pipeline."""
    heads, cells = summary.columns(pipeline["metrics"], pipeline["entries"])
    entries = pipeline["entries"]
    kernels = {
        name: sorted(entries[name]["figures"].get("kernels", {}).items(), key=lambda pair: -pair[1]) for name in cells
    }
    drawn = [(name, plots(name, metric, entries)) for name, metric in pipeline["metrics"].items()]
    return {
        "heads": [re.sub(" ([↑↓])$", "\N{NO-BREAK SPACE}\\1", text) for text in heads],
        "rows": [(name, entries[name]["emulated"], row) for name, row in cells.items()],
        "unplotted": [name for name, entry in entries.items() if entry["emulated"]],
        "gone": [(name, state, e[state]) for name, e in entries.items() for state in STATES if e[state]],
        "missing": pipeline["missing"],
        "notes": pipeline["notes"],
        "kernels": kernels,
        "plots": [(name, shown) for name, shown in drawn if shown],
    }


def plots(name: str, metric: Mapping[str, str], entries: Mapping[str, dict]) -> list[str]:
    """A metric over each cost, where two entries or more have both."""
    drawn = []
    for cost, (label, unit) in COSTS.items():
        points = []
        for entry, found in entries.items():
            score, at = found["scores"].get(name, {}), found["figures"].get(cost)
            emulated = cost == "ms_per_step" and found["emulated"]
            if score.get("value") is not None and at is not None and not emulated:
                points.append(figures.Point(entry, at / unit, score["value"], score.get("low"), score.get("high")))
        if len(points) > 1:
            drawn.append(figures.pareto(points, label, summary.head(name, metric), metric["better"]))
    return drawn


def _pictures(pipeline: Mapping[str, Any], album: Album) -> dict[str, Any]:
    """The picture grid and the worst prompts of every recipe."""
    items, entries = album.run.items, pipeline["entries"]
    able = [name for name, entry in entries.items() if not entry["missing"]]
    ranked = next((entry["worst"]["metric"] for entry in entries.values() if entry["worst"]), None)
    values = {name: album.run.scores(album.pipeline, name).get(ranked, {}).get("per_item") for name in able}
    chosen = sorted({round(place) for place in np.linspace(0, len(items) - 1, min(SHOWN, len(items)))})
    grid = []
    for index in chosen:
        shown = {name: _figure(values[name][index], pipeline["metrics"][ranked]) for name in able if values[name]}
        drawn = [(name, album.picture(name, index), album.difference(name, index), shown.get(name)) for name in able]
        grid.append((items[index], drawn))
    worst = [_worst(pipeline["metrics"], name, entries[name]["worst"], album) for name in able]
    return {"grid": grid, "ranked": ranked, "worst": [found for found in worst if found]}


def _worst(metrics: Mapping[str, dict], entry: str, worst: Mapping[str, Any] | None, album: Album) -> dict | None:
    """The worst prompts of a recipe with their pictures."""
    if worst is None:
        return None
    metric = metrics[worst["metric"]]
    cards = [
        {
            "prompt": item["prompt"],
            "seed": item["seed"],
            "value": _figure(item["value"], metric),
            "original": album.picture(FULL, item["index"]),
            "drawn": album.picture(entry, item["index"]),
            "difference": album.difference(entry, item["index"]),
        }
        for item in worst["items"]
    ]
    median = _figure(worst["median"], metric)
    return {"entry": entry, "metric": summary.spoken(worst["metric"]), "median": median, "cards": cards}


def _figure(value: float, metric: Mapping[str, str]) -> str:
    return f"{value:.{summary.decimals(value, metric['unit'])}f} {summary.short(metric['unit'])}".strip()
