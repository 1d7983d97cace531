"""GGUF files: the header read within bounds, tensors mapped and decoded when asked for.

A file is magic, version, two counts, metadata (key, type, value), tensor infos (name, dimensions, type, offset), then
the tensors at multiples of `general.alignment`. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
The library `gguf` names the types, knows their sizes and decodes them; its reader trusts counts and offsets, so the
header is read here: every length is held against what is left of the file before anything is read or made.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dq.bridges import blocks
from dq.bridges.stored import Plain, Stored, linear
from dq.errors import DQError
from dq.layers.memory import page_out
from dq.plan import LayerPlan

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_TENSORS, MOST_ENTRIES = 100_000, 100_000
MOST_NAME = 1024  # bytes of a tensor's name or of a key
MOST_DIMENSIONS = 5  # ggml has 4; the patch embedding of a video model has 5
MOST_ELEMENTS = 2**40
MOST_ALIGNMENT = 2**20
LEAST_ALIGNMENT = 8  # of the format
MOST_TEXT, MOST_ITEMS = 2**26, 2**20  # of a value of metadata: bytes, items of an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF: of tensors that were reshaped to whole blocks
CONFIG = "dq.config"  # JSON of the diffusers config, in files that dq wrote


@cache
def library() -> ModuleType:
    """The package `gguf`. DQError when it is not installed."""
    try:
        import gguf
    except ImportError:
        raise DQError("GGUF files need the package gguf: pip install 'dq-diffusion[gguf]'") from None
    return gguf


@dataclass(frozen=True)
class Info:
    """One tensor of a file. shape: decoded, slowest axis first; start, size: bytes of the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads on in a mapped header. DQError, naming the file, where it ends too early."""

    def __init__(self, path: Path, data: mmap):
        self.path, self.data, self.at = path, data, 0

    def damaged(self, what: str) -> DQError:
        return DQError(f"GGUF file {str(self.path)!r} is damaged: {what}; download it again")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.damaged(f"{what} would end at byte {self.at + count}, the file at {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter), what))[0]

    def text(self, most: int, what: str) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.damaged(f"{what} would have {length} bytes, expected at most {most}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no text") from None

    def value(self, kind: int, what: str) -> Any:
        """A value of metadata; arrays as lists."""
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(MOST_TEXT, what)
        if kind != ARRAY:
            raise self.damaged(f"{what} has type {kind}, expected 0 to 12")
        inner, count = self.number("I", what), self.number("Q", what)
        if count > MOST_ITEMS:
            raise self.damaged(f"{what} would hold {count} items, expected at most {MOST_ITEMS}")
        if inner in SCALARS:
            raw = self.take(count * struct.calcsize(SCALARS[inner]), what)
            return np.frombuffer(raw, np.dtype(f"<{SCALARS[inner]}")).tolist()
        if inner != STRING:
            raise self.damaged(f"{what} is an array of type {inner}, expected numbers or texts")
        return [self.text(MOST_TEXT, what) for _ in range(count)]


class File:
    """A GGUF file, mapped. metadata: key -> value; tensors: name -> Info."""

    def __init__(self, path: str | Path):
        """DQError for a file that is missing or damaged; no tensor is read."""
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        try:
            with self.path.open("rb") as file:
                self._data = mmap(file.fileno(), 0, access=ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise DQError(f"GGUF file {str(path)!r} cannot be read: {error}; download it again") from None
        cursor = _Cursor(self.path, self._data)
        tensors, entries = _counts(cursor)
        for _ in range(entries):
            key = cursor.text(MOST_NAME, "a key of its metadata")
            if key in self.metadata:
                raise cursor.damaged(f"key {key[:100]!r} stands twice")
            self.metadata[key] = cursor.value(cursor.number("I", f"the type of {key[:100]!r}"), f"{key[:100]!r}")
        self.tensors = _infos(cursor, tensors, self.metadata)
        self.bytes = torch.from_numpy(np.frombuffer(self._data, np.uint8)) if self.tensors else torch.empty(0)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Decoded shape of every tensor by name."""
        return {name: self._shape(name) for name in self.tensors}

    def _shape(self, name: str) -> tuple[int, ...]:
        given = self.metadata.get(ORIGINAL_SHAPE + name)
        info = self.tensors[name]
        if not isinstance(given, list) or not all(type(size) is int and size > 0 for size in given):
            return info.shape
        return tuple(given) if math.prod(given) == math.prod(info.shape) else info.shape

    def stored(self, name: str) -> Stored:
        """A tensor as it lies in the file."""
        info = self.tensors[name]
        raw = self.bytes[info.start : info.start + info.size]
        if info.kind in PLAIN:
            values = torch.from_numpy(raw.numpy().view(PLAIN[info.kind])).reshape(self._shape(name))
            return Plain(values)
        if info.kind == "BF16":
            return Plain(torch.from_numpy(raw.numpy().view(np.uint16)).view(torch.bfloat16).reshape(self._shape(name)))
        _, size = library().GGML_QUANT_SIZES[library().GGMLQuantizationType[info.kind]]
        return Quantized(info.kind, raw.reshape(-1, size), info.shape, self._shape(name))


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """-> numbers of tensors and of metadata entries."""
    if cursor.take(4, "the magic") != MAGIC:
        raise DQError(f"{str(cursor.path)!r} is no GGUF file: it does not begin with 'GGUF'")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        expected = " or ".join(map(str, VERSIONS))
        raise DQError(f"GGUF file {str(cursor.path)!r} has version {version}, expected {expected}, little-endian")
    tensors, entries = cursor.number("Q", "the count of tensors"), cursor.number("Q", "the count of metadata")
    if tensors > MOST_TENSORS or entries > MOST_ENTRIES:
        raise cursor.damaged(f"it counts {tensors} tensors and {entries} entries of metadata")
    return tensors, entries


