"""Which rows of a file's tensors each tensor of a model is made of: as in the model, by a table, or as diffusers does.

Families without a table go by diffusers' conversion of single files, which cuts, joins and renames tensors. It is run
once on stand-ins of the same names that hold their own row numbers; where they end up says what lies where, and no
weight is read for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from dq.bridges import layouts
from dq.bridges.stored import Piece
from dq.errors import DQError

Shapes = Mapping[str, tuple[int, ...]]
WIDEST = 2**31  # rows of a tensor


def pieces(kind: type, config: Mapping[str, Any], wanted: Shapes, there: Shapes, place: str) -> dict[str, list[Piece]]:
    """Rows of the file for each of a model's tensors.

    kind: the model's class; wanted: its tensors; there: the file's; place: the file, for errors. DQError naming the
    first tensor that is missing or has another shape.
    """
    found = _as_in_the_model(wanted, there)
    layout = layouts.of(kind.__name__, config)
    if found is None and layout is not None and layout.table(config):
        found = _by_table(layout, config, wanted, there)
    elif found is None:
        found = _as_diffusers_does(kind, config, there)
    for name, shape in wanted.items():
        rows = found.get(name)
        if not rows or any(piece.name not in there for piece in rows):
            lacking = f"{rows[0].name!r}, of which {name!r} is made" if rows else repr(name)
            raise DQError(f"{place} lacks tensor {lacking}; is it a {kind.__name__} of this config?")
        _check(kind, name, shape, rows, there, place)
    return {name: found[name] for name in wanted}


def _check(kind: type, name: str, shape: tuple[int, ...], rows: list[Piece], there: Shapes, place: str) -> None:
    got = [there[piece.name] for piece in rows]
    fits = all(
        piece.last <= (size[0] if size else 1) and _row(size) == _row(shape)
        for piece, size in zip(rows, got, strict=True)
    )
    whole = sum(piece.last - piece.first for piece in rows) == (shape[0] if shape else 1)
    if not fits or not whole:
        raise DQError(f"{place}: tensor {rows[0].name!r} is {got[0]}, {kind.__name__} has {shape} of it in {name!r}")


def _row(shape: tuple[int, ...]) -> int:
    """Values of a row; a pointwise convolution is as good as a linear."""
    count = 1
    for size in shape[1:]:
        count *= size
    return count


def _as_in_the_model(wanted: Shapes, there: Shapes) -> dict[str, list[Piece]] | None:
    for prefix in layouts.PREFIXES:
        if all(prefix + name in there for name in wanted):
            return {name: [Piece(prefix + name, 0, shape[0] if shape else 1)] for name, shape in wanted.items()}
    return None


def _by_table(layout: layouts.Layout, config: Mapping[str, Any], wanted: Shapes, there: Shapes) -> dict:
    """By the table, under the prefix that most of its names are found with."""
    plain = layouts.pieces(layout.homes(wanted, config), wanted)
    stems = {
        name: [piece._replace(name=piece.name.removeprefix(layout.prefix)) for piece in rows]
        for name, rows in plain.items()
    }
    best = max(layouts.PREFIXES, key=lambda prefix: sum(prefix + rows[0].name in there for rows in stems.values()))
    return {name: [piece._replace(name=best + piece.name) for piece in rows] for name, rows in stems.items()}


def _as_diffusers_does(kind: type, config: Mapping[str, Any], there: Shapes) -> dict[str, list[Piece]]:
    """{} where diffusers has no conversion for the class, or it does more than move rows."""
    from diffusers.loaders import single_file_model

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if known is None:
        return {}
    names, stand_ins = list(there), {}
    for number, (name, shape) in enumerate(there.items()):
        rows = shape[0] if shape else 1
        stand_ins[name] = (torch.arange(rows) + number * WIDEST).reshape(rows, *[1] * (len(shape) - 1))
    convert = known["checkpoint_mapping_fn"]
    taken = inspect.signature(convert).parameters
    given = {key: value for key, value in {"config": dict(config)}.items() if key in taken or "kwargs" in taken}
    try:
        made = convert(checkpoint=stand_ins, **given)
    except Exception:  # the file is of another model, or in a layout that the conversion does not know
        return {}
    return {name: found for name, value in made.items() if (found := _read_off(value, names)) is not None}


def _read_off(value: Any, names: list[str]) -> list[Piece] | None:
    """The rows that a stand-in holds, None where it was computed with."""
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.int64 or not value.numel():
        return None
    rows = value.reshape(len(value) if value.dim() else 1, -1)
    if rows.shape[1] != 1 or int(rows.min()) < 0 or int(rows.max()) >= len(names) * WIDEST:
        return None
    flat, found = rows[:, 0], []
    cuts = [0, *((flat[1:] != flat[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(flat)]
    for start, stop in pairwise(cuts):
        number, first = divmod(int(flat[start]), WIDEST)
        found.append(Piece(names[number], first, first + stop - start))
    return found
