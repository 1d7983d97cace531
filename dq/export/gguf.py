"""GGUF files of denoisers, as ComfyUI-GGUF, stable-diffusion.cpp and diffusers load them.

    Q4_0, Q5_0, Q8_0   q · d                    symmetric integers, and affine ones whose code − zero fits
    Q4_1, Q5_1         q · d + m                integers above a smallest value
    BF16, F16, F32     what dq kept; convolutions, which no loader takes in blocks

A block of 32 takes over the codes of a layer whose groups are 32, 64, ... columns or whole rows: the same scale, in
16 bits, in each of their blocks. All else (smoothing, rotation, order, branch, floating-point and table formats) is
folded into the full-precision weight the layer stands for, which is rounded anew to Q8_0. Rounding of activations,
scales of steps and stored outputs of a start token have no place there and are left: those layers run in 16 bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dq.bridges import gguf, layouts
from dq.bridges.saving import SavedModel
from dq.errors import DQError
from dq.formats.integer import Integer
from dq.formats.micro import Micro
from dq.formats.offset import Offset
from dq.host import saved
from dq.plan import LayerPlan, Recipe

NAME = "gguf"
BLOCK = 32
LONGEST = 127  # bytes of a tensor's name in ComfyUI-GGUF and stable-diffusion.cpp
FILES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHOICES = (
    "int8/channel",
    "int5/group:32",
    "int4/group:32",
)  # weights of a recipe that this target holds by their codes
LEAST_NORMAL = 2.0**-14  # of 16 bits: below it a scale loses digits


def restrict(recipe: Recipe) -> Recipe:
    """The recipe with what this target holds alone: weight-only integers. DQError for one that has nothing of it."""
    fits = recipe.linear[0].split("/")[0] in ("int8", "int5", "int4") and recipe.options.get("rank", 0) == 0
    if not fits or (recipe.needs_calibration and recipe.linear[1] is not None):
        raise DQError(f"--for {NAME}: recipe {recipe.name!r} has more than weights; int8-weight and int4-weight fit")
    name, _, grain = recipe.linear[0].partition("/")
    weight = f"{name}/group:{BLOCK}" if grain.startswith("group") else recipe.linear[0]
    options = dict(recipe.options) | ({} if recipe.needs_calibration else {"choices": CHOICES})
    return replace(recipe, linear=(weight, None), conv=(recipe.conv[0], None), attention="", options=options)


def write(source: str | Path, out: str | Path) -> list[str]:
    """Write each denoiser of a saved quantized pipeline, or the lone one, as NAME.gguf into an empty folder.

    -> lines for people: what was kept and what was rounded anew. DQError, before anything is written, for models
    without a layout.
    """
    source, out = Path(source), Path(out)
    found = saved.plans(source)
    if not found:
        raise DQError(f"{str(source)!r} holds no quantized model; {saved.MAKE_ONE}")
    jobs = {}
    for part, (home, plan) in found.items():
        if part.startswith("text_encoder"):
            continue
        model = SavedModel(home, plan)
        jobs[part or "model"] = (model, _layout(part, model))
    if not jobs:
        raise DQError(f"{str(source)!r} has no quantized denoiser; text encoders are not written as {NAME}")
    return [line for part, job in jobs.items() for line in _write(part, job[0], job[1], out / f"{part}.gguf")]


def _layout(part: str, model: SavedModel) -> layouts.Layout:
    layout = layouts.required(model.config, part or "the model", NAME)
    stacks = [name for name, layer in model.plan.layers.items() if layer.kind == "stack"]
    if stacks:
        raise DQError(f"layer {stacks[0]!r} holds stacked experts, which {NAME} files have no name for")
    return layout


@dataclass(frozen=True)
class _Job:
    """One tensor of the file: the tensors of the model it joins, and its type there."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    halves: bool


