"""The plots of README.md and docs/results/, drawn from committed rows: `python -m eval.experiments.plots`.

docs/plots/quality_size.svg   decibels over bytes, every recipe on both embedded models, and the curve of budgets
docs/plots/small.svg          captions that still come true over bytes, weights of at most 4 bits, by system
docs/plots/speed.svg          milliseconds beside full precision, torchao and SDNQ

What is plotted stands as JSON in each file's description, and a test compares it with the rows. Text and lines are of
middle grey on no ground, so that they can be read on white and on black.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import unescape
from pathlib import Path

from dq.bench import widths
from dq.disk import write
from eval.experiments import rows
from pipelines import tiny

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "plots"
INK, LINE, FREE, FITTED, BUDGET = "#7d8590", "#7d859066", "#2f81f7", "#db6d28", "#3fb950"
COLOURS = {"dq": BUDGET, "full precision": INK, "torchao": FREE, "SDNQ": FITTED}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "dq",
}
KINDS = {"budget": BUDGET, "data-free": FREE, "calibrated": FITTED}
KEY = (
    ("recipes without calibration", FREE),
    ("calibrated recipes", FITTED),
    ("formats mixed by layer in the bytes of ...", BUDGET),
    ("upright lines: 95 % intervals,", INK),
    ("of mixed formats the range over seeds", INK),
)
MOST_BITS, ENOUGH = 4, 5.0  # weights that count as small; points of caption accuracy that may be lost
SMALL = (  # rows of the plot of small models: of each system the recipe, or what stands for it at fewer bits
    "gptq-int4-weight",
    "gptq-int4-weight in 3 bits",
    "gptq-int4-weight in 2 bits",
    "svdquant-int4",
    "svdquant-w4a8",
    "comq-int4-weight",
    "qua2sedimo-w4",
    "qua2sedimo-w3.7",
    "squeezellm-w3",
    "lrqdit-w3a4",
    "lrqdit-w4a4",
    "vq4dit-w3",
    "vq4dit-w2",
    "vptq-w2",
)
MIDDLE = 0.22  # share of fp32's bytes; names of smaller recipes stand on the left
RACES = ("linear 1024 x 3072 -> 3072", "pixart", "flux", "unet")
# contenders of a race as they are called, whose they are
CONTENDERS = {
    "bf16": ("bf16", "full precision"),
    "bf16-compiled": ("bf16, compiled", "full precision"),
    "torchao-int8": ("torchao int8", "torchao"),
    "torchao-int8-compiled": ("torchao int8, compiled", "torchao"),
    "sdnq-int8": ("SDNQ int8", "SDNQ"),
    "sdnq-int8-compiled": ("SDNQ int8, compiled", "SDNQ"),
    "sdnq-int8-conv": ("SDNQ int8, convolutions too", "SDNQ"),
    "dq-w4a8": ("dq w4a8", "dq"),
    "dq-int8": ("dq int8", "dq"),
    "dq-int8-attention-int8": ("dq int8, attention too", "dq"),
}


def quality_size() -> dict[str, list[dict]]:
    """By model: points with name, kind (data-free, calibrated or budget), share of fp32's bytes, decibels, ends."""
    return {model: [*_data_free(model), *_calibrated(model), *_budgets(model)] for model in tiny.NAMES}


def _point(name: str, kind: str, share: float, row: Mapping) -> dict:
    ends = [row["psnr_db_low"], row["psnr_db_high"]] if "psnr_db_low" in row else None
    return {"name": name, "kind": kind, "share": round(share, 4), "db": round(row["psnr_db"], 2), "ends": ends}


def _data_free(model: str) -> list[dict]:
    found = [row for row in rows.read(rows.FOLDER / "quality.json") if row["model"] == model]
    found = [row for row in found if row["recipe"] != "none" and row["dtype"] == "float32"]
    return [_point(row["recipe"], "data-free", row["bytes_share"], row) for row in found]


def _calibrated(model: str) -> list[dict]:
    """Recipes by their own names; not the baselines they are set against."""
    found = [row for row in rows.read(rows.FOLDER / "methods.json") if row["model"] == model]
    found = [row for row in found if row["row"] == row["recipe"] and row["row"] != "int8"]
    return [_point(row["row"], "calibrated", row["bytes"] / row["fp32_bytes"], row) for row in found]


def _budgets(model: str) -> list[dict]:
    """Means over calibration seeds; ends: the least and the most."""
    fp32 = next(row["fp32_bytes"] for row in rows.read(rows.FOLDER / "quality.json") if row["model"] == model)
    found = [
        row
        for row in rows.read(rows.FOLDER / "mixed.json")
        if row["model"] == model and row["way"] == "mixed" and "psnr_db" in row
    ]
    points = []
    for budget in dict.fromkeys(row["budget"] for row in found):
        mine = [row for row in found if row["budget"] == budget]
        values = [row["psnr_db"] for row in mine]
        row = {"psnr_db": statistics.mean(values), "psnr_db_low": min(values), "psnr_db_high": max(values)}
        points.append(_point(budget, "budget", mine[0]["bytes"] / fp32, row))
    return sorted(points, key=lambda point: point["share"])


