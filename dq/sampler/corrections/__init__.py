"""Kinds of corrections, one file each, found by listing this folder.

A file exports `before(values, output, sample)` -> what the scheduler's step is given in place of these two, or
`after(values, sample)` -> what is taken for the sample that the step returns, or both. `values` are those of the
running step by name, fp32 on the sample's device: () for a number a step, (channels,) for a row. It also exports
`line(values)`, what `dq.explain` says of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def files() -> dict[str, ModuleType]:
    """Modules by kind."""
    names = sorted(item.name for item in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
