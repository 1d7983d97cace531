"""The header of a safetensors file, without torch and without reading a tensor.

A file is 8 bytes, the length of its header (little-endian), the header (JSON: tensor name -> dtype, shape, byte range;
`__metadata__`: text -> text) and the tensors, one after the other without gaps.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dq.disk import parse
from dq.errors import DQError

MOST_BYTES = 100_000_000  # of a header; safetensors itself reads no longer ones


class Entry(NamedTuple):
    """One tensor: its shape, and the bytes it takes."""

    shape: tuple[int, ...]
    size: int


def read(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """-> (every tensor by name, in the order of the file, metadata).

    DQError naming a file that is missing, truncated or no safetensors file.
    """
    from dq import schema

    try:
        found, left = _header(Path(path))
        metadata = found.pop("__metadata__", {})
        schema.check("texts", metadata, "its metadata")
        schema.check("header", found, "its header")
        entries, end = {}, 0
        for name, row in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = row["data_offsets"]
            entries[name] = Entry(tuple(row["shape"]), stop - start)
            if start != end or stop < start:
                raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
            end = stop
        if end != left:
            raise ValueError(f"it holds {left} bytes of tensors, its header names {end}")
    except (OSError, ValueError) as error:  # DQError among them
        raise DQError(f"weights file {str(path)!r} is missing or damaged: {error}; copy it again") from None
    return entries, metadata


def checksums(path: str | Path, entries: Mapping[str, Entry], names: Container[str]) -> Iterator[tuple[str, int]]:
    """(name, crc32 of its bytes) of some tensors of a file, whose `entries` `read` gave; a MiB in memory at once."""
    buffer = memoryview(bytearray(2**20))
    with Path(path).open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for name, entry in entries.items():
            if name not in names:
                file.seek(entry.size, os.SEEK_CUR)
                continue
            value, left = 0, entry.size
            while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
                value, left = zlib.crc32(buffer[:count], value), left - count
            yield name, value


def rewrite(path: Path, metadata: Mapping[str, str]) -> None:
    """Give a file these metadata. The header keeps its length where they fit, so that no tensor moves."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length))
        rows = {name: row for name, row in found.items() if name != "__metadata__"}
        found = ({"__metadata__": dict(metadata)} if metadata else {}) | rows
        text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
            return
        longer = path.with_name(f".{path.name}.longer")
        text = text.ljust(-(-len(text) // 8) * 8)
        with longer.open("wb") as fresh:
            fresh.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(file, fresh, 2**20)
    longer.replace(path)


def _header(path: Path) -> tuple[dict, int]:
    """The header of a file, and how many bytes follow it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        left = path.stat().st_size - 8 - length
        if left < 0 or length > MOST_BYTES:
            raise ValueError(f"its header would take {length} bytes")
        header = parse(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, left
