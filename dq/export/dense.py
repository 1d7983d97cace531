"""Ordinary diffusers checkpoints in bf16: the full-precision weights that quantized layers stand for.

Smoothing, rotation, order and branch are folded into each weight, which is rounded to bf16 once; what reads the
folder needs nothing of dq. Activations are not rounded any more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dq.bridges.saving import SavedModel
from dq.disk import read_json
from dq.errors import DQError
from dq.host import saved

NAME = "diffusers-bf16"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST = 5 * 2**30  # bytes of a shard, in memory while it is written


def write(source: str | Path, out: str | Path) -> list[str]:
    """Write a saved quantized pipeline or denoiser in full precision, into an empty folder. DQError for others."""
    source, out = Path(source), Path(out)
    found = saved.plans(source)
    if not found:
        raise DQError(f"{str(source)!r} holds no quantized model; {saved.MAKE_ONE}")
    if (source / saved.BARE).is_file() or any(part.startswith("text_encoder") for part in found):
        raise DQError(f"{str(source)!r}: {NAME} writes denoisers of diffusers; dequantize others in Python, then save")
    models = {home.relative_to(source): SavedModel(home, plan) for home, plan in found.values()}
    if Path() not in models:
        left_out = {source / part for part in models}
        shutil.copytree(source, out, dirs_exist_ok=True, ignore=_but(left_out))
    for part, model in models.items():
        _write(model, out / part)
    return [
        f"{part if str(part) != '.' else 'model'}: {len(model.plan.layers)} layers in bf16"
        for part, model in models.items()
    ]


def _but(folders: set[Path]):
    """For copytree: everything but these folders."""
    return lambda at, names: [name for name in names if Path(at) / name in folders]


def _write(model: SavedModel, out: Path) -> None:
    """Shards of at most MOST bytes, and what `from_pretrained` needs to find them."""
    out.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    paths, size = [], 0

    def flush() -> None:
        paths.append((out / f".{len(paths)}.part", list(shards[-1])))
        save_file({name: value.contiguous() for name, value in shards[-1].items()}, paths[-1][0], {"format": "pt"})
        shards[-1].clear()

    for name in model.shapes:
        value = _dense(model, name)
        if size and size + value.nbytes > MOST:
            flush()
            size = 0
        shards[-1][name], size = value, size + value.nbytes
    flush()
    _name(out, paths)
    config = {key: value for key, value in read_json(model.home / saved.MODEL).items() if key != "quantization_config"}
    (out / saved.MODEL).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name(out: Path, paths: list[tuple[Path, list[str]]]) -> None:
    """Names of the shards as diffusers gives them, and its index where there are several."""
    if len(paths) == 1:
        paths[0][0].rename(out / WEIGHTS)
        return
    index: dict = {"metadata": {"total_size": sum(path.stat().st_size for path, _ in paths)}, "weight_map": {}}
    for number, (path, names) in enumerate(paths, 1):
        name = WEIGHTS.replace(".", f"-{number:05d}-of-{len(paths):05d}.")
        path.rename(out / name)
        index["weight_map"] |= dict.fromkeys(names, name)
    (out / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _dense(model: SavedModel, name: str) -> torch.Tensor:
    layer = name if name in model.plan.layers else name.removesuffix(".weight")
    if layer in model.plan.layers and (layer == name or name.endswith(".weight")):
        with model.layer(layer) as packed:
            return packed.dense_weight().to(torch.bfloat16)
    value = model.tensor(name)
    return value.to(torch.bfloat16) if value.is_floating_point() else value
