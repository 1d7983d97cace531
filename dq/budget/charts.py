"""Pictures of a search: quality against size and time as a PNG, and a page with what every layer got and why."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from dq.budget.choices import label
from dq.budget.predictions import NAMES
from dq.budget.search import MIB, Chosen, Measured, Search
from dq.errors import DQError

LIGHT, DARK = (247, 244, 236), (150, 40, 27)  # of the heat map, from harmless to harmful
REFERENCE_BITS = 4  # the heat map shows what rounding to this would do
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { padding: .2rem .5rem; text-align: left; border-bottom: 1px solid #e4e0d8; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } td.h { width: 4.5rem; text-align: center; }
.wrap { overflow-x: auto; } td { white-space: nowrap; }
.bar { display: inline-block; height: .7em; background: #35618e; vertical-align: middle; }
"""


def curve(search: Search, path: str | Path, chosen: Chosen | None = None) -> None:
    """Predicted SQNR against MiB, and against ms per step where layers were timed, with the chosen plan marked.

    Raises DQError when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DQError("--curve needs matplotlib; pip install 'dq-diffusion[plot]'") from None
    axes_of = [("MiB of the denoiser", "bytes", lambda plan: search.bytes_of(plan) / MIB)]
    if search.timed:
        axes_of.append(("ms per step (measured layers)", "ms", search.ms_of))
    figure = Figure(figsize=(6 * len(axes_of), 4.2), layout="constrained")
    for axis, (title, of, cost) in zip(figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of, strict=True):
        plans = [plan for plan in search.curve(of) if np.isfinite(search.sqnr_db(plan))]
        axis.plot([cost(p) for p in plans], [search.sqnr_db(p) for p in plans], "-", color="#35618e", label="mixed")
        for text, plan in uniform(search).items():
            axis.plot(cost(plan), search.sqnr_db(plan), "o", color="#9a958a", markersize=5)
            axis.annotate(
                text, (cost(plan), search.sqnr_db(plan)), fontsize=7, xytext=(4, -8), textcoords="offset points"
            )
        if chosen is not None:
            axis.plot(cost(chosen), search.sqnr_db(chosen), "D", color="#96281b", markersize=7, label="chosen")
        axis.set(xlabel=title, ylabel=f"predicted SQNR, dB ({search.metric})", title=search.recipe)
        most = max(cost(plan) for plan in uniform(search).values())
        axis.set_xlim(right=1.25 * most)  # not the whole way to full precision
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=150)


def uniform(search: Search) -> dict[str, Chosen]:
    """Plans in which every layer that can gets the same weight format, by its name."""
    formats = {str(c.weight): None for _, _, row in search.rows() for c in row.choices if c is not None}
    found = {}
    for text in formats:
        plan: Chosen = {part: {} for part in search.parts}
        for part, name, row in search.rows():
            own = [i for i, c in enumerate(row.choices) if c is not None and str(c.weight) == text]
            plan[part][name] = own[-1] if own else _most_exact(row)
        found[text] = plan
    return found


def _most_exact(row: Measured) -> int:
    """The least harmful choice that is a quantized one."""
    own = [i for i, choice in enumerate(row.choices) if choice is not None]
    return min(own, key=lambda i: row.harm[i])


def page(search: Search, chosen: Chosen, notes: list[str]) -> str:
    """A self-contained HTML page: sensitivity of layer x third of the steps, format, bytes and reason per layer."""
    rows = search.rows()
    heat = np.array([_reference(row) for _, _, row in rows])
    scaled = _scaled(heat)
    lines = []
    for (part, name, row), values, shades in zip(rows, heat, scaled, strict=True):
        choice = chosen[part][name]
        cells = "".join(_cell(v, s) for v, s in zip(values, shades, strict=True))
        full = html.escape(f"{part}.{name}" if part else name)
        bits = 8 * row.bytes[choice] / row.weights
        bar = f'<span class="bar" style="width:{5 * min(bits, 16):.0f}px"></span>'
        lines.append(
            f"<tr><td>{full}</td>{cells}<td>{html.escape(label(row.choices[choice]))}</td>"
            f'<td class="n">{bits:.2f}</td><td>{bar}</td><td class="n">{row.bytes[choice] / 1024:.0f}</td>'
            f"<td>{html.escape(_why(row, choice))}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in NAMES)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(search.recipe)}</title><style>{STYLE}</style><h1>{html.escape(search.recipe)}: "
        f"what every layer got</h1><ul>{said}</ul><p>Colour: the error in dB that rounding this layer alone to "
        f"{REFERENCE_BITS} bits leaves in the {html.escape(search.metric)}, early, middle and late in the denoising; "
        f'the darker, the more harm.</p><div class="wrap"><table><tr><th>layer</th>{head}<th>format</th>'
        f"<th>bits</th><th></th><th>KiB</th><th>why</th></tr>{''.join(lines)}</table></div></html>\n"
    )


def _reference(row: Measured) -> np.ndarray:
    """(thirds,) errors of the choice of about REFERENCE_BITS."""
    bits = [16.0 if c is None else 8 * b / row.weights for c, b in zip(row.choices, row.bytes, strict=True)]
    return row.errors[int(np.argmin([abs(b - REFERENCE_BITS - 0.5) for b in bits])), : len(NAMES)]


def _scaled(heat: np.ndarray) -> np.ndarray:
    """0 for the least harmful, 1 for the most, on a logarithmic scale."""
    logs = np.log10(np.maximum(heat, heat[heat > 0].min(initial=1.0) if (heat > 0).any() else 1.0))
    low, high = logs.min(), logs.max()
    return (logs - low) / max(high - low, 1e-9)


def _cell(value: float, shade: float) -> str:
    colour = tuple(round(a + (b - a) * shade) for a, b in zip(LIGHT, DARK, strict=True))
    text = f"{10 * np.log10(value):.0f}" if value > 0 else ""
    ink = "#fff" if shade > 0.6 else "#222"
    return f'<td class="h" style="background:rgb{colour};color:{ink}">{text}</td>'


def _why(row: Measured, choice: int) -> str:
    """What the next smaller choice would have cost."""
    if len(row.choices) == 1:
        return "never called during calibration, or protected: as the recipe plans it"
    smaller = [i for i, size in enumerate(row.bytes) if size < row.bytes[choice]]
    if not smaller:
        return "the smallest choice"
    best = min(smaller, key=lambda i: row.harm[i])
    times = row.harm[best] / row.harm[choice] if row.harm[choice] > 0 else float("inf")
    saved = (row.bytes[choice] - row.bytes[best]) / 1024
    return f"{label(row.choices[best])} would save {saved:.0f} KiB" + (
        f" for {times:.1f} times the harm" if np.isfinite(times) else " and be the first harm done here"
    )
