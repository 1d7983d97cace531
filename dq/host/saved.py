"""Models on disk: from what a user types to a pipeline or model, and the report of a saved one without its weights.

Nothing here imports torch before it loads a model or chooses kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dq.disk import parse, read_json
from dq.errors import DQError, naming
from dq.host import header
from dq.host.header import Entry
from dq.plan import LayerPlan, Plan, compute_dtype
from dq.report import Report, Row

EMBEDDED = ("tiny-pixart", "tiny-sd", "tiny-video")
CLONE = Path(__file__).resolve().parents[2] / "pipelines" / "tiny"
PIPELINE, MODEL, BARE = "model_index.json", "config.json", "dq_plan.json"
ENDS = (".gguf", ".safetensors")  # of single files
MOST_SIZE = 2**31
MAKE_ONE = "make one with `dq quantize MODEL --recipe int8 --out DIR`"
KINDS = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def is_file(name: str) -> bool:
    """Whether a name means a single file, or a folder that another quantizer wrote, which `dq.bridges` reads."""
    path = Path(name).expanduser()
    if path.suffix.lower() in ENDS:
        return path.is_file()
    config = read_json(path / MODEL).get("quantization_config") if (path / MODEL).is_file() else None
    return isinstance(config, dict) and config.get("quant_method") == "nunchaku_lite"


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
    from diffusers import AutoModel, DiffusionPipeline

    for path in (place / MODEL, *place.glob(f"*/{MODEL}")) if isinstance(place, Path) else ():
        _refuse_giants(path)
    dtype = dtype or (stored_dtype(place) if isinstance(place, Path) else None) or "float32"
    lone = isinstance(place, Path) and not (place / PIPELINE).is_file()
    try:
        return (AutoModel if lone else DiffusionPipeline).from_pretrained(str(place), dtype=compute_dtype(dtype))
    except DQError:
        raise
    except Exception as error:  # the class that the files name was given what they hold, and may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DQError(f"model {name!r} cannot be loaded: {reason[:300]}") from error


def _refuse_giants(path: Path) -> None:
    """DQError for a config with a size that no model has: its class would be built for ever."""
    refuse_giants(read_json(path) if path.is_file() else {}, str(path))


def refuse_giants(config: Mapping[str, object], place: str) -> None:
    """As above, for what a config says."""
    for key, value in config.items():
        if any(
            type(each) is int and abs(each) > MOST_SIZE for each in (value if isinstance(value, list) else [value])
        ):
            raise DQError(f"file {place!r}: {str(key)[:100]} is out of bounds, expected at most {MOST_SIZE}")


def plans(folder: Path, checked: bool = True) -> dict[str, tuple[Path, Plan]]:
    """Folder and plan of every quantized component of a saved pipeline by name; a lone model has the name "".

    `checked` as in `Plan.from_dict`. DQError for a plan that is damaged.
    """
    if (folder / PIPELINE).is_file():
        names = [name for name in read_json(folder / PIPELINE) if name.isidentifier()]  # no path to elsewhere
        parts = {name: folder / name for name in names if (folder / name).is_dir()}
    else:
        parts = {"": folder}
    found = {name: (part, _plan(part, checked)) for name, part in parts.items()}
    return {name: (part, plan) for name, (part, plan) in found.items() if plan is not None}


def _plan(folder: Path, checked: bool) -> Plan | None:
    if (folder / BARE).is_file():
        with naming(folder / BARE):
            return Plan.from_dict(read_json(folder / BARE), checked)
    if not (folder / MODEL).is_file():
        return None
    config = read_json(folder / MODEL).get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "dq":
        return None
    plan = config.get("plan")
    try:
        plan = parse(plan) if isinstance(plan, str) else plan
    except ValueError:
        plan = None
    if not isinstance(plan, dict):
        raise DQError(
            f"{str(folder / MODEL)!r} has no plan in its quantization_config; save or download the model again"
        )
    with naming(folder / MODEL):
        return Plan.from_dict(plan, checked)


def stored_dtype(folder: Path) -> str | None:
    """Compute dtype of a saved quantized model or pipeline, None for one that is not quantized."""
    return next((plan.compute_dtype for _, plan in plans(folder, checked=False).values()), None)


def report(folder: str | Path, device: str | None = None) -> Report:
    """What `dq.explain` says of a saved model, from its headers alone; with kernels where a device type is given.

    Raises DQError when the folder holds no quantized model, or a damaged one.
    """
    place = find(str(folder))
    found = plans(place, checked=device is not None) if isinstance(place, Path) else {}
    if not found:
        raise DQError(f"{str(folder)!r} holds no quantized model; {MAKE_ONE}")
    rows, before, after = [], 0, 0
    for part, (home, plan) in found.items():
        tensors = _tensors(home)
        own = {name: {} for name in [*plan.layers, *plan.kept]} | _by_layer(tensors)
        rows += [
            _row(part, name, layer, own[name], (device, plan.compute_dtype)) for name, layer in plan.layers.items()
        ]
        rows += [_kept(part, name, reason, own[name]) for name, reason in plan.kept.items()]
        stored = sum(entry.size for entry in tensors.values())
        after += stored
        before += stored + sum(_dense_bytes(layer, own[name], plan) for name, layer in plan.layers.items())
    recipe = ", ".join(dict.fromkeys(plan.recipe for _, plan in found.values()))
    return Report(rows, before, after, 0.0, recipe)


def _tensors(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files."""
    files = (header.read(path)[0] for path in sorted(folder.glob("*.safetensors")))
    return {name: entry for entries in files for name, entry in entries.items()}


