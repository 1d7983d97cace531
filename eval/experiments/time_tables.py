"""Tables of docs/results/time.md: formats along the run, attention, caches, corrections, and what they save."""

from collections.abc import Mapping

from eval.experiments import around, attention, caches, curve, rows, thirds
from eval.experiments.tables import OLD, SHORT, decibels
from eval.markdown import table


def along() -> list[str]:
    """Markdown lines of formats that change with the step, and the one format of as many mean bits."""
    cells = []
    for row in rows.read(thirds.FILE):
        old = OLD if row["version"] != thirds.version(row["model"]) else ""
        noise = " / ".join(f"{row[f'noise_sqnr_{third}_db']:.1f}" for third in ("early", "middle", "late"))
        formats = ", ".join(f"{count} of {bits}" for bits, count in row["formats"].items())
        cells.append([row["model"], row["row"] + old, f"{row['act_bits']:g}", formats, decibels(row), noise])
    head = ["model", "way", "mean bits of inputs", "layers, by bits along the run", "PSNR to fp32, dB"]
    return table([*head, "noise SQNR early / middle / late, dB"], cells)


def attention_calls() -> list[str]:
    """Markdown lines of what plans leave at the output of attention itself."""
    cells = []
    for row in (row for row in rows.read(attention.FILE) if row["kind"] == "calls"):
        old = OLD if row["version"] != attention.version(row["model"], attention.CALLS[row["row"]]) else ""
        values = [f"{row[f'{kind}_db']:.1f} ({row[f'{kind}_least_cosine']:.4f})" for kind in ("picture", "text")]
        cells.append([row["model"], row["row"] + old, *values])
    return table(["model", "plan", "to the picture, dB (least cosine)", "to the text, dB (least cosine)"], cells)


def attention_pictures() -> list[str]:
    """Markdown lines of pictures drawn with rounded attention."""
    cells = []
    for row in (row for row in rows.read(attention.FILE) if row["kind"] == "pictures"):
        old = OLD if row["version"] != attention.version(row["model"], attention.PICTURES[row["row"]]) else ""
        modules = "; ".join(f"{count} x {plan}" for plan, count in row["modules"].items())
        cells.append([row["model"], row["row"] + old, decibels(row), _percent(row), modules])
    return table(["model", "attention, layers in int8", "PSNR to fp32, dB", "caption accuracy", "modules"], cells)


def caching() -> list[str]:
    """Markdown lines of caches, calibrated under them or not."""
    cells = []
    for row in rows.read(caches.FILE):
        old = OLD if row["version"] != caches.version(row["model"], row["recipe"]) else ""
        head = [row["model"], f"`{row['recipe']}`{old}", row["policy"], str(row["steps"]), decibels(row)]
        cells.append([*head, _percent(row), "; ".join(row["said"])])
    head = ["model", "recipe", "calibrated on calls", "steps", "PSNR to fp32, dB", "caption accuracy"]
    return table([*head, "what the correction found"], cells)


def corrected() -> list[str]:
    """Markdown lines of students with and without corrections of their scheduler."""
    cells = []
    for row in rows.read(around.FILE):
        old = OLD if row["version"] != around.version(row["model"]) else ""
        names = [row["model"], str(row["steps"]), row["rounded"] + old, row["score"] or "none"]
        figures = [_spread(row, "psnr_db", 2), _spread(row, "caption_accuracy", 3), _spread(row, "clip_score", 2)]
        cells.append([*names, *figures, _spread(row, "fid", 2), ", ".join(f"{v:.3f}" for v in _values(row))])
    head = ["model", "steps", "rounded", "corrected by", "PSNR to fp32, dB", "caption accuracy", "CLIP score"]
    return table([*head, "FID to renders", "coefficients"], cells)


def saved() -> list[str]:
    """Markdown lines of milliseconds of a picture, each row beside full precision."""
    found, cells = rows.read(curve.FILE), []
    full = {_base(row): row["ms_per_picture"] for row in found if not row["recipe"]}
    for row in found:
        name = f"`{row['recipe']}`" if row["recipe"] else f"full precision, {SHORT[row['dtype']]}"
        error = f"{row['error_db']:.1f}" if "error_db" in row else ""
        faster = f"{full[_base(row)] / row['ms_per_picture']:.2f}"
        captions = _percent(row) if "caption_accuracy" in row else ""
        cells.append([row["model"], str(row["steps"]), name, f"{row['ms_per_picture']:.1f}", faster, error, captions])
    return table(["model", "steps", "recipe", "ms a picture", "times as fast", "error, dB", "caption accuracy"], cells)


def _base(row: Mapping) -> tuple:
    return tuple(row[key] for key in ("model", "dtype", "batch", "steps", "level"))


def _percent(row: Mapping) -> str:
    return f"{100 * row['caption_accuracy']:.0f} %"


def _spread(row: Mapping, name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f} ± {row[f'{name}_se']:.{digits}f}"


def _values(row: Mapping) -> list[float]:
    values = row.get("values", {}).values()
    return [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