def small() -> dict[str, list[dict]]:
    """By model: rows of methods whose weights have at most 4 bits: name, system, share of fp32's bytes, lost accuracy.

    lost  percentage points of caption accuracy that full precision has and the row has not; within  whether those are
    at most ENOUGH; smallest  whether no smaller row of its system is within
    """
    found = {}
    for model in tiny.NAMES:
        points = [
            _small(row) for row in rows.read(rows.FOLDER / "methods.json") if row["model"] == model and _few(row)
        ]
        for point in points:
            rivals = [other["share"] for other in points if other["system"] == point["system"] and other["within"]]
            point["smallest"] = point["within"] and point["share"] == min(rivals)
        found[model] = sorted(points, key=lambda point: point["share"])
    return found


def _few(row: Mapping) -> bool:
    """A system's own row, no control, with weights of at most MOST_BITS."""
    return row["row"] in SMALL and float(re.findall(r"W([0-9.]+)", row["bits"])[0]) <= MOST_BITS


def _small(row: Mapping) -> dict:
    lost = 100 * (row["caption_accuracy_fp32"] - row["caption_accuracy"])
    share = round(row["bytes"] / row["fp32_bytes"], 4)
    point = {"name": row["row"], "system": row["recipe"].partition("-")[0], "share": share, "lost": round(lost, 1)}
    return point | {"within": lost <= ENOUGH}


def speed() -> dict[str, list[dict]]:
    """By what is timed: bars with name, whose it is, milliseconds."""
    found = {}
    for row in _unlimited("speed"):
        if row["what"].startswith(tiny.NAMES) and row["recipe"] == "int8" and not row.get("emulated"):
            dtype = {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]
            bars = found.setdefault(row["what"], [])
            bars += [
                _bar(dtype, "full precision", row["full_ms"]),
                _bar(f"dq int8 in {dtype}", "dq", row["quantized_ms"]),
            ]
    for row in _unlimited("kernels"):
        if (
            (row["kind"], row["base"]) == ("speed", "bf16")
            and row["model"] in RACES
            and row["contender"] in CONTENDERS
        ):
            found.setdefault(row["shown"], []).append(_bar(*CONTENDERS[row["contender"]], row["ms"]))
    order = [name for name, _ in CONTENDERS.values()]
    for row in RACES:
        shown = widths.shown(row)
        found[shown].sort(key=lambda bar: order.index(bar["name"]))
    return found


def _unlimited(name: str) -> list[dict]:
    """Rows of a file that were measured with all that the processor has."""
    return [row for row in rows.read(rows.FOLDER / f"{name}.json") if not rows.limited(row)]


def _bar(name: str, whose: str, ms: float) -> dict:
    return {"name": name, "whose": whose, "ms": round(ms, 2)}


def draw_quality_size(figure, data: dict[str, list[dict]]) -> None:
    """A panel a model: names of what takes few bytes on the left, of the others on the right, budgets as a curve."""
    panels = figure.subplots(1, len(data))
    for axes, (model, points) in zip(panels, data.items(), strict=True):
        for kind, colour in KINDS.items():
            _mark(axes, [point for point in points if point["kind"] == kind], colour, "-" if kind == "budget" else "")
        _name_budgets(axes, [point for point in points if point["kind"] == "budget"])
        singles = [point for point in points if point["kind"] != "budget"]
        _name_beside(axes, [point for point in singles if point["share"] < MIDDLE], 12, "right")
        _name_beside(axes, [point for point in singles if point["share"] >= MIDDLE], 32.5, "left")
        axes.set(title=model, xlim=(2, 43), ylim=(22, 67), xlabel="denoiser's bytes, % of fp32")
        axes.set_xticks([15, 20, 25, 30])
        axes.grid(color=LINE, lw=0.5)
    panels[0].set_ylabel("PSNR to the fp32 pictures, dB")
    for i, (text, colour) in enumerate(KEY):
        panels[0].text(0.02, 0.985 - 0.04 * i, text, color=colour, fontsize=8, transform=panels[0].transAxes, va="top")


def draw_small(figure, data: dict[str, list[dict]]) -> None:
    """A panel a model: what is within is filled, the smallest of each system named; a line at ENOUGH."""
    panels = figure.subplots(1, len(data), sharey=True)
    for axes, (model, points) in zip(panels, data.items(), strict=True):
        axes.axhline(-ENOUGH, color=LINE, lw=1)
        for point in points:
            colour = BUDGET if point["within"] else FITTED
            face = colour if point["smallest"] else "none"
            axes.plot(100 * point["share"], -point["lost"], "o", ms=5, mec=colour, mfc=face)
        named = [{"name": p["name"], "share": p["share"], "db": -p["lost"], "kind": "calibrated"} for p in points]
        span = max([*(p["lost"] for p in points), ENOUGH]) + 8
        _name_beside(axes, named, 21, "left", span / 26)
        axes.set(title=model, xlim=(6, 31), ylim=(-span, 8), xlabel="denoiser's bytes, % of fp32")
        axes.set_xticks([8, 12, 16, 20])
        axes.grid(color=LINE, lw=0.5)
    panels[0].set_ylabel("caption accuracy beside fp32, points")


