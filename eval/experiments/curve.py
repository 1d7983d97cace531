"""Milliseconds of a picture and its error, from nothing to everything on: `python -m eval.experiments.curve`.

Each row adds one thing to the row above: rounding, attention in bytes, a cache. Rows are timed in turn, so that a
machine that slows down slows all of them, and go to eval/results/curve.json. Run it on an idle machine. An embedded
model's error is the PSNR of its pictures to full precision; `--model pixart-width` is PixArt-Sigma at 512 pixels with
random weights and text (`eval.experiments.calibration_time`), its error the SQNR of the final latents, in decibels.
"""

import argparse
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

import dq
from dq import explaining
from eval.experiments import calibration_time, rows
from eval.metrics import caption_accuracy, psnr
from pipelines import tiny

FILE = rows.FOLDER / "curve.json"
KEYS = ("model", "recipe", "dtype", "batch", "steps", "level")
LADDER = ("", "int8", "sageattention-int8", "sageattention-int8+interval:2", "sageattention-int8+interval:3")
WIDE = "pixart-width"


def wide(options, dtype: torch.dtype) -> Any:
    """PixArt-Sigma's transformer of random weights in its pipeline, without text encoder and VAE."""
    transformer = calibration_time.build(options.layers, dtype, "cpu")
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = PixArtSigmaPipeline(transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_width(options, dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
    """-> draw(pipe): latents (N, 4, 64, 64) of the same texts and noise."""
    dice = torch.Generator().manual_seed(1)
    text = torch.randn(2, options.prompts, *calibration_time.TEXT, generator=dice).to(dtype)
    seen = torch.ones(options.prompts, calibration_time.TEXT[0])
    call = {"prompt": None, "negative_prompt": None, "prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    call |= {"prompt_attention_mask": seen, "negative_prompt_attention_mask": seen, "output_type": "latent"}
    call |= {"height": 512, "width": 512, "use_resolution_binning": False, "num_inference_steps": options.steps}
    return lambda pipe: pipe(**call, generator=torch.Generator().manual_seed(0)).images


def of_model(options, captions: list[str]) -> Callable[[Any], torch.Tensor]:
    """-> draw(pipe): pictures (N, 3, 64, 64)."""
    given = {"batch": options.batch, "num_inference_steps": options.steps}
    return lambda pipe: tiny.pictures(pipe, options.model, captions, 0, **given)


def measured(options) -> list[dict]:
    dtype, asked = getattr(torch, options.dtype), tiny.prompts(options.prompts, seed=1)
    captions, scenes = zip(*asked, strict=True)
    known = options.model != WIDE
    draw = of_model(options, list(captions)) if known else of_width(options, dtype)
    pipes = {recipe: tiny.load(options.model, dtype) if known else wide(options, dtype) for recipe in options.recipes}
    for recipe, pipe in pipes.items():
        if recipe:
            dq.quantize(pipe, recipe, progress=False)
    drawn, times = {}, {recipe: [] for recipe in pipes}
    for repeat in range(options.repeats + 1):
        for recipe, pipe in pipes.items():
            begun = time.perf_counter()
            drawn[recipe] = draw(pipe)
            if repeat:  # the first one warms up, and measures kernels
                times[recipe].append(1000 * (time.perf_counter() - begun) / options.prompts)
    full, found = drawn[options.recipes[0]], []
    for recipe in pipes:
        name = options.model if known else f"{WIDE}, {options.layers} blocks"
        row = {"model": name, "recipe": recipe, "dtype": options.dtype, "steps": options.steps}
        row |= {
            "batch": options.batch if known else options.prompts,
            "ms_per_picture": round(median(times[recipe]), 2),
        }
        if recipe != options.recipes[0]:
            values = psnr.per_item(drawn[recipe], full) if known else [explaining.sqnr_db(full, drawn[recipe])]
            row["error_db"] = round(mean(values), 2)
        if known:
            accuracy = caption_accuracy.score(drawn[recipe], scenes)["caption_accuracy"]
            row["caption_accuracy"] = round(accuracy, 4)
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="tiny-pixart", choices=[*tiny.NAMES, WIDE])
    parser.add_argument("--recipes", nargs="+", default=list(LADDER))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="prompts a call; at PixArt's width all of them")
    parser.add_argument("--layers", type=int, default=28, help="blocks at PixArt's width")
    parser.add_argument("--repeats", type=int, default=3)
    for row in measured(parser.parse_args(argv)):
        print(row, flush=True)
        rows.add(FILE, row | rows.conditions(torch.get_num_threads()) | rows.stamp(), KEYS)


if __name__ == "__main__":
    main()
