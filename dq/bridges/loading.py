"""A denoiser out of one file: GGUF, safetensors, ComfyUI's quantized safetensors. Weights are read one at a time.

The model is made empty; then each weight is decoded, rounded and put in its place, or its codes are taken as they are,
and its part of the file leaves memory again: the peak is one layer above the result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from tqdm import tqdm

from dq import cookbook, explaining, planning
from dq.bridges import gguf, naming, nunchaku, safe
from dq.bridges.stored import Stored, joined
from dq.disk import parse, read_json
from dq.errors import DQError
from dq.host import mark, saved
from dq.layers import PACKED, packed_layers, parameter_bytes
from dq.layers import naming as paths
from dq.model import aliases, check_fit, kept_in_fp32, pack_one, put
from dq.plan import Keeping, LayerPlan, Plan, Recipe, compute_dtype
from dq.report import Report

File = gguf.File | safe.File | nunchaku.File
COMPONENTS = ("transformer", "unet", "prior", "transformer_2")


def from_file(
    path: str | Path,
    recipe: str | Path | Recipe | Plan | Keeping | None = "stored",
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    keep: Sequence[str] | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """A quantized diffusers denoiser out of a single file; weights are decoded one at a time.

    path    a GGUF or safetensors file, also of ComfyUI's quantized layers, in diffusers' names or those of the model's
            authors; or a folder that diffusers' nunchaku_lite quantizer loads
    recipe  "stored": the file's codes are kept where dq has their format, activations stay in floating point;
            "stored-int8": and activations are rounded to 8 bits; a data-free recipe or a plan, which rounds anew;
            None: every weight decoded, nothing quantized
    config  the folder or Hub id of a pipeline with such a denoiser, or of the denoiser, or its config; None: the file
            was written by dq, or diffusers knows the model by its tensors' names and has its config
    dtype   compute dtype, fp32 by default
    keep    patterns, matched from the start of layer names, left in full precision
    Raises DQError for a file that is damaged or does not fit the config, and for recipes that need calibration.
    """
    return load(path, recipe, config, dtype, keep, progress)[0]


def load(
    path: str | Path, recipe, config=None, dtype=None, keep: Sequence[str] | str | None = None, progress: bool = True
) -> tuple[Any, Report]:
    """`from_file`, with what became of each layer."""
    start = time.perf_counter()
    wanted = None if recipe is None else cookbook.for_file(recipe)
    if wanted is not None and wanted.needs_calibration:
        raise DQError(
            f"recipe {wanted.name!r} needs calibration; load with recipe=None, put it into its pipeline, quantize that"
        )
    kind = compute_dtype(None if dtype is None else str(dtype).removeprefix("torch."))
    file = opened(path)
    model, entries = empty(file, config)
    parts = stored_parts(file, model, entries)
    keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
    plan = Plan({}) if wanted is None else plan_for(model, wanted, parts, keep)
    plan.compute_dtype = str(kind).removeprefix("torch.")
    check_fit(model, plan)
    before = sum(value.numel() * kind.itemsize for value in model.parameters())
    errors = fill(model, plan, parts, isinstance(wanted, Keeping), progress)
    model.eval()
    if wanted is not None:
        mark.mark(model, plan)
    rows = explaining.planned_rows("", model, plan, packed_layers(model), {"": errors})
    rows = explaining.with_kernels(rows, {"": (model, wanted)})
    notes = [f"read from {Path(path).name}"]
    seconds = time.perf_counter() - start
    return model, Report(rows, before, parameter_bytes(model), seconds, plan.recipe, notes)


def into_pipeline(path: str | Path, recipe, pipeline: str | None, dtype: str, keep=None):
    """-> (the denoiser of a file, within the pipeline that is named if it is one, its component "" if not, Report)."""
    model, report = load(path, recipe, pipeline, dtype, keep)
    part = None if pipeline is None else part_of(pipeline, type(model).__name__)
    if pipeline is None or part is None:
        return model, "", report
    from diffusers import DiffusionPipeline

    given = {part: model, "dtype": compute_dtype(dtype)}
    return DiffusionPipeline.from_pretrained(str(saved.find(pipeline)), **given), part, report


def part_of(pipeline: str, kind: str) -> str | None:
    """The component of a pipeline that a class is for, None where the name is that of a lone model."""
    place = saved.find(pipeline)
    if isinstance(place, Path) and not (place / saved.PIPELINE).is_file():
        return None
    parts: Any
    if isinstance(place, Path):
        parts = read_json(place / saved.PIPELINE)
    else:
        from diffusers import DiffusionPipeline

        parts = DiffusionPipeline.load_config(place)
    found = [part for part, row in parts.items() if isinstance(row, list) and row[-1] == kind]
    if not found:
        raise DQError(f"pipeline {pipeline!r} has no {kind}, which the file is of")
    return found[0]


def opened(path: str | Path) -> File:
    """A file by what it begins with, or a folder of `nunchaku_lite`. DQError for others, and for damage."""
    path = Path(path).expanduser()
    if path.is_dir() and nunchaku.is_one(path):
        return nunchaku.File(path)
    try:
        with path.open("rb") as file:
            first = file.read(4)
    except OSError as error:
        raise DQError(f"model file {str(path)!r} cannot be read: {error.strerror}; give the path of a file") from None
    return gguf.File(path) if first == gguf.MAGIC or path.suffix.lower() == ".gguf" else safe.File(path)


def empty(file: File, config) -> tuple[Any, dict[str, Any]]:
    """-> (the model on the meta device, its config). DQError when there is no config or no such class."""
    entries = config_of(file, config)
    import diffusers

    name = str(entries.get("_class_name"))
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise DQError(f"config of {str(file.path)!r} is for {name[:100]!r}, expected a model class of diffusers")
    saved.refuse_giants(entries, str(file.path))
    entries = {key: value for key, value in entries.items() if key != "quantization_config"}
    try:
        with init_empty_weights():
            model = kind.from_config(entries)  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # the class was given what the config holds, and may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DQError(f"no {name} can be made of its config: {reason[:300]}") from error
    return model, entries


def config_of(file: File, config) -> dict[str, Any]:
    """The config of the denoiser in a file."""
    if isinstance(config, Mapping):
        return dict(config)
    if config is not None:
        return _named(str(config))
    own = file.metadata.get(gguf.CONFIG)
    if isinstance(own, str):
        try:
            found = parse(own)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DQError(f"file {str(file.path)!r}: its {gguf.CONFIG} is no JSON object; download it again")
        return found
    return _guessed(file)


def _named(place: str) -> dict[str, Any]:
    """The config in a folder or on the Hub: of a pipeline's denoiser, or of a denoiser."""
    folder = saved.find(place)
    if isinstance(folder, Path):
        if (folder / saved.MODEL).is_file():
            return read_json(folder / saved.MODEL)
        part = next((part for part in COMPONENTS if (folder / part / saved.MODEL).is_file()), None)
        if part is None:
            raise DQError(f"folder {place!r} holds no denoiser: expected one of {', '.join(COMPONENTS)}")
        return read_json(folder / part / saved.MODEL)
    return _from_hub(place, None)


