"""Milliseconds of a picture and its error, from nothing to everything on: `python -m eval.experiments.curve`.

Each row adds one thing to the row above: rounding, attention in bytes, a cache. Rows are timed in turn, so that a
machine that slows down slows all of them, and go to eval/results/curve.json. Run it on an idle machine.
"""

import argparse
import time
from statistics import mean, median

import torch

import dq
from eval.experiments import rows
from eval.metrics import caption_accuracy, psnr
from pipelines import tiny

FILE = rows.FOLDER / "curve.json"
KEYS = ("model", "recipe", "dtype", "batch", "level")
LADDER = ("", "int8", "sageattention-int8", "sageattention-int8+interval:2", "sageattention-int8+interval:3")


def pipeline(model: str, recipe: str, dtype: torch.dtype):
    """An embedded pipeline by a recipe of LADDER, in full precision for ""."""
    pipe = tiny.load(model, dtype)
    if recipe:
        dq.quantize(pipe, recipe, progress=False)
    return pipe


def measured(options) -> list[dict]:
    dtype, asked = getattr(torch, options.dtype), tiny.prompts(options.prompts, seed=1)
    captions, scenes = zip(*asked, strict=True)
    pipes = {recipe: pipeline(options.model, recipe, dtype) for recipe in options.recipes}
    given = {"batch": options.batch, "num_inference_steps": options.steps}
    drawn, times = {}, {recipe: [] for recipe in pipes}
    for repeat in range(options.repeats + 1):
        for recipe, pipe in pipes.items():
            begun = time.perf_counter()
            drawn[recipe] = tiny.pictures(pipe, options.model, list(captions), 0, **given)
            if repeat:  # the first one warms up, and measures kernels
                times[recipe].append(1000 * (time.perf_counter() - begun) / options.prompts)
    full = drawn[options.recipes[0]]
    return [
        {
            "model": options.model,
            "recipe": recipe,
            "dtype": options.dtype,
            "batch": options.batch,
            "ms_per_picture": round(median(times[recipe]), 2),
            "psnr_db": None if recipe == options.recipes[0] else round(mean(psnr.per_item(drawn[recipe], full)), 2),
            "caption_accuracy": round(caption_accuracy.score(drawn[recipe], scenes)["caption_accuracy"], 4),
        }
        for recipe in pipes
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="tiny-pixart", choices=list(tiny.NAMES))
    parser.add_argument("--recipes", nargs="+", default=list(LADDER))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    for row in measured(parser.parse_args(argv)):
        print(row, flush=True)
        rows.add(FILE, row | rows.conditions(torch.get_num_threads()) | rows.stamp(), KEYS)


if __name__ == "__main__":
    main()
