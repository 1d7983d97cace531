"""The header of a safetensors file, without torch and without reading a tensor.

A file is 8 bytes, the length of its header (little-endian), the header (JSON: tensor name -> dtype, shape, byte range;
`__metadata__`: text -> text) and the tensors, one after the other without gaps.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from dq.errors import DQError

MOST_BYTES = 100_000_000  # of a header; safetensors itself reads no longer ones


class Entry(NamedTuple):
    """One tensor: its shape, and the bytes it takes."""

    shape: tuple[int, ...]
    size: int


def read(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """-> (every tensor by name, metadata). DQError naming a file that is missing, truncated or no safetensors file."""
    try:
        header, left = _header(Path(path))
        metadata = header.pop("__metadata__", {})
        entries, end = {}, 0
        for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = row["data_offsets"]
            entries[name] = Entry(tuple(row["shape"]), stop - start)
            if start != end or stop < start:
                raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
            end = stop
        if end != left:
            raise ValueError(f"it holds {left} bytes of tensors, its header names {end}")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DQError(f"weights file {str(path)!r} is missing or damaged: {error}; copy it again") from None
    return entries, metadata


def _header(path: Path) -> tuple[dict, int]:
    """The header of a file, and how many bytes follow it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        left = path.stat().st_size - 8 - length
        if left < 0 or length > MOST_BYTES:
            raise ValueError(f"its header would take {length} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, left
