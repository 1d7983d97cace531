"""Trees of tensors on disk, under names: the calls of a denoiser and the outputs of its units.

One entry is a folder `<key>.entry` with `tree.safetensors`: its tensors, flat, and as metadata the structure as
JSON with the crc32 of every tensor. Nothing is pickled. A tensor shared by content lies in a file of its own
beside it, as a hard link to `.shared/<sha1 of the content>`: the file system counts who refers to it, so that several
processes may write and drop entries of one store at once, and a kill leaves no wrong count.
Entries are filled in `.partial/` and renamed into place, so an entry is whole or not there.
A store made by this version has an empty file `.format-<VERSION>`. Which classes may stand in it says `classes`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES, save_file

from dq import disk, schema
from dq.errors import DQError
from dq.trace import classes

try:
    import fcntl
except ImportError:  # no such locks on this platform: leftovers of a kill then stay until the folder is deleted
    fcntl = None

SHARED_BYTES = 4096  # smaller tensors are cheaper to repeat than to look up
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
ENTRY, TREE, META = ".entry", "tree.safetensors", "dq"
STORABLE = frozenset(_TYPES.values())
PLAIN = (type(None), bool, int, float, str)
_DAMAGED = "delete the folder and record again"
VERSION = 2  # 1: classes of dq by the path of their module
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
BROKEN = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, RecursionError, OverflowError)


class Store:
    """A folder of named trees.

    Leaves: tensors of any dtype, None, bool, int, float, str, torch.dtype, torch.device. Containers: tuple, list, dict
    with str or int keys, NamedTuples, dataclasses and model outputs, of `KINDS` or of other libraries. Tensors are
    contiguous, without gradient, in memory of their own when read; one that stands twice in a tree stays one object.
    """

    def __init__(self, folder: str | Path):
        """Open or make the store; leftovers of a kill are removed if no other process has it open.

        Raises DQError for a folder written by a version of dq with another format.
        """
        self.folder = Path(folder).absolute()
        self._partial, self._shared = self.folder / ".partial", self.folder / ".shared"
        with _refusing(f"cannot open {str(self.folder)!r}"):
            self._check_version()
            for place in (self._partial, self._shared):
                place.mkdir(parents=True, exist_ok=True)
            # closed with the object, hence no `with`
            self._lock = (self.folder / ".lock").open("a")
            self._clean()

    def _check_version(self) -> None:
        mark = self.folder / f".format-{VERSION}"
        if self._shared.exists() and not mark.exists():
            what = f"{str(self.folder)!r} holds records in the format of another version of dq"
            raise DQError(f"{what}; delete the folder and record again, or use that version")
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.touch()  # before anything else is made

    def write(self, key: str, tree: Any, share: bool = True) -> None:
        """Store `tree` under `key`, in place of what was there.

        share   tensors of 4 KiB or more with equal content cost their bytes once in the whole store; False saves the
                search for them. Raises DQError for a tree that cannot come back, or when the disk is full.
        """
        place, packer = self._place(key), _Packer(share)
        try:
            text = json.dumps(packer.encode(tree, key), separators=(",", ":"))
            disk.check_depth(text)
        except (ValueError, RecursionError) as error:  # DQError among them
            raise error if isinstance(error, DQError) else DQError(f"{key}: cannot store it: {error}") from None
        with _refusing(f"cannot write {key!r} to {str(self.folder)!r}"), self._temporary() as made:
            inner = {str(i): value for i, value in enumerate(packer.values) if packer.names[i] is None}
            stated = json.dumps({"tree": text, "tensors": packer.rows}, separators=(",", ":"))
            save_file(inner, made / TREE, metadata={META: f"{zlib.crc32(stated.encode()):08x}{stated}"})
            for name, value in zip(packer.names, packer.values, strict=True):
                if name is not None:
                    self._link(name, value, made / name)
            place.parent.mkdir(parents=True, exist_ok=True)
            self.drop(key)
            made.rename(place)

    def read(self, key: str, device: torch.device | str | None = None, kind: str | None = None) -> Any:
        """The tree stored under `key`.

        device   where tensors go that were not on the CPU when written; None: all tensors come to the CPU.
        kind     of `schema.TYPES`: what the tree must be
        Raises DQError naming the file when it is missing, truncated or holds other bytes than were written.
        """
        place = self._place(key)
        if not place.is_dir():
            raise DQError(f"{str(place)!r} is missing: {key!r} was never written or was dropped; {_DAMAGED}")
        stored, metadata = _load(place / TREE)
        text = metadata.get(META, "")
        if text[:8] != f"{zlib.crc32(text[8:].encode()):08x}":
            raise DQError(f"{str(place / TREE)!r} is damaged: its structure has another checksum; {_DAMAGED}")
        with _sound(place / TREE):
            stated, tensors = disk.parse(text[8:]), []
            schema.check("record", stated, f"{str(place / TREE)!r}: its structure")
            for i, row in enumerate(stated["tensors"]):
                value = _load(place / row["file"])[0].get("0") if row["file"] else stored.get(str(i))
                tensors.append(_restore(value, row, place / (row["file"] or TREE), device))
            tree = _decode(disk.parse(stated["tree"]), tensors)
        if kind is not None:
            schema.check(kind, tree, f"{str(place)!r}: its content")
        return tree

    def has(self, key: str) -> bool:
        """Whether a whole entry of that name is there."""
        return self._place(key).is_dir()

    def drop(self, key: str) -> None:
        """Forget `key`, and every shared tensor that nobody else refers to. A key that is not there is no error."""
        place = self._place(key)
        if not place.is_dir():
            return
        with _refusing(f"cannot drop {key!r} from {str(self.folder)!r}"), self._temporary() as made:
            old = place.rename(made / "old")  # Windows renames onto nothing that is there
            names = [item.name for item in old.iterdir() if item.name != TREE]
            shutil.rmtree(old)
            for name in names:
                self._release(self._shared / name)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        top = self.folder / prefix.rpartition("/")[0]
        return sorted(key for key in self._below(top) if key.startswith(prefix))

    def _below(self, folder: Path) -> Iterator[str]:
        if folder.is_dir():
            for item in os.scandir(folder):
                if item.name.endswith(ENTRY) and item.is_dir():
                    yield Path(item.path).relative_to(self.folder).as_posix().removesuffix(ENTRY)
                elif item.is_dir() and not item.name.startswith("."):
                    yield from self._below(Path(item.path))

    def _place(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise DQError(f"key {key!r}: expected parts of letters, digits, '_', '-' and '.', joined by '/'")
        return self.folder / f"{key}{ENTRY}"

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        made = Path(tempfile.mkdtemp(dir=self._partial))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _link(self, name: str, value: torch.Tensor, place: Path) -> None:
        """Put the shared tensor at `place`; where links are refused (file system, too many), as a copy of its own."""
        known = self._shared / name
        if place.exists():  # equal tensors in one tree
            return
        with contextlib.suppress(OSError):
            os.link(known, place)
            return
        save_file({"0": value.view(torch.uint8)}, place)  # as bytes: any dtype may share them
        with contextlib.suppress(OSError):
            os.link(place, known)

    def _release(self, known: Path) -> None:
        """Remove a shared tensor whose only name is the one in `.shared`.

        An entry that is linking to it right now keeps the bytes by its own link.
        """
        with contextlib.suppress(FileNotFoundError):
            if known.stat().st_nlink == 1:
                known.unlink()

    def _clean(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody is at work here
            self._check_version()
        else:
            shutil.rmtree(self._partial)
            self._partial.mkdir(exist_ok=True)  # another process that opens the store may have just made it
            for item in self._shared.iterdir():
                self._release(item)
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_SH)


@contextlib.contextmanager
def _refusing(doing: str) -> Iterator[None]:
    """Errors of the disk as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DQError(f"{doing}: {error}; free space or choose another folder, then start again") from error


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    """What a file states cannot be made: it was damaged, or written by somebody else."""
    try:
        yield
    except DQError:
        raise
    except BROKEN as error:
        what = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise DQError(f"{str(path)!r} is damaged: its structure cannot be read: {what}; {_DAMAGED}") from None


