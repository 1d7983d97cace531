"""Milliseconds, on a machine that does nothing else: `python -m eval.experiments.speed [--peers | --memory]`.

Without either, a step of each embedded model and the linears of `dq bench`, quantized and full precision in turn: rows
of eval/results/speed.json. `--peers`: dq, torchao and SDNQ on random models of real widths; `--memory`: the most
memory a process holds that loads such a model and runs a step; both write
eval/results/kernels.json, see `eval.experiments.peers`.
The load average at the start is written into each row.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch

import dq
from dq.bench import layers as bench
from eval.experiments import peers, rows
from pipelines import tiny

FILE = rows.FOLDER / "speed.json"
KEYS = ("what", "device", "dtype", "recipe", "machine")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    options = arguments().parse_args()
    if options.peers:
        peers.speeds(options)
    if options.memory:
        peers.memory(options)
    if not (options.peers or options.memory):
        alone(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", default=["int8"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row; with --peers per model")
    parser.add_argument("--peers", action="store_true", help="next to torchao and SDNQ")
    parser.add_argument("--memory", action="store_true", help="peak of a process, bf16 and W4A8")
    parser.add_argument("--models", nargs="+", help="of dq.widths; `linears` for the four shapes")
    parser.add_argument("--contenders", nargs="+", default=[], help="with --peers: only these")
    parser.add_argument("--without", nargs="+", default=[], help="with --peers: all but these")
    parser.add_argument("--rounds", type=int, default=5, help="with --peers: at least")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds until a contender must be ready")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process of --peers")
    parser.add_argument("--peers-folder", default="", help="where `pip install --target` put the peers")
    parser.add_argument("--again", action="store_true", help="also what has a row of this commit")
    parser.add_argument("--out", type=Path, default=peers.FILE, help="file of the rows of --peers and --memory")
    return parser


def alone(options: argparse.Namespace) -> None:
    """Rows of dq next to full precision."""
    load, stamp = round(os.getloadavg()[0], 2), rows.stamp(options.device)
    for recipe in options.recipes:
        for dtype in options.dtypes:
            timings = [step(name, recipe, options.device, DTYPES[dtype], options.seconds) for name in tiny.NAMES]
            timings += bench.linears(recipe, options.device, DTYPES[dtype], options.seconds)
            for timing in timings:
                figures = asdict(timing) | {"full_ms": round(timing.full_ms, 3)}
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
