"""README's picture: the same prompts and seeds in full precision and quantized, and how far apart they are.

    python -m eval.experiments.pictures        draws docs/pictures.png; minutes, most of them calibration

The entries are those of eval/suites/tiny.yaml, quantized as it says, on its first prompts, drawn into out/pictures.
Bytes, milliseconds and decibels beside each row are those of eval/results/eval.json, over all prompts of the suite.
They stand in the file as text, too, so that a test can compare them with the rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dq.disk import write
from eval import figures, prompts
from eval.experiments import quality, rows
from eval.generate import generate
from eval.static import kernels_by_rank
from eval.suite import FULL, Suite

ROOT = Path(__file__).resolve().parents[2]
FILE, SUITE = ROOT / "docs" / "pictures.png", ROOT / "eval" / "suites" / "tiny.yaml"
MODEL = "tiny-pixart"
ENTRIES = {FULL: "original, fp32", "int8": "int8", "svdquant-int4": "svdquant-int4", "mixed-5-bits": "budget: 5 bits"}
COLUMNS, ENLARGED, GAP, LABEL = 4, 3, 8, 330  # pictures a row; pixels a pixel; pixels between pictures and for labels
FIRST, OTHERS = 33, 29  # pixels of letters: pages show the sheet at less than half its size
INK, FAINT, GROUND = "#1f2328", "#59636e", "#ffffff"


def main() -> None:
    kernels_by_rank()
    run = drawn(Suite.read(SUITE))
    found = shown()
    sheet = grid(run, found)
    text = PngImagePlugin.PngInfo()
    text.add_text("figures", json.dumps(found))
    write(FILE, lambda fresh: sheet.save(fresh, format="PNG", optimize=True, pnginfo=text))
    print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} KiB")


def drawn(suite: Suite, model: str = MODEL, entries: Sequence[str] = tuple(ENTRIES), name: str = "pictures"):
    """The run of the suite's first prompts, made where it is missing; calibrated as for all of its prompts."""
    others = prompts.others(suite)
    kept = [suite.entry(entry) for entry in entries]
    grammar = "clips" if "clips" in suite.prompts else "scenes"
    fitted = [
        replace(entry, calibration={"prompts": others, **entry.calibration})
        if entry.budget or entry.calibration
        else entry
        for entry in kept
    ]
    short = replace(
        suite,
        name=name,
        pipelines=(suite.pipeline(model),),
        entries=tuple(fitted),
        prompts={**suite.prompts, grammar: COLUMNS},
        metrics=(),
        timing={"repeats": 0},
    )
    return generate(short, ROOT / "out" / name / quality.version(), [(model, entry) for entry in entries])


def shown() -> dict[str, dict]:
    """By entry: MiB of the denoiser, ms a step (None where emulated), mean PSNR in dB (None of the original)."""
    found = {row["entry"]: row for row in rows.read(rows.FOLDER / "eval.json") if row["pipeline"] == MODEL}
    told = {}
    for name in ENTRIES:
        row = found[name]
        ms = None if row["emulated"] else round(row["figures"]["ms_per_step"], 1)
        db = row["scores"].get("psnr", {}).get("value")
        mib = round(row["figures"]["bytes"] / 2**20, 1)
        told[name] = {"mib": mib, "ms": ms, "db": None if db is None else round(db, 1), "pictures": row["items"]}
    return told


def grid(run, found: dict[str, dict]) -> Image.Image:
    """Rows of pictures, and to the right of them their differences to the first row."""
    side = ENLARGED * run.picture(MODEL, FULL, 0).width
    across = side + GAP
    width = LABEL + COLUMNS * across + 3 * GAP + COLUMNS * across - GAP + 2 * GAP
    sheet = Image.new("RGB", (width, len(ENTRIES) * across + GAP), GROUND)
    pen, right = ImageDraw.Draw(sheet), LABEL + COLUMNS * across + 3 * GAP
    for i, name in enumerate(ENTRIES):
        top = GAP + i * across
        _label(pen, (2 * GAP, top + side // 2), name, found[name])
        for j in range(COLUMNS):
            frames, truth = ([run.picture(MODEL, entry, j)] for entry in (name, FULL))
            paste(sheet, frames[0], (LABEL + j * across, top))
            if name != FULL:
                paste(sheet, figures.difference(frames, truth)[0], (right + j * across, top))
    say(pen, (right, GAP + side), (f"|difference to the original| x {figures.GAIN}",), "ld")
    return sheet


def paste(sheet: Image.Image, picture: Image.Image, place: tuple[int, int]) -> None:
    """Put a picture there, enlarged, pixels kept sharp."""
    size = (ENLARGED * picture.width, ENLARGED * picture.height)
    sheet.paste(picture.resize(size, Image.Resampling.NEAREST), place)


def _label(pen: ImageDraw.ImageDraw, place: tuple[int, int], name: str, found: dict) -> None:
    ms = "not timed: emulated" if found["ms"] is None else f"{found['ms']:.1f} ms a step"
    lines = (f"{found['mib']:.1f} MiB", ms, *([] if found["db"] is None else [f"{found['db']:.1f} dB"]))
    say(pen, place, (ENTRIES[name], *lines), "lm")


def say(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], anchor: str) -> None:
    """Lines of text around a place, the first one dark and larger."""
    x, y = place
    sizes = [FIRST, *[OTHERS] * (len(lines) - 1)]
    y -= sum(sizes[1:]) * 1.35 / 2 if anchor == "lm" else 0
    for number, (line, size) in enumerate(zip(lines, sizes, strict=True)):
        pen.text((x, y), line, fill=FAINT if number else INK, font=ImageFont.load_default(size), anchor=anchor)
        y += 1.35 * size


if __name__ == "__main__":
    main()