def _from_hub(place: str, part: str | None) -> dict[str, Any]:
    """Config of a denoiser on the Hub or in its cache. part: its folder there, None: found by the pipeline's."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    try:
        if part is None:
            parts: Any = DiffusionPipeline.load_config(place)
            part = next(part for part in COMPONENTS if part in parts)
        found: Any = UNet2DConditionModel.load_config(place, subfolder=part)  # of any model: the file has one name
        return dict(found)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DQError(f"{place!r} gives no config: {reason[:200]}; name a folder that holds the pipeline") from None


def _guessed(file: File) -> dict[str, Any]:
    """The config that diffusers has for a file's tensor names."""
    from diffusers.loaders import single_file_utils as theirs

    names, known = file.names, {}
    unet = any("input_blocks" in name for name in names)
    with contextlib.suppress(Exception):  # it looks into tensors for what it knows
        named = {key: torch.empty(shape, device="meta") for key, shape in names.items()}
        sure = unet or theirs.infer_diffusers_model_type(named) != "v1"  # its answer to all that it does not know
        known = theirs.fetch_diffusers_config(named) if sure else {}
    if not known:
        raise DQError(f"file {str(file.path)!r} does not say what model it is of; give config= or --pipeline")
    part = known.get("subfolder") or ("unet" if unet else "transformer")
    return _from_hub(known["pretrained_model_name_or_path"], part)


