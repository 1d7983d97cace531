"""Rows of eval/results/layers.json: one linear in every format of LAYERS beside full precision, by rows of its input.

`python -m eval.experiments.speed --layers`. LAYERS is data: a format of the closed vocabulary is a line of it.
"""

import argparse
from dataclasses import asdict

import torch

from dq.bench import layers as bench
from dq.bench import roofline
from dq.plan import Recipe
from eval.experiments import rows
from eval.markdown import table

FILE = rows.FOLDER / "layers.json"
KEYS = ("what", "device", "dtype", "recipe", "machine", "level", "threads")
LAYERS = {  # by name: formats of weights and of activations
    "int8": ("int8/channel", "int8/token"),
    "w4a8-row": ("int4/channel", "int8/token"),
    "w4a8-group": ("int4/group:64", "int8/token"),
    "w4a8-two-level": ("int4/group:64+channel", "int8/token"),
    "int8-weight": ("int8/channel", None),
    "int4-weight": ("int4/group:64", None),
    "int5-weight": ("int5/group:64", None),
}
ROWS = (1, 4, 16, 256, 1024, 4096)
SIZES = ((1152, 1152), (1152, 4608), (3072, 3072))  # inputs, outputs: PixArt's attention and feed-forward, FLUX


def run(options: argparse.Namespace) -> None:
    """A row per dtype, format and shape; written one by one."""
    from eval.experiments import speed

    stamp = rows.stamp(options.device) | rows.conditions(options.threads)
    file, seconds = options.out or FILE, min(options.seconds, 1.0)
    for dtype in speed.dtypes(options):
        for name in options.recipes or LAYERS:
            for shape in ((count, *size) for size in SIZES for count in ROWS):
                what = "linear {} x {} -> {}".format(*shape)
                key = {"what": what, "device": options.device, "dtype": str(speed.DTYPES[dtype])[6:], "recipe": name}
                if options.again or not rows.there(file, key, stamp):
                    recipe = Recipe(name, linear=LAYERS[name], conv=LAYERS[name])
                    [timing] = bench.linears(recipe, options.device, speed.DTYPES[dtype], seconds, [shape])
                    rows.add(file, asdict(timing) | key | stamp, KEYS)
                    print(f"{dtype} {name} {what}: {timing.full_ms:.3f} ms, {timing.speedup:.2f} times as fast")


def tables(found: list[dict]) -> list[str]:
    """Markdown lines: a table for each level and dtype, a line a shape, a column a format: times as fast."""
    lines = []
    for level, dtype in dict.fromkeys((row["level"], row["dtype"]) for row in found):
        mine = [row for row in found if (row["level"], row["dtype"]) == (level, dtype) and not row["emulated"]]
        names = [name for name in LAYERS if any(row["recipe"] == name for row in mine)]
        ratios = {(row["what"], row["recipe"]): f"{row['full_ms'] / row['quantized_ms']:.2f}" for row in mine}
        full = {row["what"]: f"{row['full_ms']:.2f}" for row in mine}
        head = [f"{level}, {roofline.NAMES[getattr(torch, dtype)]}", "full, ms", *(f"`{name}`" for name in names)]
        cells = [[what, full[what], *(ratios.get((what, name), "") for name in names)] for what in full]
        lines += [*table(head, cells), ""]
    return lines[:-1]
