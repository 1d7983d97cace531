"""Models on disk: from what a user types to a pipeline or model, and the report of a saved one without its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dq import kernels
from dq.errors import DQError
from dq.explaining import served
from dq.kernels import Conv
from dq.plan import LayerPlan, Plan, read_json
from dq.report import Report, Row

EMBEDDED = ("tiny-pixart", "tiny-sd")
CLONE = Path(__file__).resolve().parents[2] / "pipelines" / "tiny"
PIPELINE, MODEL, BARE = "model_index.json", "config.json", "dq_plan.json"
MAKE_ONE = "make one with `dq quantize MODEL --recipe int8 --out DIR`"
KINDS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "F4": 4}


def find(name: str) -> Path | str:
    """The folder a user means (a path or an embedded name), or the Hub id as it is. DQError says what is missing."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in (PIPELINE, MODEL, BARE)):
            raise DQError(f"folder {name!r} holds no model: expected {PIPELINE} (a pipeline) or {MODEL} (a denoiser)")
        return folder
    if name in EMBEDDED:
        if (CLONE / name / PIPELINE).is_file():
            return CLONE / name
        raise DQError(
            f"{name!r} is an embedded model: it lies in pipelines/tiny of a clone of the repository and not in the "
            "installed package; run dq from a clone (pip install -e .), or give a folder or a Hub id"
        )
    if folder.exists():
        raise DQError(f"model {name!r} is a file, expected a folder, a Hub id or one of {', '.join(EMBEDDED)}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        expected = f"an existing folder, a Hub id (owner/name) or one of {', '.join(EMBEDDED)}"
        raise DQError(f"model {name!r} does not exist; expected {expected}")
    return name


def load(name: str, dtype: str | None = None):
    """The pipeline, or the lone diffusers denoiser, that `name` means; `dtype` defaults to what it was quantized with.

    Raises DQError when there is none, or when its files are damaged.
    """
    place = find(name)
    if isinstance(place, Path) and not any((place / file).is_file() for file in (PIPELINE, MODEL)):
        raise DQError(f"{name!r} was written by dq.save for a model of your own; read it with dq.load(folder, model)")
    import torch
    from diffusers import AutoModel, DiffusionPipeline

    dtype = dtype or (stored_dtype(place) if isinstance(place, Path) else None) or "float32"
    lone = isinstance(place, Path) and not (place / PIPELINE).is_file()
    try:
        return (AutoModel if lone else DiffusionPipeline).from_pretrained(str(place), dtype=getattr(torch, dtype))
    except DQError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DQError(f"model {name!r} cannot be loaded: {reason[:300]}") from error


def plans(folder: Path) -> dict[str, tuple[Path, Plan]]:
    """Folder and plan of every quantized component of a saved pipeline by name; a lone model has the name ""."""
    if (folder / PIPELINE).is_file():
        parts = {name: folder / name for name in read_json(folder / PIPELINE) if (folder / name).is_dir()}
    else:
        parts = {"": folder}
    found = {name: (part, _plan(part)) for name, part in parts.items()}
    return {name: (part, plan) for name, (part, plan) in found.items() if plan is not None}


def _plan(folder: Path) -> Plan | None:
    if (folder / BARE).is_file():
        return Plan.load(folder / BARE)
    if not (folder / MODEL).is_file():
        return None
    config = read_json(folder / MODEL).get("quantization_config") or {}
    if config.get("quant_method") != "dq":
        return None
    return Plan.from_dict(config["plan"] if isinstance(config["plan"], dict) else json.loads(config["plan"]))


def stored_dtype(folder: Path) -> str | None:
    """Compute dtype of a saved quantized model or pipeline, None for one that is not quantized."""
    return next((plan.compute_dtype for _, plan in plans(folder).values()), None)


def report(folder: str | Path, device: str = "cpu") -> Report:
    """What `dq.explain` says of a saved model, with the kernels a device type would run, from its headers alone.

    Raises DQError when the folder holds no quantized model.
    """
    place = find(str(folder))
    found = plans(place) if isinstance(place, Path) else {}
    if not found:
        raise DQError(f"{str(folder)!r} holds no quantized model; {MAKE_ONE}")
    rows, before, after = [], 0, 0
    for part, (home, plan) in found.items():
        tensors = _tensors(home)
        own = {name: _own(name, tensors) for name in [*plan.layers, *plan.kept]}
        rows += [_row(part, name, layer, own[name], device) for name, layer in plan.layers.items()]
        rows += [_kept(part, name, reason, own[name]) for name, reason in plan.kept.items()]
        stored = sum(size for _, size in tensors.values())
        after += stored
        before += stored + sum(_dense_bytes(layer, own[name], plan) for name, layer in plan.layers.items())
    recipe = ", ".join(dict.fromkeys(plan.recipe for _, plan in found.values()))
    return Report(rows, before, after, 0.0, recipe)


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of every tensor below a folder, from the headers of its safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[name] = (shape, prod(shape) * BITS.get(part.get_dtype(), 8) // 8)
        except (OSError, SafetensorError) as error:
            raise DQError(f"weights file {str(path)!r} is missing or damaged: {error}; copy it again") from None
    return found


def _own(name: str, tensors: dict) -> dict[str, tuple[tuple[int, ...], int]]:
    """The tensors of one layer by their last name."""
    keys = [key for key in tensors if key.rpartition(".")[0] == name]
    return {key.rpartition(".")[2]: tensors[key] for key in keys}


def _row(part: str, name: str, plan: LayerPlan, own: dict, device: str) -> Row:
    full, act = f"{part}.{name}" if part else name, str(plan.act) if plan.act else None
    size = sum(size for _, size in own.values())
    found = Row(full, plan.kind, str(plan.weight), act, plan.rank, size, None, plan.reason)
    if plan.kind == "stack":
        return replace(found, backend="decode", kernel=f"decode {plan.weight.format} when used")
    space = len(plan.shape) - 2
    conv = Conv((1,) * space, (0,) * space, (1,) * space, 1) if plan.kind != "linear" else None
    return served(found, kernels.choose("conv" if conv else "linear", plan, device, conv))


def _kept(part: str, name: str, reason: str, own: dict) -> Row:
    shape, _ = own.get("weight", ((), 0))
    size = sum(size for _, size in own.values())
    return Row(f"{part}.{name}" if part else name, KINDS.get(len(shape), ""), None, None, 0, size, None, reason)


def _dense_bytes(layer: LayerPlan, own: dict, plan: Plan) -> int:
    """Bytes the layer's weight takes in the compute dtype beyond its packed tensors (its bias is in both)."""
    width = 4 if plan.compute_dtype == "float32" else 2
    packed = sum(size for key, (_, size) in own.items() if key != "bias")
    return layer.rows * layer.columns * width - packed