def _write(part: str, model: SavedModel, layout: layouts.Layout, path: Path) -> list[str]:
    library = gguf.library()
    jobs = _jobs(model, layout)
    writer = library.GGUFWriter(None, layout.arch)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_string(gguf.CONFIG, json.dumps(model.config))
    writer.add_string("dq.recipe", model.plan.recipe)
    for name, job in jobs.items():
        kind = library.GGMLQuantizationType[job.kind]
        width, size = library.GGML_QUANT_SIZES[kind]
        count = int(np.prod(job.shape)) // width * size
        as_bytes = job.kind in FILES or job.kind == "BF16"
        shape = (*job.shape[:-1], job.shape[-1] // width * size) if as_bytes else job.shape
        dtype = np.dtype(np.uint8) if as_bytes else np.dtype(gguf.PLAIN[job.kind])
        writer.add_tensor_info(name, shape, dtype, count, raw_dtype=kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    tally = _Tally()
    for job in jobs.values():
        writer.write_tensor_data(_data(model, job, tally))
    writer.close()
    readers = f"; read by {layout.readers}, diffusers and dq" if layout.readers else "; read by dq alone"
    return [f"{part}.gguf: architecture {layout.arch}{readers}", *tally.lines()]


class _Tally:
    """What became of the layers: weights that kept their codes, and signal and noise of those rounded anew."""

    def __init__(self):
        self.kept = self.anew = 0
        self.signal = self.noise = 0.0

    def lines(self) -> list[str]:
        if not self.anew:
            return [f"{self.kept} layers with the codes they have"]
        loss = 10 * np.log10(self.signal / self.noise) if self.noise else np.inf
        what = f"{self.anew} folded and rounded anew to Q8_0 ({loss:.1f} dB)"
        return [f"{self.kept} layers with the codes they have, {what}"]


def _jobs(model: SavedModel, layout: layouts.Layout) -> dict[str, _Job]:
    """The tensors of the file by name. DQError for names that others cannot read."""
    found = {}
    for file, (names, halves) in layout.joined(model.shapes, model.config).items():
        if len(file.encode()) > LONGEST:
            raise DQError(f"tensor {file!r} has a name of more than {LONGEST} bytes, which others cannot read")
        shape = (
            (sum(model.shapes[name][0] for name in names), *model.shapes[names[0]][1:])
            if model.shapes[names[0]]
            else (1,)
        )
        found[file] = _Job(tuple(names), shape, _kind(model, names, shape), halves)
    return found


def _kind(model: SavedModel, names: list[str], shape: tuple[int, ...]) -> str:
    """The type of a tensor: the widest of those its parts ask for."""
    plans = [model.planned(name) for name in names]
    if len(shape) < 2:
        return "F32"
    if None in plans or len(shape) > 2 or shape[-1] % BLOCK:
        if len(shape) > 2:
            return "F16"
        own = [
            model.plan.dtype if plan is not None else model.tensor(name).dtype
            for name, plan in zip(names, plans, strict=True)
        ]
        return KINDS[own[0]] if len(set(own)) == 1 and own[0] in KINDS and _is_linear(model, names[0]) else "F32"
    kinds = {_form(model, name.removesuffix(".weight"), plan) for name, plan in zip(names, plans, strict=True) if plan}
    return kinds.pop() if len(kinds) == 1 else "Q8_0"


def _is_linear(model: SavedModel, name: str) -> bool:
    """Whether loaders decode a tensor when it is used, as those of linears."""
    home, _, key = name.rpartition(".")
    return key == "weight" and isinstance(model.model.get_submodule(home), torch.nn.Linear)


def _form(model: SavedModel, name: str, plan: LayerPlan) -> str:
    """The block type that holds a layer's codes; Q8_0, rounded anew, where none does."""
    if not _by_blocks(plan):
        return "Q8_0"
    spec = plan.weight.spec
    if isinstance(spec, Offset):
        return "Q4_1" if spec.bits <= 4 else "Q5_1"
    if not isinstance(spec, Integer):
        return "Q8_0"
    bits = spec.bits
    if spec.affine:
        zero = model.tensor(f"{name}.zero")
        bits += 0 if bool(((zero == 0) | (zero == -1)).all()) else 1
    return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"


def _by_blocks(plan: LayerPlan) -> bool:
    """Whether a layer is its codes times a scale for each block, so that a block type may hold them."""
    if plan.smooth or plan.rotate or plan.permute or plan.rank or plan.splits or plan.kind != "linear":
        return False
    spec, grain = plan.weight.spec, plan.weight.grain
    fits = isinstance(spec, Integer | Offset) or (isinstance(spec, Micro) and spec.name == "mxfp4")
    return fits and (grain.size or BLOCK) % BLOCK == 0 and plan.columns % BLOCK == 0 and spec.bits + spec.affine <= 8


def _data(model: SavedModel, job: _Job, tally: _Tally) -> np.ndarray:
    """The bytes or values of a tensor of the file."""
    parts = [_part(model, name, job, tally) for name in job.names]
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return np.concatenate(np.split(whole, 2)[::-1]) if job.halves else whole


def _part(model: SavedModel, name: str, job: _Job, tally: _Tally) -> np.ndarray:
    plan = model.planned(name)
    if plan is None:
        return _plain(model.tensor(name), job.kind)
    with model.layer(name.removesuffix(".weight")) as layer:
        if job.kind not in FILES:
            return _plain(layer.dense_weight(), job.kind)
        blocks = _blocks(layer, plan, job.kind) if _by_blocks(plan) else None
        if blocks is not None:
            tally.kept += 1
            return blocks
        weight = layer.dense_weight()
    return _anew(weight, job.kind, tally)


def _anew(weight: torch.Tensor, kind: str, tally: _Tally) -> np.ndarray:
    """A weight rounded by the library."""
    library = gguf.library()
    made = library.quants.quantize(weight.numpy(), library.GGMLQuantizationType[kind])
    back = torch.from_numpy(library.quants.dequantize(made, library.GGMLQuantizationType[kind]))
    tally.anew += 1
    tally.signal += float(weight.square().sum())
    tally.noise += float((weight - back).square().sum())
    return made


def _plain(values: torch.Tensor, kind: str) -> np.ndarray:
    values = values.detach().reshape(1) if values.dim() == 0 else values.detach()
    if kind == "BF16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind == "F16" and not values.half().isfinite().all():
        raise DQError(f"a weight has values of {float(values.abs().max()):.3g}, more than 16 bits hold there")
    return values.float().numpy().astype(gguf.PLAIN[kind])


def _blocks(layer, plan: LayerPlan, kind: str) -> np.ndarray | None:
    """The layer's own codes in blocks, uint8 (rows, bytes); None where 16 bits do not hold its scales."""
    spec, columns = plan.weight.spec, plan.columns
    values = spec.values_of(spec.unpack(layer.stored, columns)).to(
        torch.int32 if isinstance(spec, Integer) else torch.float32
    )
    count, size = columns // BLOCK, plan.weight.grain.size or columns
    scale = spec.step(layer.scale, layer.scale_global)

    def each(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(plan.rows, -1).repeat_interleave(size // BLOCK, 1)[:, :count] if size >= BLOCK else tensor

    if isinstance(spec, Micro):
        values, scale = (2 * values).to(torch.int32), scale / 2
    if spec.affine:
        values = values - each(layer.zero).repeat_interleave(BLOCK, 1)
        turned = each(layer.zero).eq(-1)
    step = each(scale).contiguous()
    if isinstance(spec, Offset):
        return _with_least(values, step, each(layer.zero), kind)
    if spec.affine and kind in ("Q4_0", "Q5_0") and spec.bits == int(kind[1]):
        values = torch.where(turned.repeat_interleave(BLOCK, 1), -values, values)
        step = torch.where(turned, -step, step)
    return _around_zero(values, step, kind)


def _halves(step: torch.Tensor) -> np.ndarray | None:
    """Scales in 16 bits, uint8 (blocks, 2); None where they lose digits. What is as good as 0 is 0."""
    flat = step.reshape(-1, 1)
    size = flat.abs()
    if bool((size > torch.finfo(torch.float16).max).any()) or bool(((size < LEAST_NORMAL) & (size > 1e-11)).any()):
        exact = flat.half().float() == flat
        if not bool(exact[(size < LEAST_NORMAL) | (size > torch.finfo(torch.float16).max)].all()):
            return None
    return flat.half().numpy().view(np.uint8)


def _around_zero(values: torch.Tensor, step: torch.Tensor, kind: str) -> np.ndarray | None:
    scales = _halves(step)
    if scales is None:
        return None
    rows, codes = len(values), values.reshape(-1, BLOCK)
    if kind == "Q8_0":
        return np.concatenate([scales, codes.to(torch.int8).numpy().view(np.uint8)], 1).reshape(rows, -1)
    half = 8 if kind == "Q4_0" else 16
    return np.concatenate([scales, *_packed((codes + half).to(torch.uint8), kind)], 1).reshape(rows, -1)


def _with_least(values: torch.Tensor, step: torch.Tensor, least: torch.Tensor, kind: str) -> np.ndarray | None:
    """Q4_1 and Q5_1; of Q8_0, where parts of another format are joined, None."""
    scales, minima = _halves(step), least.reshape(-1, 1).half()
    if scales is None or not minima.isfinite().all() or kind == "Q8_0":
        return None
    codes = values.reshape(-1, BLOCK).to(torch.uint8)
    made = [scales, minima.numpy().view(np.uint8), *_packed(codes, kind)]
    return np.concatenate(made, 1).reshape(len(values), -1)


def _packed(codes: torch.Tensor, kind: str) -> list[np.ndarray]:
    """Codes uint8 (blocks, 32) of 4 or 5 bits -> fifth bits (blocks, 4) of the latter, nibbles (blocks, 16)."""
    found = codes.numpy()
    nibbles = (found[:, :16] & 15) | ((found[:, 16:] & 15) << 4)
    if kind.startswith("Q4"):
        return [nibbles]
    return [np.packbits(found >> 4, axis=1, bitorder="little"), nibbles]
