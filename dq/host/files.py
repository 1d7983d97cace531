"""Files of a quantized model: written whole or not at all, read only when every byte is what the plan says.

docs/file_format.md documents the format byte by byte. Every writer here fills a folder beside the target that takes
its place in one step, so that a full disk or a kill leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dq import disk, schema
from dq.errors import DQError
from dq.host import header
from dq.layers import tensor_shapes
from dq.model import aliases
from dq.plan import LayerPlan, Plan

PLAN_FILE, WEIGHTS_FILE = "dq_plan.json", "model.safetensors"
CHECKSUMS = "dq_crc32"  # key of the safetensors metadata: JSON object, tensor name -> crc32 of its bytes, 8 hex digits
SHARD = re.compile(r"-\d{5}-of-\d{5}")
POSITIVE = ("scale", "scale_global", "act_scale")  # packed tensors that divide or multiply: finite and above zero

Expected = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to save to; when the block succeeds its files are those of `folder`, in one step.

    Files of `folder` that belong to no save of these weights stay. Raises DQError when the place cannot be written;
    it is then as it was.
    """
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise DQError(f"the folder to save to is {folder!r}, expected its name; '.' is the current folder")
    stale: set[Path] = set()
    try:
        with disk.replacing(folder, lambda path: path not in stale) as made:
            yield made
            for path in made.rglob("*.safetensors"):
                _settle(path)
            stale |= _stale(made, Path(folder))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DQError(f"cannot save to {str(folder)!r}: {reason}; nothing was changed there") from error


def _settle(path: Path) -> None:
    """Bring the metadata of a safetensors file in order: sorted, so that the same model gives the same bytes, and with
    the checksums of the tensors that are in this file, by the names they have there (a host may rename them)."""
    entries, metadata = header.read(path)
    sums = json.loads(metadata.get(CHECKSUMS, "{}"))
    if CHECKSUMS in metadata and sums.keys() != entries.keys():
        lacking = {name for name in entries if name not in sums}
        found = {name: f"{value:08x}" for name, value in header.checksums(path, entries, lacking)}
        metadata[CHECKSUMS] = json.dumps({name: sums.get(name) or found[name] for name in entries})
    header.rewrite(path, dict(sorted(metadata.items())))


def _stale(made: Path, target: Path) -> set[Path]:
    """Weight files and indexes, by path inside, that an earlier save of the same weights left in other shards."""
    new = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    stems = {path.with_name(SHARD.sub("", path.name)) for path in new if path.suffix == ".safetensors"}
    stems |= {stem.with_name(_index_name(stem.name)) for stem in stems}
    homes = {stem.parent for stem in stems if (target / stem.parent).is_dir()}
    beside = {home / path.name for home in homes for path in (target / home).iterdir()} - new
    return {path for path in beside if path.with_name(SHARD.sub("", path.name)) in stems}


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


_ANEW = "save or download the model again"
_AGAIN = "the file does not fit its plan, save or download the model again"


def check_content(name: str, value: torch.Tensor, layers: Mapping[str, LayerPlan], sums: Mapping[str, str]) -> None:
    """DQError when a tensor holds impossible scales or bytes that differ from those that were saved."""
    home, _, key = name.rpartition(".")
    if home in layers and value.is_floating_point():
        if not torch.isfinite(value).all():
            raise DQError(f"tensor {name!r}: holds NaN or Inf, expected finite numbers; save or download it again")
        if key in POSITIVE and not (value > 0).all():
            raise DQError(f"tensor {name!r}: holds values of zero or below, expected positive scales; {_AGAIN}")
    if home in layers and key == "scale" and layers[home].weight.grain.two_level:
        most = layers[home].weight.spec.most_multiplier
        if not ((value > 0) & (value <= most)).all():
            raise DQError(f"tensor {name!r}: holds multipliers outside of 1 to {most}; {_AGAIN}")
    if name in sums and checksum(value) != sums[name]:
        raise DQError(f"tensor {name!r}: its bytes are not those that were saved; {_ANEW}")


def opened(paths: Sequence[str | Path]) -> tuple[set[str], dict[str, str]]:
    """-> (names of all tensors, their checksums) of a model's safetensors files, without reading tensors.

    Raises DQError naming a file that is truncated, no safetensors file or
    in another folder than the first, and a tensor that alone has no checksum. Files without any checksums, of other
    programs or early versions, are taken with a warning.
    """
    home = Path(paths[0]).absolute().parent
    names, sums = set(), {}
    for path in paths:
        if Path(path).absolute().parent != home or not str(path).endswith(".safetensors"):
            raise DQError(f"weights file {str(path)!r} is no safetensors file of the model's folder; save it again")
        entries, metadata = header.read(path)
        names |= entries.keys()
        sums |= _sums(path, metadata)
    bare = sorted(names - sums.keys())
    if bare and sums and sums.keys() <= names:
        raise DQError(f"tensor {bare[0]!r} has no checksum, the file was changed; {_ANEW}")
    if bare:  # no table, or an early one, with the names that tensors had before a host renamed them
        what = f"{str(home)!r}: {len(bare)} tensors have no checksum, damage to them would go unnoticed"
        warnings.warn(f"{what}; save the model again", stacklevel=2)
    return names, sums


def verify(paths: Sequence[str | Path]) -> None:
    """`opened`, and every byte of the files compared with what was saved: about 1 GB/s, a MiB in memory.

    For loaders that do not show the tensors as they come; else `check_content` does it. Raises DQError.
    """
    _, sums = opened(paths)
    for path in paths:
        entries, _ = header.read(path)
        for name, value in header.checksums(path, entries, sums):
            if f"{value:08x}" != sums[name]:
                raise DQError(f"tensor {name!r}: its bytes are not those that were saved; {_ANEW}")


def _sums(path: str | Path, metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = disk.parse(metadata.get(CHECKSUMS, "{}"))
        schema.check("checksums", found, f"{CHECKSUMS} of weights file {str(path)!r}")
    except ValueError as error:
        if isinstance(error, DQError):
            raise
        raise DQError(f"weights file {str(path)!r} is damaged: {CHECKSUMS} is no JSON object; copy it again") from None
    return found


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
    unknown = sorted(header.read(path)[0].keys() - wanted.keys())
    if unknown:
        raise DQError(f"weights file {str(path)!r} holds tensor {unknown[0]!r}, which {type(model).__name__} has not")
    names, sums = opened([path])
    check_names(wanted, names, f"weights file {str(path)!r}")
    state = load_file(path)
    for name, value in state.items():
        check_tensor(name, value, wanted[name])
        check_content(name, value, plan.layers, sums)
    return state
