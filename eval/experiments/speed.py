"""Milliseconds, on a machine that does nothing else: `python -m eval.experiments.speed [--layers] [--level avx2]`.

    (nothing)     a step of each embedded model and the linears of `dq bench` under int8  -> eval/results/speed.json
    --layers      one linear, 1 to 4096 rows, in every format of LAYERS                   -> eval/results/layers.json
    --pipelines   every recipe on the embedded models, a step                          -> eval/results/pipelines.json
    --peers       dq, torchao, SDNQ and OpenVINO on random models of real widths          -> eval/results/kernels.json
    --memory      the most memory a process holds that loads such a model and runs a step -> eval/results/kernels.json

What is compared runs in turn, and figures are medians. `--level` starts the command again, limited to those
instructions: dq's higher kernels hidden, torch limited to the same. Rows hold the level, the threads and the load
average at the start; with --layers, --pipelines and --peers what has a row of the running commit is not measured
again, unless the files of dq differ from it, so that a run that stopped goes on; `--again` does. Minutes on two idle
cores: 1, 8, 8, 20 (40 beside fp32) and 3.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import dq
from dq.bench import layers as bench
from dq.bench import levels
from eval.experiments import peers, rows, speed_layers, speed_pipelines
from pipelines import tiny

FILE = rows.FOLDER / "speed.json"
KEYS = ("what", "device", "dtype", "recipe", "machine", "level", "threads")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    options = arguments().parse_args()
    if options.level and os.environ.get(levels.VARIABLES[0]) != options.level:
        again = [sys.executable, "-m", "eval.experiments.speed", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **levels.environment(options.level)})
    torch.set_num_threads(options.threads)
    ways = {
        "peers": peers.speeds,
        "memory": peers.memory,
        "layers": speed_layers.run,
        "pipelines": speed_pipelines.run,
    }
    asked = [run for name, run in ways.items() if getattr(options, name)]
    for run in asked or [alone]:
        run(options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--level", default="", choices=["", *levels.LIMITS], help="instructions it is limited to")
    parser.add_argument("--recipes", nargs="+", default=[], help="only these; int8 without --layers or --pipelines")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="of full precision: both, with --peers or --level the faster one"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per row; with --peers per model")
    parser.add_argument("--layers", action="store_true", help="single linears in many formats")
    parser.add_argument("--pipelines", action="store_true", help="every recipe on the embedded models")
    parser.add_argument("--peers", action="store_true", help="next to torchao, SDNQ and OpenVINO")
    parser.add_argument("--memory", action="store_true", help="peak of a process, bf16 and W4A8")
    parser.add_argument("--models", nargs="+", help="of dq.widths, `linears` for the four shapes; or embedded ones")
    parser.add_argument("--contenders", nargs="+", default=[], help="with --peers: only these")
    parser.add_argument("--without", nargs="+", default=[], help="with --peers: all but these")
    parser.add_argument("--rounds", type=int, default=5, help="with --peers: at least")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds until a contender must be ready")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--peers-folder", default="", help="where `pip install --target` put the peers")
    parser.add_argument("--again", action="store_true", help="also what has a row of this commit")
    parser.add_argument("--out", type=Path, help="file of the rows in place of those above")
    return parser


def dtypes(options: argparse.Namespace) -> list[str]:
    """Those asked for; else fp32 and bf16, and the faster one of them where a level is asked for."""
    return options.dtypes or ([levels.base()] if options.level else list(DTYPES))


def alone(options: argparse.Namespace) -> None:
    """Rows of dq next to full precision."""
    stamp = rows.stamp(options.device) | rows.conditions(options.threads)
    for recipe in options.recipes or ["int8"]:
        for dtype in dtypes(options):
            timings = [step(name, recipe, options.device, DTYPES[dtype], options.seconds) for name in tiny.NAMES]
            timings += bench.linears(recipe, options.device, DTYPES[dtype], options.seconds)
            for timing in timings:
                figures = asdict(timing) | {"full_ms": round(timing.full_ms, 3)}
                figures |= {"quantized_ms": round(timing.quantized_ms, 3), "recipe": recipe}
                rows.add(options.out or FILE, figures | stamp, KEYS)
                print(f"{recipe} {dtype} {timing.what}: {timing.full_ms:.2f} -> {timing.quantized_ms:.2f} ms")


def step(name: str, recipe: str, device: str, dtype: torch.dtype, seconds: float) -> bench.Timing:
    """One denoising step of an embedded model on one picture, with guidance."""
    pipe = tiny.load(name, dtype).to(device)
    part = next(iter(dq.quantize(pipe, recipe, progress=False).layers)).name.partition(".")[0]
    timing = bench.denoiser(pipe, part, "a red circle", seconds, **tiny.CALL[name])
    return bench.Timing(**(vars(timing) | {"what": f"{name} step, 1 picture"}))


if __name__ == "__main__":
    main()