class _Packer:
    """Turns a tree into JSON and a list of flat tensors with what it takes to restore them."""

    def __init__(self, share: bool):
        self.share = share
        self.values: list[torch.Tensor] = []
        self.names: list[str | None] = []  # file in `.shared`, None for a tensor inside the entry's own file
        self.rows: list[dict] = []
        self._indexes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # a tensor that died could lend its id to another one

    def encode(self, node: Any, where: str) -> Any:
        """JSON of a node: plain values as they are, everything else as [kind, content]."""
        if type(node) in PLAIN:
            return node
        if isinstance(node, torch.Tensor):
            return ["tensor", self._index(node, where)]
        if isinstance(node, (torch.dtype, torch.device)):
            return [type(node).__name__, str(node).removeprefix("torch.")]
        if type(node) in (tuple, list, torch.Size):
            return [type(node).__name__, self._all(enumerate(node), where)]
        if type(node) is dict:
            self._check_keys(node, where)
            return ["dict", [[name, value] for name, value in zip(node, self._all(node.items(), where), strict=True)]]
        return self._encode_object(node, where)

    def _encode_object(self, node: Any, where: str) -> Any:
        cls = type(node)
        path, fields = classes.name(cls), classes.fields(cls)
        if fields is None or classes.find(path) is not cls or not classes.whole(node):
            known = "tensors, numbers, str, None, tuple, list, dict, NamedTuples, dataclasses"
            raise DQError(
                f"{where}: cannot store a {cls.__name__}, expected {known} of a module, with no more than fields"
            )
        if fields:
            return ["object", [path, self._all([(name, getattr(node, name)) for name in fields], where)]]
        self._check_keys(node, where)
        return ["mapping", [path, self.encode(dict(node), where)]]

    def _all(self, items, where: str) -> list:
        return [self.encode(value, f"{where}.{name}") for name, value in items]

    def _check_keys(self, node: Mapping, where: str) -> None:
        wrong = [name for name in node if type(name) not in (str, int)]
        if wrong:
            raise DQError(f"{where}: a dict key is a {type(wrong[0]).__name__}, expected str or int")

    def _index(self, tensor: torch.Tensor, where: str) -> int:
        if id(tensor) in self._indexes:
            return self._indexes[id(tensor)]
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise DQError(f"{where}: cannot store a {tensor.layout} tensor on {tensor.device}, expected dense values")
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        if flat.stride() != (1,):  # one element of an expanded tensor: contiguous() leaves it as it is
            flat = flat.clone(memory_format=torch.contiguous_format)
        raw = flat.view(torch.uint8).numpy() if flat.numel() else b""
        row = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        row |= {"crc32": f"{zlib.crc32(raw):08x}", "cpu": tensor.device.type == "cpu", "file": None}
        if self.share and len(raw) >= SHARED_BYTES:
            row["file"] = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
        if flat.dtype not in STORABLE:
            flat = flat.view(torch.uint8)
        # safetensors wants tensors that do not overlap; views into one storage might
        owned = flat.untyped_storage().nbytes() == flat.nbytes and flat.data_ptr() not in self._pointers()
        self.values.append(flat if owned else flat.clone())
        self.names.append(row["file"])
        self.rows.append(row)
        self._alive.append(tensor)
        self._indexes[id(tensor)] = len(self.values) - 1
        return len(self.values) - 1

    def _pointers(self) -> set[int]:
        return {value.data_ptr() for value in self.values}


