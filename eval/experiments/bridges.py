"""GGUF files of others through dq, and beside diffusers' own loader: `python -m eval.experiments.bridges`.

`--convert GIB` writes a GGUF file of random blocks in FLUX's names at FLUX's width (Q8_0), takes it in by `stored` in
a process of its own, saves it, and records seconds and the most memory that the process held. `--step` runs one double
and one single block of FLUX's width on 64 + 16 tokens, loaded by diffusers' GGUF loader and by dq from one file: in
turns, medians of the processor's milliseconds (one thread; others' load does not count), bytes of the parameters, and
how far the outputs are apart. Rows go to eval/results/bridges.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

import dq
from dq.bridges import layouts, loading
from dq.layers import parameter_bytes
from dq.layers.memory import peak_bytes
from eval.experiments import rows

FILE = rows.FOLDER / "bridges.json"
KEYS = ("kind", "type", "loaded as", "gib", "machine", "threads")
CONFIG = {
    "patch_size": 1, "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
DOUBLE, SINGLE = 339_738_624, 141_557_760  # weights of a block
TILE = 2**22  # bytes of random blocks, repeated
TOKENS, TEXT, SIDE = 64, 16, 8
HALVES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2)}  # bytes of a block at which a 16-bit number stands
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--convert", type=float, metavar="GIB", help="size of the file")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--types", nargs="+", default=list(HALVES), choices=HALVES)
    parser.add_argument("--folder", help="where files are written; a temporary folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(json.loads(options.child))
        return
    with TemporaryDirectory(dir=options.folder) as folder:
        if options.convert:
            convert(Path(folder), options.convert)
        for kind in options.types if options.step else ():
            step(Path(folder), kind)


def write(path: Path, config: dict, kind: str) -> None:
    """A GGUF file of random blocks in FLUX's own names; vectors are small random numbers."""
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layout = layouts.of("FluxTransformer2DModel", config)
    code = gguf.GGMLQuantizationType[kind]
    width, size = gguf.GGML_QUANT_SIZES[code]
    writer, found = gguf.GGUFWriter(None, layout.arch), {}
    for name, (names, _) in layout.joined(shapes, config).items():
        shape = (sum(shapes[each][0] for each in names), *shapes[names[0]][1:])
        blocks = len(shape) == 2 and shape[1] % width == 0
        found[name] = (shape, blocks)
        stored = (shape[0], shape[1] // width * size) if blocks else shape
        dtype, raw = (np.dtype(np.uint8), code) if blocks else (np.dtype(np.float32), gguf.GGMLQuantizationType.F32)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=raw)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    tile = _tile(kind, size)
    for shape, blocks in found.values():
        count = int(np.prod(shape)) // width * size
        values = np.resize(tile, count) if blocks else _vector(shape)
        writer.write_tensor_data(values)
    writer.close()