def stored_parts(file: File, model: nn.Module, entries: Mapping[str, Any]) -> dict[str, Stored]:
    """What the file has of each tensor of a model. DQError for the first one that is missing or has other sizes."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = naming.pieces(type(model), entries, wanted, file.names, f"file {str(file.path)!r}")
    made = {}
    for name, rows in found.items():
        parts = []
        for piece in rows:
            stored = file.stored(piece.name)
            whole = piece.first == 0 and piece.last == (stored.shape[0] if stored.shape else 1)
            parts.append(stored if whole else stored.rows(piece.first, piece.last))
        made[name] = joined(parts)
    return made


def plan_for(model: nn.Module, wanted: Recipe | Plan | Keeping, parts: Mapping[str, Stored], keep) -> Plan:
    """The plan of a model under a recipe, or of the codes there are. DQError when there are none to keep."""
    if isinstance(wanted, Plan):
        if keep:
            raise DQError(f"keep={list(keep)} goes with a recipe, got a plan; take the layers out of the plan instead")
        return wanted
    if isinstance(wanted, Recipe):
        return planning.make_plan(model, wanted, keep)
    kept = {name.removesuffix(".weight"): part.kept for name, part in parts.items() if name.endswith(".weight")}
    plan = planning.keeping_plan(model, wanted, {name: row for name, row in kept.items() if row is not None}, keep)
    if not plan.layers:
        raise DQError(
            f"recipe {wanted.name!r}: no weight has codes that dq has a format for; name a recipe, e.g. int8"
        )
    return plan


def fill(
    model: nn.Module, plan: Plan, parts: Mapping[str, Stored], keeps: bool, progress: bool
) -> dict[str, float | None]:
    """Put every tensor into an empty model, planned ones packed. -> weight SQNR in dB by layer, None where kept."""
    in_fp32, errors, others = kept_in_fp32(model), {}, aliases(model, plan.layers)
    for name, stored in tqdm(parts.items(), desc="read", disable=not progress, delay=2):
        layer = name if name in plan.layers else name.removesuffix(".weight")
        planned = layer in plan.layers and (layer == name) == (plan.layers[layer].kind == "stack")
        if planned and keeps:
            put_codes(model, layer, plan.layers[layer], stored.packed(layer), plan.dtype)
            errors[layer] = None
        elif planned:
            weight = stored.dense().reshape(plan.layers[layer].shape)
            packed: Any = pack_one(model, layer, plan.layers[layer], weight, plan.dtype)
            errors[layer] = explaining.sqnr_db(weight, packed.dense_weight())
        else:
            _put_plain(model, name, stored, torch.float32 if in_fp32(layer) else plan.dtype)
        stored.release()
    there = packed_layers(model)
    for other, first in others.items():
        put(model, other, there[first])
    return errors


def _put_plain(model: nn.Module, name: str, stored: Stored, dtype: torch.dtype) -> None:
    owner, key = paths.place(model, name)
    old: Any = owner._parameters.get(key)
    old = owner._buffers[key] if old is None else old
    value = stored.dense().reshape(old.shape)
    if not value.isfinite().all():
        raise DQError(f"tensor {name!r} holds NaN or Inf, expected finite numbers; download the file again")
    packed: Any = owner if isinstance(owner, tuple(PACKED.values())) else None
    if packed is not None:  # the bias of a layer whose weight came first
        packed.put(key, value.to(packed.compute_dtype).clone())
        return
    set_module_tensor_to_device(model, name, "cpu", value=value.to(dtype).clone(), dtype=dtype)


def put_codes(model: nn.Module, name: str, plan: LayerPlan, tensors: Mapping[str, torch.Tensor], dtype) -> nn.Module:
    """Put a packed layer of these tensors in place of a full-precision one; its bias may come later."""
    old: Any = paths.at(model, name)
    packed = PACKED[plan.kind].like(old, plan, dtype, "meta").train(old.training)
    for key, value in tensors.items():
        packed.put(key, value)
    if old.bias is not None and not old.bias.is_meta:
        packed.put("bias", old.bias.data.to(dtype))
    put(model, name, packed)
    return packed