def _mark(axes, points: Sequence[dict], colour: str, line: str) -> None:
    x, y = [100 * point["share"] for point in points], [point["db"] for point in points]
    axes.plot(x, y, linestyle=line, marker="o", ms=4, color=colour, lw=1, zorder=3)
    for place, point in zip(x, points, strict=True):
        if point["ends"]:
            axes.vlines(place, *point["ends"], color=colour, lw=1.2, zorder=2)


def _name_budgets(axes, points: Sequence[dict]) -> None:
    """Above and left of the curve; of two that nearly meet the second below and right."""
    before = None
    for point in points:
        near = before is not None and abs(point["share"] - before["share"]) < 0.012
        shift, sides = ((4, -3), ("left", "top")) if near else ((-4, 2), ("right", "bottom"))
        place = {"xytext": shift, "textcoords": "offset points", "ha": sides[0], "va": sides[1], "color": BUDGET}
        axes.annotate(point["name"], (100 * point["share"], point["db"]), **place, fontsize=7)
        before = point


def _name_beside(axes, points: Sequence[dict], x: float, side: str, gap: float = 1.75) -> None:
    """Names in a column at `x`, as near to the height of their points as the others let them, with a thin line."""
    ordered = sorted(points, key=lambda point: point["db"])
    heights = spread([point["db"] for point in ordered], gap)
    for point, y in zip(ordered, heights, strict=True):
        colour = FITTED if point["kind"] == "calibrated" else FREE
        axes.annotate(
            point["name"],
            xy=(100 * point["share"], point["db"]),
            xytext=(x, y),
            ha=side,
            va="center",
            fontsize=7.5,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "shrinkA": 1, "shrinkB": 2},
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Rising values moved as little as it takes to be `gap` apart: neighbours that meet are centred as one block."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _centre(blocks[-2]) + _reach(blocks[-2], gap) > _centre(blocks[-1]) - _reach(
            blocks[-1], gap
        ):
            last = blocks.pop()
            blocks[-1] += last
    return [_centre(block) + gap * (i - (len(block) - 1) / 2) for block in blocks for i in range(len(block))]


def _centre(block: Sequence[float]) -> float:
    return statistics.mean(block)


def _reach(block: Sequence[float], gap: float) -> float:
    return gap * len(block) / 2


def draw_speed(figure, data: dict[str, list[dict]]) -> None:
    """A panel for each thing that is timed, a bar of equal width a contender, with its name and milliseconds."""
    counts = list(map(len, data.values()))
    tall = [max(pair) for pair in zip(counts[::2], counts[1::2], strict=True)]
    panels = figure.subplots(len(tall), 2, gridspec_kw={"height_ratios": [most + 0.8 for most in tall]}).flat
    for i, (axes, (what, bars)) in enumerate(zip(panels, data.items(), strict=True)):
        places = range(0, -len(bars), -1)
        axes.barh(places, [bar["ms"] for bar in bars], color=[COLOURS[bar["whose"]] for bar in bars], height=0.74)
        for place, bar in zip(places, bars, strict=True):
            text = f" {bar['ms']:.0f} ms" if bar["ms"] >= 100 else f" {bar['ms']:.1f} ms"
            axes.text(bar["ms"], place, text, va="center", color=INK, fontsize=8)
        axes.set_yticks(places, [bar["name"] for bar in bars])
        axes.set_xticks([])
        axes.set_title(what, fontsize=9, fontweight="bold", loc="left")
        axes.tick_params(length=0)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.set(ylim=(0.5 - tall[i // 2], 0.5), xlim=(0, 1.2 * max(bar["ms"] for bar in bars)))


PLOTS: dict[str, tuple[Callable[[], dict], Callable, tuple[float, float]]] = {
    "quality_size": (quality_size, draw_quality_size, (9.2, 4.9)),
    "small": (small, draw_small, (9.2, 4.4)),
    "speed": (speed, draw_speed, (9.2, 6.0)),
}


def main() -> None:
    for name, (found, draw, size) in PLOTS.items():
        place = FOLDER / f"{name}.svg"
        write(place, partial(_save, found(), draw, size))
        print(place)


def _save(found: dict, draw: Callable, size: tuple[float, float], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    told = {"Date": None, "Creator": None, "Description": json.dumps(found)}
    with rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, found)
        figure.savefig(path, format="svg", metadata=told, transparent=True)


def plotted(name: str) -> dict:
    """What a committed plot says that it shows."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", (FOLDER / f"{name}.svg").read_text(), re.DOTALL)
    return json.loads(unescape(found[1]))


if __name__ == "__main__":
    main()