def _infos(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, Info]:
    """Every tensor, its place held against the file and the others."""
    rows: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text(MOST_NAME, "the name of a tensor")
        if name in rows:
            raise cursor.damaged(f"tensor {name[:100]!r} stands twice")
        rows[name] = _info(cursor, f"tensor {name[:100]!r}")
    step = metadata.get("general.alignment", 32)
    if type(step) is not int or not LEAST_ALIGNMENT <= step <= MOST_ALIGNMENT or step & (step - 1):
        raise cursor.damaged(f"its alignment is {str(step)[:40]!r}, expected a power of two from {LEAST_ALIGNMENT} on")
    begin, end, found = -(-cursor.at // step) * step, 0, {}
    for name, (kind, shape, size, offset) in sorted(rows.items(), key=lambda row: row[1][3]):
        if offset % step or offset < end:
            raise cursor.damaged(
                f"tensor {name[:100]!r} begins at {offset}, within another or at no multiple of {step}"
            )
        end = offset + size
        if begin + end > len(cursor.data):
            raise cursor.damaged(f"tensor {name[:100]!r} ends at byte {begin + end}, the file at {len(cursor.data)}")
        found[name] = Info(kind, shape, begin + offset, size)
    return {name: found[name] for name in rows}


def _info(cursor: _Cursor, what: str) -> tuple[str, tuple[int, ...], int, int]:
    """-> type, shape, bytes, offset."""
    count = cursor.number("I", what)
    if not 1 <= count <= MOST_DIMENSIONS:
        raise cursor.damaged(f"{what} has {count} dimensions, expected 1 to {MOST_DIMENSIONS}")
    shape = tuple(cursor.number("Q", what) for _ in range(count))[::-1]
    if min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
        raise cursor.damaged(f"{what} has sizes {shape}")
    code, offset = cursor.number("I", what), cursor.number("Q", what)
    types = library().GGMLQuantizationType
    if code not in types._value2member_map_:
        raise DQError(f"GGUF file {str(cursor.path)!r}: {what} has type {code}, unknown to gguf; pip install -U gguf")
    kind = types(code)
    width, size = library().GGML_QUANT_SIZES[kind]
    if shape[-1] % width:
        raise cursor.damaged(f"{what} has rows of {shape[-1]} values, expected whole blocks of {width} of {kind.name}")
    return kind.name, shape, math.prod(shape) // width * size, offset


@dataclass(frozen=True)
class Quantized(Stored):
    """Blocks of one of ggml's types. blocks: uint8 (count, bytes); in_file: the shape whose rows they fill."""

    kind: str
    blocks: torch.Tensor
    in_file: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def kept(self) -> LayerPlan | None:  # type: ignore[override]
        fits = self.kind in blocks.KEPT and self.in_file == self.shape and len(self.shape) == 2
        return linear(blocks.KEPT[self.kind], self.shape) if fits else None

    def dense(self) -> torch.Tensor:
        kind = library().GGMLQuantizationType[self.kind]
        try:
            made = library().quants.dequantize(self.blocks.numpy(), kind)
        except NotImplementedError:
            raise DQError(f"GGUF type {self.kind} has no decoder in the package gguf; convert the file") from None
        return torch.from_numpy(np.ascontiguousarray(made, dtype=np.float32)).reshape(self.shape)

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        return blocks.packed(name, self.kind, self.blocks, self.shape[0])

    def rows(self, first: int, last: int) -> Stored:
        if self.in_file != self.shape:
            return Plain(self.dense()[first:last])
        each = len(self.blocks) // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return Quantized(self.kind, self.blocks[first * each : last * each], shape, shape)

    def release(self) -> None:
        page_out(self.blocks)
