"""Damage to files, drawn from a seed: bytes flipped, cut, repeated or swapped; JSON with other values in it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD = (
    None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "../../outside", "/etc/passwd", "os:system",
    "load", "int8/group:99999999999999", [], [[]], {}, {"x": 1}, "9" * 5000, ["int8"] * 3, [1] * 70, "\ud800", "\x00",
)  # fmt: skip
DEEP = "[" * 100_000


def bytes_of(content: bytes, seed: int) -> bytes:
    """A file's content with one damage."""
    dice = random.Random(seed)
    place = dice.randrange(len(content) or 1)
    return dice.choice(
        [
            lambda: content[:place],
            lambda: content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :],
            lambda: content[:place] + dice.randbytes(dice.randrange(1, 40)) + content[place:],
            lambda: content[:place] + content[place // 2 :],
            lambda: content[place:] + content[:place],
            lambda: b"",
            lambda: dice.randbytes(64),
            lambda: DEEP.encode(),
        ]
    )()


def values(data: Any, count: int, seed: int) -> Iterator[Any]:
    """JSON trees with one value replaced, dropped or added at a place drawn at random."""
    dice = random.Random(seed)
    text = json.dumps(data)
    for _ in range(count):
        tree = json.loads(text)
        holder, key = dice.choice(list(_places(tree)))
        if isinstance(holder, dict) and dice.random() < 0.2:
            del holder[key]
        elif isinstance(holder, dict) and dice.random() < 0.2:
            holder[dice.choice(["x", "", "../x", "weight", "a" * 2000])] = dice.choice(ODD)
        else:
            holder[key] = dice.choice(ODD)
        yield tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
