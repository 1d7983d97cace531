"""Files of a quantized model: written whole or not at all, read only when every byte is what the plan says.

docs/file_format.md documents the format byte by byte. Every writer here fills a temporary folder on the disk of the
target and renames its files into place, so that a full disk or a crash leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dq.errors import DQError
from dq.host import header
from dq.layers import tensor_shapes
from dq.model import aliases
from dq.plan import Plan

PLAN_FILE, WEIGHTS_FILE = "dq_plan.json", "model.safetensors"
CHECKSUMS = "dq_crc32"  # key of the safetensors metadata: JSON object, tensor name -> crc32 of its bytes, 8 hex digits
SHARD = re.compile(r"-\d{5}-of-\d{5}")
POSITIVE = ("scale", "scale_global", "act_scale")  # packed tensors that divide or multiply: finite and above zero

Expected = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give an empty temporary folder on the disk of `folder`; when the block succeeds its files move into place.

    Weight files of an earlier save with another number of shards are removed. Raises DQError when the place cannot be
    written; the target is then unchanged.
    """
    target, made = Path(folder).absolute(), None
    try:
        home = target if target.is_dir() else target.parent
        home.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=home))
        yield made
        for path in made.rglob("*.safetensors"):
            _settle(path)
        _move_into(made, target)
    except (OSError, SafetensorError) as error:
        raise DQError(f"cannot save to {str(folder)!r}: {error}; nothing was changed there") from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _settle(path: Path) -> None:
    """Sort the header of a safetensors file, whose metadata come in another order in every process: same model, same
    bytes. The header keeps its length, so that no tensor moves."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _move_into(source: Path, target: Path) -> None:
    """Rename every file below `source` to its place below `target`; JSON, which makes a folder loadable, last."""
    target.mkdir(exist_ok=True)
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
    places = {path: target / path.relative_to(source) for path in files}
    for path, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for stale in _stale(set(places.values())):
        stale.unlink()


def _stale(new: set[Path]) -> list[Path]:
    """Weight files and indexes that an earlier save of the same weights, in other shards, left beside the new ones."""
    stems = {place.with_name(SHARD.sub("", place.name)) for place in new if place.suffix == ".safetensors"}
    stems |= {stem.with_name(_index_name(stem.name)) for stem in stems}
    beside = {path for stem in stems for path in stem.parent.iterdir()} - new
    return [path for path in beside if path.with_name(SHARD.sub("", path.name)) in stems]


def _index_name(stem: str) -> str:
    """`model.safetensors` -> `model.safetensors.index.json`, with a variant `model.safetensors.index.fp16.json`."""
    name, *variant = stem.removesuffix(".safetensors").split(".")
    return ".".join([f"{name}.safetensors.index", *variant, "json"])


def checksum(tensor: torch.Tensor) -> str:
    """crc32 of the bytes of a tensor, 8 hex digits."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{zlib.crc32(plain.view(torch.uint8).numpy()):08x}" if plain.numel() else "00000000"


def metadata(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Safetensors metadata of a state dict: the checksum of every tensor."""
    return {CHECKSUMS: json.dumps({name: checksum(value) for name, value in state.items()})}


def expected(model: nn.Module, plan: Plan) -> Expected:
    """Shape and dtype (None: any floating point) of every tensor of a model under a plan.

    The model may be full precision or already hold the plan's packed layers.
    """
    found: Expected = {}
    for name, value in model.state_dict().items():
        home, _, key = name.rpartition(".")
        if home not in plan.layers and name not in plan.layers:
            found[name] = (tuple(value.shape), None if value.is_floating_point() else value.dtype)
        elif key == "bias":
            found[name] = (tuple(value.shape), None)
    for name, layer in plan.layers.items():
        found |= {f"{name}.{key}": entry for key, entry in tensor_shapes(layer).items()}
    for other, first in aliases(model, plan.layers).items():  # a module in two places has its tensors under both
        own = {name.removeprefix(first): entry for name, entry in found.items() if name.startswith(f"{first}.")}
        found = {name: entry for name, entry in found.items() if not name.startswith(f"{other}.")}
        found |= {other + key: entry for key, entry in own.items()}
    return found


def check_tensor(name: str, value: torch.Tensor, wanted: tuple[tuple[int, ...], torch.dtype | None]) -> None:
    """DQError when a stored tensor has not the shape and dtype the plan and the model ask for."""
    shape, dtype = wanted
    if tuple(value.shape) != shape:
        raise DQError(f"tensor {name!r}: got shape {tuple(value.shape)}, expected {shape}; {_AGAIN}")
    if value.dtype != dtype and not (dtype is None and value.is_floating_point()):
        raise DQError(f"tensor {name!r}: got {value.dtype}, expected {dtype or 'a floating-point dtype'}; {_AGAIN}")


_AGAIN = "the file does not fit its plan, save or download the model again"


def check_content(name: str, value: torch.Tensor, layers: Mapping[str, object], sums: Mapping[str, str]) -> None:
    """DQError when a packed tensor holds impossible scales or bytes that differ from those that were saved."""
    home, _, key = name.rpartition(".")
    if home in layers and value.is_floating_point():
        if not torch.isfinite(value).all():
            raise DQError(f"tensor {name!r}: holds NaN or Inf, expected finite numbers; save or download it again")
        if key in POSITIVE and not (value > 0).all():
            raise DQError(f"tensor {name!r}: holds values of zero or below, expected positive scales; {_AGAIN}")
    if name in sums and checksum(value) != sums[name]:
        raise DQError(f"tensor {name!r}: its bytes are not those that were saved; save or download the model again")


def headers(paths: list[str | Path]) -> tuple[set[str], dict[str, str]]:
    """-> (names of all tensors, their checksums) of safetensors files, without reading tensors.

    Raises DQError naming a file that is truncated or no safetensors file.
    """
    names, sums = set(), {}
    for path in paths:
        entries, metadata = header.read(path)
        names |= set(entries)
        try:
            sums |= json.loads(metadata.get(CHECKSUMS, "{}"))
        except (ValueError, TypeError):
            raise DQError(
                f"weights file {str(path)!r} is damaged: {CHECKSUMS} is no JSON object; copy it again"
            ) from None
    return names, sums


def check_names(wanted: Expected, names: set[str], place: str) -> None:
    """DQError naming the first tensor that is missing."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DQError(f"{place} lacks tensor {missing[0]!r} ({len(missing)} missing); download or save it again")


def write(folder: Path, plan: Plan, state: Mapping[str, torch.Tensor]) -> None:
    """Write a plan and a state dict into an existing folder."""
    seen: set[int] = set()
    plain = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        plain[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(value.untyped_storage().data_ptr())
    save_file(plain, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata(plain)})
    plan.save(folder / PLAN_FILE)


def read(folder: str | Path, model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Every tensor of a saved bare model, checked against the plan, the model and the saved checksums."""
    path = Path(folder) / WEIGHTS_FILE
    wanted = expected(model, plan)
    names, sums = headers([path])
    check_names(wanted, names, f"weights file {str(path)!r}")
    state = load_file(path)
    for name, value in state.items():
        if name not in wanted:
            raise DQError(f"weights file {str(path)!r} holds tensor {name!r}, which {type(model).__name__} has not")
        check_tensor(name, value, wanted[name])
        check_content(name, value, plan.layers, sums)
    return state
