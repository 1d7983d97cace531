"""The first path, end to end: quantize a trained pipeline, save it, load it again, draw the same pictures with both.

    make demo        or      python -m pipelines.first_pictures [--model tiny-sd] [--recipe int8] [--out out]

Writes OUT/demo.png (rows: original, quantized, difference x8) and prints what changed. Both pipelines compute in fp32,
so the difference is the quantization alone; one step is timed in fp32 and in bf16, the two models in turn.
"""

import argparse
import shutil
import statistics
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import dq
from dq.bench import layers as bench
from pipelines import tiny
from pipelines.tiny.recogniser import shows_all

AMPLIFY, SCALE, GAP, MARGIN = 8, 2, 4, 72  # difference gain; enlargement; pixels between pictures; room for row labels
PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny-pixart", choices=tiny.NAMES)
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    quiet()
    captions, scenes = zip(*tiny.prompts(PICTURES), strict=True)
    original, quantized = tiny.load(options.model), tiny.load(options.model)
    report = dq.quantize(quantized, options.recipe)
    quantized = reload(quantized, options.out / f"{options.model}-{options.recipe}")
    before = draw(original, options.model, captions, "original")
    after = draw(quantized, options.model, captions, "quantized")
    rows = {"original": before, "quantized": after, f"difference x{AMPLIFY}": AMPLIFY * (after - before).abs()}
    grid(rows).save(options.out / "demo.png", optimize=True)
    Console().print(summary(options, report, (original, quantized), (before, after), scenes))
    print(f"{options.out / 'demo.png'}: {PICTURES} prompts, the same seeds in every row")


def quiet() -> None:
    """No bars for the loading of files, which takes a moment."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def reload(pipe, folder: Path):
    """Save a pipeline and read it back; `folder` is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    loaded = type(pipe).from_pretrained(folder, dtype=torch.float32)
    print(f"saved to {folder} and loaded again with {type(pipe).__name__}.from_pretrained")
    return loaded


def draw(pipe, name: str, captions: tuple[str, ...], label: str) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) in [0, 1], seeds 0..N-1, with a bar over the steps."""
    pipe.set_progress_bar_config(desc=f"{label}: {len(captions)} pictures", leave=True)
    pictures = tiny.pictures(pipe, name, list(captions))
    pipe.set_progress_bar_config(disable=True)
    return pictures


def grid(rows: dict[str, torch.Tensor]) -> Image.Image:
    """One picture: a labelled row per entry, its (N, 3, H, W) pictures side by side."""
    count, _, height, width = next(iter(rows.values())).shape
    down, across = SCALE * height + GAP, SCALE * width + GAP
    sheet = Image.new("RGB", (MARGIN + count * across - GAP, len(rows) * down - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (label, pictures) in enumerate(rows.items()):
        pen.multiline_text((2, i * down + down // 2 - 12), label.replace(" ", "\n"), fill="black")
        pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for j, picture in enumerate(pixels):
            large = Image.fromarray(picture).resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST)
            sheet.paste(large, (MARGIN + j * across, i * down))
    return sheet


def step_ms(pipes, name: str, seconds: float = 4.0) -> tuple[float, float]:
    """Median ms of one denoiser call on one picture (with guidance: two rows), original and quantized, in turn."""
    part = "unet" if hasattr(pipes[0], "unet") else "transformer"
    args, kwargs = bench.recorded_inputs(pipes[0], part, tiny.prompts(1)[0][0], **tiny.CALL[name])
    models = [getattr(pipe, part) for pipe in pipes]
    runs = {i: lambda model=model: model(*args, **kwargs) for i, model in enumerate(models)}
    with torch.inference_mode():
        times = bench.in_turn(runs, seconds)
    return statistics.median(times[0]), statistics.median(times[1])


def bf16_pair(options) -> tuple:
    """The model and its quantized form once more, in bf16: a quantized model keeps the dtype it was made in."""
    pipes = tiny.load(options.model, torch.bfloat16), tiny.load(options.model, torch.bfloat16)
    dq.quantize(pipes[1], options.recipe)
    return pipes


def summary(options, report: dq.Report, pipes, pictures, scenes) -> Table:
    """The table: original against quantized."""
    before, after = pictures
    table = Table("", "original", options.recipe, title=f"{options.model}, {PICTURES} prompts")
    sizes = report.bytes_before, report.bytes_after
    share = f"{sizes[1]:,} ({sizes[1] / sizes[0]:.2f}x)"
    table.add_row("denoiser parameter bytes (fp32)", f"{sizes[0]:,}", share)
    for label, pair in (("fp32", pipes), ("bf16", bf16_pair(options))):
        full, quantized = step_ms(pair, options.model)
        table.add_row(f"ms per step, 1 picture, {label}", f"{full:.1f}", f"{quantized:.1f}")
    decibels = psnr_db(after, before)
    table.add_row("PSNR to the original", "", f"{decibels.mean():.1f} dB (worst {decibels.min():.1f})")
    table.add_row("caption accuracy", *(f"{share:.0%}" for share in map(right, pictures, [scenes, scenes])))
    table.add_row("kernels (layers)", "torch, full precision", kernels(dq.explain(pipes[1])))
    return table


def psnr_db(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """-10 log10(mean squared error) of each picture, (N,) in dB, at most 100; pictures (N, 3, H, W) in [0, 1]."""
    return -10 * torch.log10((images.double() - reference.double()).square().flatten(1).mean(1).clamp_min(1e-10))


def right(images: torch.Tensor, scenes) -> float:
    """Share of pictures in which the recogniser finds every object of the caption."""
    found = tiny.load_recogniser().find(images)
    return sum(map(shows_all, found, scenes)) / len(scenes)


def kernels(report: dq.Report) -> str:
    """Which kernels serve how many layers, most used first; layers left alone last."""
    names = [row.kernel for row in report.layers if row.weight is not None]
    lines = [f"{name} ({names.count(name)})" for name in sorted(set(names), key=names.count, reverse=True)]
    kept = sum(row.weight is None for row in report.layers)
    return "\n".join([*lines, f"kept in full precision ({kept})"])


if __name__ == "__main__":
    main()
