"""The report of a run: one HTML page that needs nothing else, the same as markdown, and its figures as report.json.

write(run)            DIR/report.html, DIR/report.md, DIR/report.json
commit(run)           eval/results/eval.json, from which `eval.experiments.tables` makes a results page
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dq.disk import write_json
from dq.errors import DQError
from eval import page
from eval.experiments import rows
from eval.markdown import line
from eval.runs import Run
from eval.runs import write as write_file
from eval.summary import Cell, columns, decimals, metrics_of, remarks, said, said_of, spoken, summary

FILE = rows.FOLDER / "eval.json"
IN_TABLE = ("psnr", "lpips", "feature_distance", "fid", "clip", "caption_accuracy")  # all others are in the file


def write(run: Run) -> Path:
    """Write the three files; the page's path."""
    found = summary(run)
    write_json(run.folder / "report.json", found)
    write_file(run.folder / "report.md", lambda fresh: fresh.write_text(markdown(found), "utf-8"))
    place, text = run.folder / "report.html", page.render(run, found)  # before: what it reads may be damaged
    write_file(place, lambda fresh: fresh.write_text(text, "utf-8"))
    return place


def markdown(found: Mapping[str, Any]) -> str:
    """The report without pictures: a table per pipeline, what is missing and why, and where it was measured."""
    lines = [f"# Evaluation: {found['suite']}", "", said(found), ""]
    for name, pipeline in found["pipelines"].items():
        heads, cells = columns(pipeline["metrics"], pipeline["entries"])
        lines += [f"## {name}", "", line(["recipe", *heads, "kernels (layers)"]), "|---" * (len(heads) + 2) + "|"]
        for entry, row in cells.items():
            kernels = pipeline["entries"][entry]["figures"].get("kernels") or {}
            lines.append(line([entry, *map(str, row), _kernels(kernels)]))
        lines += ["", *(f"- {text}" for text in remarks(pipeline)), ""]
        lines += [f"- worst for {entry}: {text}" for entry, text in _worst_lines(pipeline)] + [""]
    return "\n".join(lines)


def _kernels(kernels: Mapping[str, int]) -> str:
    most = sorted(kernels.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{kernel} ({count})" for kernel, count in most)


def _worst_lines(pipeline: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, entry in pipeline["entries"].items():
        if entry["worst"]:
            first, worst = entry["worst"]["items"][0], entry["worst"]
            unit = pipeline["metrics"][worst["metric"]]["unit"]
            shown = " and ".join(f"{v:.{decimals(v, unit)}f}" for v in (first["value"], worst["median"]))
            yield name, f"“{first['prompt']}”, seed {first['seed']} ({spoken(worst['metric'])}, median: {shown})"


def commit(run: Run, file: Path = FILE) -> None:
    """Put the figures of a run in place of those of the same suite in a result file; DQError for half a run."""
    for name, pipeline in summary(run)["pipelines"].items():
        for entry, given in pipeline["entries"].items():
            if given["unfinished"]:
                raise DQError(f"run {str(run.folder)!r}: {name} {entry}: {given['unfinished']}")
    kept = [row for row in rows.read(file) if row["suite"] != run.suite.name]
    write_json(file, {"rows": [*kept, *results(run)]})


def results(run: Run) -> list[dict[str, Any]]:
    """A row an entry: what was run, its costs and scores, what is missing, commit, versions, machine."""
    # imported here: only rows to commit need torch and the embedded models
    from eval.experiments.quality import fingerprint
    from pipelines import tiny

    found, suite, known = summary(run), run.suite, (*tiny.NAMES, *tiny.STUDENTS)
    made = {key: run.manifest[key] for key in ("commit", "versions", "machine")}
    asked = {"suite": suite.name, "items": found["items"], "seeds": list(suite.seeds), "steps": suite.steps}
    listed = []
    for name, pipeline in found["pipelines"].items():
        path = suite.pipeline(name).path
        model = {"pipeline": name, "path": path, "weights": fingerprint(path) if path in known else None}
        for entry, given in pipeline["entries"].items():
            kept = {key: given[key] for key in ("missing", "emulated", "figures", "scores")}
            listed.append(asked | model | {"entry": entry} | _rounded(kept) | made)
    return listed


def _rounded(value):
    """Floats of nested dicts and lists to six digits that count."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(found: list[dict]) -> list[str]:
    """Markdown lines of the results page's table of a suite, from committed rows: IN_TABLE; below what is missing."""
    entries = {f"{row['pipeline']} {row['entry']}": row for row in found}
    metrics = {name: metric for name, metric in metrics_of(entries).items() if name.startswith(IN_TABLE)}
    heads, lines = columns(metrics, {})[0], []
    for pipeline in dict.fromkeys(row["pipeline"] for row in found):
        mine = {row["entry"]: row for row in found if row["pipeline"] == pipeline}
        _, cells = columns(metrics, mine)
        lines += [_table_line(row, cells.get(entry), len(heads)) for entry, row in mine.items()]
    below = {"entries": {}, "missing": said_of(entries, "missing"), "notes": said_of(entries, "note")}
    head = [line(["model", "entry", *heads, "kernel"]), "|---" * (len(heads) + 3) + "|"]
    return [*head, *lines, "", *(f"- {text}" for text in remarks(below))]


def _table_line(row: Mapping[str, Any], cells: list[Cell] | None, width: int) -> str:
    names = [row["pipeline"], f"`{row['entry']}`"]
    if cells is None:
        return line([*names, f"missing: {row['missing']}", *[""] * width])
    kernels = row["figures"]["kernels"]
    kernel = max(kernels, key=kernels.get)
    return line([*names, *map(str, cells), f"{kernel} ({kernels[kernel]} of {sum(kernels.values())})"])