def _decode(node: Any, tensors: list[torch.Tensor]) -> Any:
    """A node from its JSON. Whatever the JSON holds besides raises one of BROKEN."""
    if not isinstance(node, list):
        return node
    kind, content = node
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return DTYPES[content]
    if kind == "device":
        return torch.device(content)
    if kind == "dict":
        return {name: _decode(value, tensors) for name, value in content}
    if kind in ("object", "mapping"):
        path, inside = content
        cls = classes.find(path)
        if cls is None or classes.fields(cls) is None or bool(classes.fields(cls)) != (kind == "object"):
            raise DQError(
                f"class {path!r} of a stored value is not here; use the program and versions that recorded it"
            )
        return classes.build(
            cls, [_decode(item, tensors) for item in inside] if kind == "object" else _decode(inside, tensors)
        )
    items = [_decode(value, tensors) for value in content]
    return items if kind == "list" else {"tuple": tuple, "Size": torch.Size}[kind](items)


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (mapped from the file) and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DQError(f"{str(path)!r} is missing or damaged: {error}; {_DAMAGED}") from None


def _restore(flat: torch.Tensor | None, row: dict, path: Path, device) -> torch.Tensor:
    raw = flat.view(torch.uint8).numpy() if flat is not None and flat.numel() else b""
    if flat is None or f"{zlib.crc32(raw):08x}" != row["crc32"]:
        raise DQError(f"{str(path)!r} is damaged: a tensor has another checksum than when written; {_DAMAGED}")
    # a mapped tensor lies at an odd address, where matrix libraries sum in another order: what was read back, or taken
    # from another process, must give the same bits as what never left memory
    place = flat.device if device is None or row["cpu"] else device
    return flat.to(place, copy=True).view(DTYPES[row["dtype"]]).reshape(row["shape"])
