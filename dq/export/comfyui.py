"""Quantized safetensors as ComfyUI loads them: fp8 with a scale a tensor, int8 with a scale a row, ConvRot.

    float8_e4m3fn     X.weight e4m3, X.weight_scale fp32 ()            fp8/tensor, or fp8/channel of equal scales
    int8_tensorwise   X.weight int8, X.weight_scale fp32 (out, 1)      int8/channel; convrot: rotate a power of 4

with X.comfy_quant (JSON as bytes) beside each, and the same in the metadata `_quantization_metadata`. Names are the
authors' (`dq.bridges.layouts`); what they join must have one format. A layer of any other format, or with
smoothing, a branch or splits, is folded into the full-precision weight it stands for and written in 16 bits.
https://github.com/Comfy-Org/ComfyUI/blob/master/QUANTIZATION.md
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dq.bridges import layouts
from dq.bridges.safe import METADATA, is_regular
from dq.bridges.saving import SavedModel
from dq.errors import DQError
from dq.host import saved
from dq.plan import LayerPlan, Recipe

NAME = "comfyui"
FP8, INT8 = "float8_e4m3fn", "int8_tensorwise"


def restrict(recipe: Recipe) -> Recipe:
    """The recipe with what this target holds by its codes: fp8 and int8 weights. DQError for one without them."""
    form = recipe.linear[0].split("/")[0]
    if form not in ("fp8", "int8") or recipe.needs_calibration:
        raise DQError(
            f"--for {NAME}: recipe {recipe.name!r} has weights that ComfyUI has not; fp8 and int8-weight fit"
        )
    weight = "fp8/tensor" if form == "fp8" else "int8/channel"
    return replace(recipe, linear=(weight, None), modulation=weight, edge=weight, attention="")


def write(source: str | Path, out: str | Path) -> list[str]:
    """Write each denoiser of a saved quantized pipeline, or the lone one, as NAME.safetensors into an empty folder.

    -> lines for people. DQError, before anything is written, for models without a layout.
    """
    source, out = Path(source), Path(out)
    found = saved.plans(source)
    if not found:
        raise DQError(f"{str(source)!r} holds no quantized model; {saved.MAKE_ONE}")
    jobs = {part or "model": SavedModel(*job) for part, job in found.items() if not part.startswith("text_encoder")}
    if not jobs:
        raise DQError(f"{str(source)!r} has no quantized denoiser; text encoders are not written for {NAME}")
    named = {part: layouts.required(model.config, part, NAME) for part, model in jobs.items()}
    return [line for part, model in jobs.items() for line in _write(part, model, named[part], out)]


def _write(part: str, model: SavedModel, layout: layouts.Layout, out: Path) -> list[str]:
    state: dict[str, torch.Tensor] = {}
    marks: dict[str, dict[str, Any]] = {}
    folded = anew = 0
    for file, (names, halves) in layout.joined(model.shapes, model.config).items():
        plans = [model.planned(name) for name in names]
        mark = _mark(plans)
        if mark is None:
            folded += sum(plan is not None for plan in plans)
            state[file] = _whole([_dense(model, name) for name in names], halves)
            continue
        home = file.removesuffix(".weight")
        parts = [_codes(model, name) for name in names]
        codes, scale = (_whole([each[key] for each in parts], halves) for key in (0, 1))
        if mark["format"] == FP8 and not bool((scale == scale[0]).all()):  # joined, or a scale a row: one for all
            codes, scale = _one_scale(codes, scale)
            anew += 1
        state[file], marks[home] = codes, mark
        state[f"{home}.weight_scale"] = scale[0, 0].clone() if mark["format"] == FP8 else scale
        state[f"{home}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    told = {"format_version": "1.0", "layers": marks}
    metadata = {METADATA: json.dumps(told), "dq.config": json.dumps(model.config), "format": "pt"}
    save_file(
        {name: value.contiguous() for name, value in sorted(state.items())}, out / f"{part}.safetensors", metadata
    )
    lines = [f"{part}.safetensors: {len(marks)} quantized tensors"]
    lines += [f"{anew} joined of several fp8 scales and rounded anew to one"] if anew else []
    return [*lines, f"{folded} layers folded and written in 16 bits"] if folded else lines


def _mark(plans: list[LayerPlan | None]) -> dict[str, Any] | None:
    """What a tensor is of ComfyUI's formats, None for full precision."""
    found = {json.dumps(_own_mark(plan)) for plan in plans}
    return json.loads(found.pop()) if len(found) == 1 else None


def _own_mark(plan: LayerPlan | None) -> dict[str, Any] | None:
    if plan is None or plan.kind != "linear" or plan.smooth or plan.permute or plan.rank or plan.splits:
        return None
    weight = str(plan.weight)
    if weight in ("fp8/tensor", "fp8/channel") and not plan.rotate:
        return {"format": FP8}
    if weight not in ("int8/channel", "int8/tensor") or (plan.rotate and not is_regular(plan.rotate)):
        return None
    return {"format": INT8} | ({"convrot": True, "convrot_groupsize": plan.rotate} if plan.rotate else {})


def _codes(model: SavedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """-> codes in their dtype, fp32 scales (rows, 1)."""
    with model.layer(name.removesuffix(".weight")) as layer:
        kind = torch.int8 if layer.plan.weight.format == "int8" else torch.float8_e4m3fn
        scale = layer.scale.data.expand(layer.plan.rows, 1).clone()
        return layer.stored.data.clone().view(kind), scale


def _one_scale(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes with a scale a row, rounded anew to one scale: a power of two apart they stay as they are."""
    values = codes.float() * scale
    whole = values.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (values / whole).to(torch.float8_e4m3fn), whole.reshape(1, 1)


def _dense(model: SavedModel, name: str) -> torch.Tensor:
    """A tensor in full precision; of a quantized layer the one it stands for, in the compute dtype."""
    plan = model.planned(name)
    if plan is None:
        return model.tensor(name)
    with model.layer(name.removesuffix(".weight")) as layer:
        return layer.dense_weight().to(model.plan.dtype)


def _whole(parts: list[torch.Tensor], halves: bool) -> torch.Tensor:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.cat(whole.chunk(2)[::-1]) if halves and len(whole) > 1 else whole
