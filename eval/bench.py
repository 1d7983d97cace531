"""Milliseconds per step and per layer, quantized and full precision in turn: `python -m eval.bench [--device cpu]`.

Writes eval/results/speed.json, a row per embedded model and linear shape. Run it on a machine that does nothing else:
the load average at the start is written into each row.
"""

import argparse
import os

import torch

import dq
from dq import bench
from eval import rows
from pipelines import tiny

FILE = rows.FOLDER / "speed.json"
KEYS = ("what", "device", "dtype", "recipe", "machine")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", default=["int8"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    options = parser.parse_args()
    load, stamp = round(os.getloadavg()[0], 2), rows.stamp()
    if options.device == "cuda":
        stamp["machine"] = torch.cuda.get_device_name()
    for recipe in options.recipes:
        for dtype in options.dtypes:
            timings = [step(name, recipe, options.device, DTYPES[dtype], options.seconds) for name in tiny.NAMES]
            timings += bench.linears(recipe, options.device, DTYPES[dtype], options.seconds)
            for timing in timings:
                figures = vars(timing) | {"full_ms": round(timing.full_ms, 3)}
                figures |= {"quantized_ms": round(timing.quantized_ms, 3), "recipe": recipe, "load": load}
                rows.add(FILE, figures | stamp, KEYS)
                print(f"{recipe} {dtype} {timing.what}: {timing.full_ms:.2f} -> {timing.quantized_ms:.2f} ms")


def step(name: str, recipe: str, device: str, dtype: torch.dtype, seconds: float) -> bench.Timing:
    """One denoising step of an embedded model on one picture, with guidance."""
    pipe = tiny.load(name, dtype).to(device)
    part = next(iter(dq.quantize(pipe, recipe, progress=False).layers)).name.partition(".")[0]
    timing = bench.denoiser(pipe, part, "a red circle", seconds, **tiny.CALL[name])
    return bench.Timing(**(vars(timing) | {"what": f"{name} step, 1 picture"}))


if __name__ == "__main__":
    main()
