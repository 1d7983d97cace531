"""The Results tab: evaluation runs in a browser, table, plots and worst prompts; nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from demo.sessions import told
from dq.errors import DQError, nearest
from eval import figures, page, report, summary
from eval.runs import MANIFEST, Run
from eval.suite import FULL

DEPTH, WORST_SIDE = 3, 256
NO_RUN = "make one with `make eval`"


class Runs:
    """The run folders at most DEPTH below the given ones, by name; nothing else can be named."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = [Path(root).resolve() for root in roots]

    def names(self) -> list[str]:
        """Newest first."""
        found = dict(self._found())
        return sorted(found, key=lambda name: -(found[name] / MANIFEST).stat().st_mtime)

    def open(self, name: str) -> Run:
        """The run of that name; DQError when there is none."""
        found = dict(self._found())
        if not isinstance(name, str) or name not in found:
            raise DQError(f"run {str(name)[:80]!r} is not here, {nearest(str(name)[:80], found) if found else NO_RUN}")
        return Run(found[name])

    def _found(self) -> Iterator[tuple[str, Path]]:
        for root in self.roots:
            for depth in range(DEPTH + 1):
                for path in root.glob("/".join(["*"] * depth + [MANIFEST])):
                    if path.parent.resolve().is_relative_to(root):
                        yield str(path.parent.relative_to(root.parent)), path.parent


def table(found: Mapping[str, Any], pipeline: str) -> pd.DataFrame:
    """A row per entry of a pipeline: size, time, memory and every metric with its interval."""
    part = found["pipelines"][pipeline]
    heads, rows = summary.columns(part["metrics"], part["entries"])
    listed = [[entry, *(str(cell).replace("**", "") for cell in cells)] for entry, cells in rows.items()]
    gone = [[entry, "missing", *[""] * (len(heads) - 1)] for entry, row in part["entries"].items() if row["missing"]]
    return pd.DataFrame(listed + gone, columns=["recipe", *heads])


def plots(found: Mapping[str, Any], pipeline: str, metric: str) -> str:
    """A metric over bytes and over time, as SVG; words where fewer than two entries have both."""
    part = found["pipelines"][pipeline]
    drawn = [f"<figure>{plot}</figure>" for plot in page.plots(metric, part["metrics"][metric], part["entries"])]
    drawn = drawn or ["<p>fewer than two entries have figures, so there is no plot</p>"]
    return f'<div class="plots">{"".join(drawn)}</div>'


def remarks(found: Mapping[str, Any], pipeline: str) -> str:
    """Markdown: where it was measured, what is missing and why."""
    lines = [f"- {text}" for text in summary.remarks(found["pipelines"][pipeline])]
    return "\n".join([summary.said(found), "", *lines])


def worst(run: Run, found: Mapping[str, Any], pipeline: str, entry: str) -> list[tuple[Image.Image, str]]:
    """The pictures an entry does worst: original, quantized and difference in one, with prompt and figure."""
    listed = found["pipelines"][pipeline]["entries"].get(entry, {}).get("worst")
    shown = []
    for item in (listed or {"items": []})["items"]:
        index = item["index"]
        if all(run.has(pipeline, name, index) for name in (FULL, entry)):
            before, after = (run.frames(pipeline, name, index) for name in (FULL, entry))
            caption = (
                f"{item['prompt']} (seed {item['seed']}, {listed['metric'].replace('_', ' ')} {item['value']:.4g})"
            )
            gap = [figures.difference(after, before)] if figures.alike(after, before) else []
            shown.append((_beside([before, after, *gap]), caption))
    return shown


def _beside(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Strips side by side, small pictures enlarged by whole numbers."""
    strips = [figures.strip(frames, WORST_SIDE) for frames in rows]
    width, height = strips[0].size
    times, gap = max(1, WORST_SIDE // max(width, height)), 6
    sheet = Image.new("RGB", (len(strips) * (times * width + gap) - gap, times * height), "white")
    for place, strip in enumerate(strips):
        large = strip.resize((times * width, times * height), Image.Resampling.NEAREST)
        sheet.paste(large, (place * (times * width + gap), 0))
    return sheet


def shown(runs: Runs, name: str | None, pipeline: str | None, metric: str | None, entry: str | None) -> list:
    """What the page shows of a run: its lists, table, plots, worst prompts and remarks; empty names mean the first."""
    if not name and not runs.names():
        return [gr.update()] * 7
    run = runs.open(name or runs.names()[0])
    found = summary.summary(run)
    pipeline = _one(pipeline, found["pipelines"])
    part = found["pipelines"][pipeline]
    able = [key for key, row in part["entries"].items() if key != FULL and not row["missing"]]
    metric, entry = _one(metric, part["metrics"]), _one(entry, able)
    return [
        gr.update(choices=list(found["pipelines"]), value=pipeline),
        gr.update(choices=list(part["metrics"]), value=metric),
        gr.update(choices=able, value=entry),
        table(found, pipeline),
        plots(found, pipeline, metric) if metric else "<p>No metric has been computed yet.</p>",
        worst(run, found, pipeline, entry),
        remarks(found, pipeline),
    ]


def tab(roots: Sequence[Path]) -> None:
    """Lay the tab out and connect it; endpoints `runs`, `results` and `report`."""
    runs = Runs(roots)
    chosen, outputs = _lists(runs.names()), _outputs()
    run = chosen[0]
    with gr.Row():
        make = gr.Button("Make the report", elem_id="report-go")
        download = gr.DownloadButton("Report (HTML)", elem_id="report")

    @told
    def show(run=None, pipeline=None, metric=None, entry=None):
        """Table, plots, worst prompts and remarks of a run; names that are empty or gone mean the first there is."""
        return shown(runs, run, pipeline, metric, entry)

    @told
    def written(run):
        """The report of a run as one HTML page."""
        return str(report.write(runs.open(run)))

    outputs = [*chosen[1:], *outputs]
    gr.on([item.input for item in chosen], show, chosen, outputs, api_name="results", show_progress_on=outputs[3])
    update = lambda: gr.update(choices=runs.names())  # noqa: E731
    run.focus(update, None, run, api_visibility="private", show_progress="hidden")
    gr.api(runs.names, api_name="runs")
    make.click(written, run, download, api_name="report")
    gr.on(None, show, chosen, outputs, api_visibility="private", show_progress="hidden")  # when the page opens


def _lists(names: list[str]) -> list[gr.Dropdown]:
    with gr.Row():
        first, info = (names[0] if names else None), (None if names else f"none yet: {NO_RUN}")
        run = gr.Dropdown(names, value=first, label="Run", info=info, scale=3, allow_custom_value=True, elem_id="run")
        labels = ("Pipeline", "Metric of the plots", "Worst prompts of")
        return [run, *(gr.Dropdown([], label=label, scale=2, allow_custom_value=True) for label in labels)]


def _outputs() -> list[gr.components.Component]:
    return [
        gr.Dataframe(label="Figures", interactive=False, elem_id="results"),
        gr.HTML(label="plots", elem_id="plots"),
        gr.Gallery(
            label="Worst prompts, worst first: original, quantized, difference",
            show_label=False,
            columns=2,
            height="auto",
            object_fit="contain",
            elem_id="worst",
            elem_classes="pixels",
            format="png",
        ),
        gr.Markdown(label="remarks", elem_id="said"),
    ]


def _one(wanted: str | None, known) -> str | None:
    """The wanted name, the first one for an empty or outdated choice, None when there is none to choose."""
    known = list(known)
    return wanted if wanted in known else known[0] if known else None
