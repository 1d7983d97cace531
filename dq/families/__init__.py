"""Where things are in each denoiser class, as data: one small file per family, found by listing this folder.

A file exports `FAMILIES: tuple[Family, ...]`. A class that nobody described is read by `generic.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache

from torch import nn


@dataclass(frozen=True)
class Family:
    """Patterns are regular expressions matched from the start of a layer's dotted name.

    classes     names of the denoiser classes described
    blocks      attributes that hold the repeated blocks; layers elsewhere are embedders or final layers
    timestep    forward argument that carries the timestep, None without one
    modulation  layers that see one token per sample (adaLN, time projections)
    weight_only layers inside blocks whose activations stay in floating point, because rounding them costs too much
    keep        layers left in full precision
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    timestep: str | None = "timestep"
    modulation: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


@cache
def described() -> dict[str, Family]:
    """Family by denoiser class name, for every described class."""
    table = {}
    for item in pkgutil.iter_modules(__path__):
        for family in getattr(importlib.import_module(f"{__name__}.{item.name}"), "FAMILIES", ()):
            table.update(dict.fromkeys(family.classes, family))
    return table


def of(model: nn.Module) -> Family:
    """The family of a model: described if its class (or a parent class) is, else discovered."""
    for cls in type(model).__mro__:
        if cls.__name__ in described():
            return described()[cls.__name__]
    from dq.families import generic

    return generic.discover(model)
