"""Plots and pictures of a report: Pareto plots as SVG that follows the page's colours, small JPEGs as data URIs.

A point is on the front when no other is at most as costly and at least as good, and better in one of the two.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MOST_FRAMES = 16  # of a video on a page
GAIN = 8  # by which differences are multiplied, as in `make demo`
# colours drawn with -> what the page's style sheet calls them
INK = {"#010101": "--ink", "#020202": "--muted", "#030303": "--line", "#040404": "--accent", "#050505": "--surface"}
TEXT, MUTED, LINE, ACCENT, SURFACE = INK
SIZE = (4.6, 3.1)  # inches: about 330 px wide, so that text keeps its size on a phone
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}
HALO = "paint-order: stroke; stroke: var(--surface); stroke-width: 3px"  # keeps text readable on a line
# where a label may stand around its point, in points, the first free one: (x, y, horizontal, vertical alignment)
PLACES = [(6, 3, "left", "bottom"), (-6, 3, "right", "bottom"), (6, -3, "left", "top"), (-6, -3, "right", "top")]
PLACES += [(0, 8, "center", "bottom"), (0, -8, "center", "top"), (8, 0, "left", "center"), (-8, 0, "right", "center")]


@dataclass(frozen=True)
class Point:
    """An entry in a plot: its cost, its quality, and the interval of that where there is one."""

    name: str
    cost: float
    quality: float
    low: float | None = None
    high: float | None = None


def front(points: Sequence[Point], better: str) -> list[Point]:
    """The points that no other beats, cheapest first; better: "higher" or "lower" quality values."""
    sign = 1 if better == "higher" else -1
    best, kept = -np.inf, []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.quality)):
        if sign * point.quality > best:
            kept.append(point)
            best = sign * point.quality
    return kept


def pareto(points: Sequence[Point], cost: str, quality: str, better: str) -> str:
    """An `<svg>` of quality over cost with the front as a line; axis labels `cost` and `quality`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": f"{cost} {quality} {points}"}):
        figure = Figure(SIZE, layout="constrained")
        canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
        best = front(points, better)
        along = [point.cost for point in best], [point.quality for point in best]
        axes.plot(*along, color=ACCENT, linewidth=1.2, alpha=0.6, drawstyle="steps-post", zorder=2)
        for point in points:
            _draw(axes, point, point in best)
        _scale(axes, [point.cost for point in points])
        axes.set_xlabel(cost)
        axes.set_ylabel(quality)
        axes.margins(0.16)
        _label(axes, canvas, points)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), f"{quality} over {cost}: " + ", ".join(_said(point) for point in points))


def _draw(axes, point: Point, best: bool) -> None:
    if point.low is not None and point.high is not None:
        axes.vlines(point.cost, point.low, point.high, color=ACCENT if best else MUTED, linewidth=1, zorder=2)
    face, edge = (ACCENT, SURFACE) if best else (SURFACE, MUTED)
    axes.plot(point.cost, point.quality, "o", ms=7, mfc=face, mec=edge, mew=1.4, zorder=3)


def _scale(axes, costs: list[float]) -> None:
    """Costs far apart on a logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if min(costs) > 0 and max(costs) > 4 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_tick_params(length=0)


def _label(axes, canvas, points: Sequence[Point]) -> None:
    """Names beside the points, where they cover neither a point nor another name and stay inside."""
    canvas.draw()  # places the axes, so that extents are known
    renderer, inside = canvas.get_renderer(), axes.get_window_extent()
    axes.figure.set_layout_engine("none")
    spots = axes.transData.transform([(point.cost, point.quality) for point in points])
    taken: list = []
    for point in sorted(points, key=lambda point: point.cost):
        for x, y, across, along in PLACES:
            given = {"xytext": (x, y), "textcoords": "offset points", "ha": across, "va": along}
            text = axes.annotate(point.name, (point.cost, point.quality), **given, zorder=4)
            box = text.get_window_extent(renderer)
            free = not any(box.overlaps(other) for other in taken) and box.count_contains(spots) == 0
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                break
            text.remove()
        else:  # no free place: the table has the name
            continue
        taken.append(box)


def _inline(svg: str, said: str) -> str:
    """matplotlib's file as an element of a page: the page's colours and font, no ids that two plots would share."""
    svg = svg[svg.index("<svg") :]
    for colour, name in INK.items():
        svg = svg.replace(colour, f"var({name})")
    svg = re.sub(r'<g id="[^"]*"/>\n?', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<(defs|metadata)>\s*<style.*?</style>\s*</\1>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg).replace('<text style="', f'<text style="{HALO}; ')
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    label = said.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _said(point: Point) -> str:
    return f"{point.name} {point.quality:.4g} at {point.cost:.4g}"


def chosen(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames of a video that a page plays: MOST_FRAMES at most, evenly spaced from the first to the last."""
    count = min(len(frames), MOST_FRAMES)
    return [frames[round(place)] for place in np.linspace(0, len(frames) - 1, count)]


def strip(frames: Sequence[Image.Image], side: int) -> Image.Image:
    """A picture, or frames side by side, no side of a frame above `side`."""
    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = small[0].size
    sheet = Image.new("RGB", (width * len(small), height))
    for place, frame in enumerate(small):
        sheet.paste(frame, (place * width, 0))
    return sheet


def alike(frames: Sequence[Image.Image], reference: Sequence[Image.Image]) -> bool:
    """Whether there is a difference to take: as many frames on both sides, of one size."""
    return [frame.size for frame in frames] == [frame.size for frame in reference]


def difference(frames: Sequence[Image.Image], reference: Sequence[Image.Image]) -> list[Image.Image]:
    """|x - y| of each frame in each channel, times GAIN, before anything is made smaller."""
    pairs = [(np.asarray(x, np.int16), np.asarray(y, np.int16)) for x, y in zip(frames, reference, strict=True)]
    return [Image.fromarray(np.minimum(GAIN * np.abs(x - y), 255).astype(np.uint8)) for x, y in pairs]


def data_uri(image: Image.Image) -> str:
    """The picture as a JPEG inside an address."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88, subsampling=0)  # optimize=True fails on pictures of much noise
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
