"""Finding what runs around a model: a file a system, found by listing this folder. `Recipe.sampler` names one.

A file exports `find(search)` -> (Correction or None, lines for the report): what the system adds to a pipeline whose
models are quantized by then, by scored runs (see `runs.Search`); and NEEDS_PAIRS, whether it looks at the
full-precision pipeline's own runs even where the user gives a score.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

ROOM = ("adding", "descent", "runs")  # what the systems share


@cache
def files() -> dict[str, ModuleType]:
    """Modules of the systems by name."""
    names = sorted(item.name for item in pkgutil.iter_modules(__path__) if item.name not in ROOM)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}