def _by_layer(tensors: dict[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The tensors of each layer by their last name."""
    found = {}
    for key, entry in tensors.items():
        home, _, name = key.rpartition(".")
        found.setdefault(home, {})[name] = entry
    return found


def _row(part: str, name: str, plan: LayerPlan, own: dict[str, Entry], place: tuple[str | None, str | None]) -> Row:
    full, act = f"{part}.{name}" if part else name, str(plan.act) if plan.act else None
    size = sum(entry.size for entry in own.values())
    found = Row(
        full, plan.kind, str(plan.weight), act, plan.rank, size, None, plan.reason, late=tuple(map(str, plan.late))
    )
    device, dtype = place
    return found if device is None else _served(found, plan, device, dtype)


def _served(row: Row, plan: LayerPlan, device: str, dtype: str | None) -> Row:
    """A row with what would serve its layer in typical calls, by what was measured before, and why nothing else."""
    import torch

    from dq import explaining, kernels
    from dq.kernels import choice

    if plan.kind == "stack":
        return replace(row, backend="dense", kernel=f"decode {plan.weight.format} when used")
    space = len(plan.shape) - 2
    conv = kernels.Conv((1,) * space, (0,) * space, (1,) * space, 1) if plan.kind != "linear" else None
    where = (torch.device(device), compute_dtype(dtype), choice.typical_klass(plan))
    op = "conv" if conv else "linear"
    return explaining.served(row, *(choice.known(choice.Problem(op, each, conv, *where)) for each in plan.phases))


def _kept(part: str, name: str, reason: str, own: dict[str, Entry]) -> Row:
    kind = KINDS.get(len(own["weight"].shape), "") if "weight" in own else ""
    size = sum(entry.size for entry in own.values())
    return Row(f"{part}.{name}" if part else name, kind, None, None, 0, size, None, reason)


def _dense_bytes(layer: LayerPlan, own: dict[str, Entry], plan: Plan) -> int:
    """Bytes the layer's weight takes in the compute dtype beyond its packed tensors (its bias is in both)."""
    width = 4 if plan.compute_dtype == "float32" else 2
    packed = sum(entry.size for key, entry in own.items() if key != "bias")
    return layer.rows * layer.columns * width - packed