def _tile(kind: str, size: int) -> np.ndarray:
    """Random blocks with scales under which a layer keeps the size of its input."""
    dice = np.random.default_rng(0)
    raw = dice.integers(0, 256, (TILE // size, size), dtype=np.uint8)
    most = {"Q8_0": 3e-4, "Q4_0": 4e-3, "Q4_K": 1e-4}[kind]
    for place, at in enumerate(HALVES[kind]):
        least = most / 2 if place == 0 else most * 6
        values = dice.uniform(least, 2 * least, (len(raw), 1))
        raw[:, at : at + 2] = values.astype(np.float16).view(np.uint8)
    return raw.reshape(-1)


def _vector(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.02, shape).astype(np.float32) + (len(shape) == 1 and shape[0] == 128)


def convert(folder: Path, gib: float) -> None:
    blocks = max(1, round(gib * 2**30 * 32 / 34 / (DOUBLE + 2 * SINGLE)))
    config = {**CONFIG, "num_layers": blocks, "num_single_layers": 2 * blocks}
    path = folder / "flux.gguf"
    write(path, config, "Q8_0")
    for recipe in ("stored",):
        row = {"kind": "convert", "type": "Q8_0", "loaded as": recipe, "gib": round(path.stat().st_size / 2**30, 2)}
        _run(row | {"file": str(path), "config": config, "out": str(folder / "out")})
        shutil.rmtree(folder / "out")


def step(folder: Path, kind: str) -> None:
    config = {**CONFIG, "num_layers": 1, "num_single_layers": 1, "_class_name": "FluxTransformer2DModel"}
    path = folder / f"{kind}.gguf"
    write(path, config, kind)
    row = {"kind": "step", "type": kind, "gib": round(path.stat().st_size / 2**30, 2)}
    _run(row | {"file": str(path), "config": config})


def _run(job: dict) -> None:
    """A process of its own for each job: its memory is that of nobody else."""
    words = [sys.executable, "-m", "eval.experiments.bridges", "--child", json.dumps(job)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    shown = ("file", "config", "out")
    base = {key: value for key, value in job.items() if key not in shown}
    for found in json.loads(done.stdout.splitlines()[-1]):
        row = base | found | rows.conditions(torch.get_num_threads()) | rows.stamp(packages=("gguf",))
        rows.add(FILE, row, KEYS)
        print({key: value for key, value in row.items() if key != "versions"}, flush=True)


def _child(job: dict) -> None:
    found = _converted(job) if job["kind"] == "convert" else _steps(job)
    print(json.dumps(found))


def _converted(job: dict) -> list[dict]:
    before, start = peak_bytes() or 0, time.perf_counter()
    config = {**job["config"], "_class_name": "FluxTransformer2DModel"}
    model = dq.from_file(job["file"], job["loaded as"], config=config, dtype="bfloat16", progress=False)
    read, reading = time.perf_counter() - start, peak_bytes() or 0
    dq.save(model, job["out"])
    gib = {
        "result_gib": parameter_bytes(model),
        "imports_gib": before,
        "peak_gib": reading,
        "saved_gib": peak_bytes() or 0,
    }
    sizes = [value.numel() * 2 for value in loading.empty(loading.opened(job["file"]), config)[0].parameters()]
    largest = {"largest_layer_gib": round(max(sizes) / 2**30, 3)}
    times = {"read_s": round(read, 1), "all_s": round(time.perf_counter() - start, 1)}
    return [{key: round(value / 2**30, 2) for key, value in gib.items()} | largest | times]


def _steps(job: dict) -> list[dict]:
    """diffusers and dq on one file, in turns."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(job["config"]))
        given = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
        entered = {
            "diffusers": FluxTransformer2DModel.from_single_file(
                job["file"], config=folder, quantization_config=given, dtype=torch.bfloat16
            )
        }
    for recipe in ("stored", "stored-int8"):
        entered[f"dq {recipe}"] = dq.from_file(
            job["file"], recipe, config=job["config"], dtype="bfloat16", progress=False
        )
    outputs, times = {name: _call(model) for name, model in entered.items()}, {name: [] for name in entered}
    for _ in range(ROUNDS):
        for name, model in entered.items():
            start = time.process_time()
            _call(model)
            times[name].append(1000 * (time.process_time() - start))
    return [
        {
            "loaded as": name,
            "cpu_ms": round(statistics.median(times[name])),
            "weights_gib": round(parameter_bytes(model) / 2**30, 2),
            "db_from_diffusers": None
            if name == "diffusers"
            else round(_decibels(outputs["diffusers"], outputs[name]), 1),
        }
        for name, model in entered.items()
    ]


@torch.no_grad()
def _call(model) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    kind = torch.bfloat16
    side = torch.arange(SIDE)
    places = torch.stack([torch.zeros(SIDE, SIDE), *torch.meshgrid(side, side, indexing="ij")], -1).reshape(-1, 3)
    return model(
        hidden_states=torch.randn(1, TOKENS, 64, generator=dice).to(kind),
        encoder_hidden_states=torch.randn(1, TEXT, 4096, generator=dice).to(kind),
        pooled_projections=torch.randn(1, 768, generator=dice).to(kind),
        timestep=torch.tensor([0.5], dtype=kind),
        guidance=torch.tensor([3.5], dtype=kind),
        img_ids=places,
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )[0].float()


def _decibels(truth: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(truth.square().mean() / (truth - other).square().mean()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
