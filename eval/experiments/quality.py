"""How well recipes keep the pictures of the embedded models: `python -m eval.experiments.quality [--prompts 256]`.

Per row: quantize, save, load again, draw the held-out prompts, compare with the fp32 pictures of the same seeds. A row
with recipe `none` is the unquantized model in that dtype. Rows already there for the same weights and code are kept,
so that a stopped run goes on. docs/results/quality.md is made from eval/results/quality.json.
"""

import argparse
import tempfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import dq
from eval import intervals
from eval.experiments import rows, versions
from eval.metrics import caption_accuracy, psnr, trajectory_error
from eval.static import kernels_by_rank
from pipelines import tiny

FILE = rows.FOLDER / "quality.json"
KEYS = ("model", "recipe", "dtype", "prompts", "seed", "weights", "version")
HOME = Path(dq.__file__).parent
# (recipe, compute dtype): int8 also in bf16, with unquantized bf16 beside it to show what that dtype costs alone
ROWS = [("int8", "float32"), ("none", "bfloat16"), ("int8", "bfloat16")]
ROWS += [(name, "float32") for name in ("fp8", "int8-weight", "int4-weight", "nvfp4-weight", "mxfp4-weight")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES)
    parser.add_argument("--recipes", nargs="+", default=None, help="all by default")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    kernels_by_rank()
    todo = [(model, *row) for model in options.models for row in ROWS if row[0] in (options.recipes or [row[0]])]
    truth: dict[str, tuple] = {}
    for model, recipe, dtype in tqdm(todo, desc="rows"):
        row = {"model": model, "recipe": recipe, "dtype": dtype, "prompts": options.prompts, "seed": options.seed}
        row |= {"weights": fingerprint(model), "version": version()}
        if any(all(old.get(key) == row[key] for key in KEYS) for old in rows.read(FILE)):
            continue
        if model not in truth:
            truth = {model: draw(tiny.load(model), model, options)}
        row |= measure(row, truth[model], options) | rows.stamp()
        rows.add(FILE, row, ("model", "recipe", "dtype"))
        tqdm.write(f"{model} {recipe} {dtype}: {row['psnr_db']:.1f} dB, accuracy {row['caption_accuracy']:.3f}")


def measure(row: dict, truth: tuple, options) -> dict:
    """The figures of one row; `truth` is what `draw` gave for the fp32 model."""
    pipe = tiny.load(row["model"], getattr(torch, row["dtype"]))
    figures = {"kernels": {}, "bytes_share": None}
    if row["recipe"] != "none":
        dq.quantize(pipe, row["recipe"], progress=False)
        pipe, saved_bytes = reload(pipe)
        figures = {"kernels": kernels(pipe), "saved_bytes": saved_bytes, "fp32_bytes": fp32_bytes(row["model"])}
        figures["bytes_share"] = round(saved_bytes / figures["fp32_bytes"], 4)
    images, latents = draw(pipe, row["model"], options)
    captions, scenes = zip(*tiny.prompts(options.prompts, seed=options.seed), strict=True)
    figures |= decibels(images, truth[0], captions) | trajectory_error.score(latents, truth[1])
    figures["caption_accuracy"] = caption_accuracy.score(images, scenes)["caption_accuracy"]
    figures["caption_accuracy_fp32"] = caption_accuracy.score(truth[0], scenes)["caption_accuracy"]
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}


def decibels(images: torch.Tensor, truth: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Mean and worst PSNR of pictures (N, 3, H, W), and the 95 % interval of the mean over their prompts."""
    found = intervals.of_mean(psnr.per_item(images, truth), captions)
    ends = {} if found is None else dict(zip(("psnr_db_low", "psnr_db_high"), found, strict=True))
    return psnr.score(images, truth) | ends


def draw(pipe, name: str, options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures (N, 3, 64, 64) and latents after every step, N as one batch a call, seeds by prompt number."""
    captions = [caption for caption, _ in tiny.prompts(options.prompts, seed=options.seed)]
    pipe.set_progress_bar_config(desc=f"{name}", leave=False)
    with trajectory_error.record(pipe) as latents:
        images = tiny.pictures(pipe, name, captions, options.seed, batch=options.prompts)
    return images, latents


def reload(pipe) -> tuple:
    """The pipeline saved and loaded again, and the bytes of its denoiser's weight files."""
    part = denoiser(pipe)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        size = sum(path.stat().st_size for path in (Path(folder) / part).glob("*.safetensors"))
        loaded = type(pipe).from_pretrained(folder, dtype=getattr(pipe, part).dtype)
    return loaded, size


def denoiser(pipe) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def fp32_bytes(name: str) -> int:
    """Bytes of the denoiser's parameters in fp32."""
    pipe = tiny.load(name)
    return 4 * sum(p.numel() for p in getattr(pipe, denoiser(pipe)).parameters())


def fingerprint(name: str) -> str:
    """crc32 of the denoiser's weight files, of a student's LoRA: rows of older weights are measured again."""
    folders = [tiny.folder(name) / part for part in ("transformer", "unet", "")]
    paths = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in paths)):08x}"


@cache
def version() -> str:
    """Changes with the code that decides what a data-free recipe makes of a model: formats, planning, kernels."""
    roots = [HOME / "planning.py", HOME / "cookbook.py", *(HOME / "kernels").rglob("*.py")]
    roots += [path for room in ("formats", "families") for path in (HOME / room).glob("*.py")]
    native = [path for kind in ("*.cpp", "*.h") for path in (HOME / "kernels").rglob(kind)]
    return versions.crc(versions.code(roots) + versions.native(native))


def kernels(pipe) -> dict[str, int]:
    """How many layers each kernel serves."""
    names = [row.kernel for row in dq.explain(pipe).layers if row.weight is not None]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
