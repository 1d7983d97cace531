"""Saved models written as other libraries read them. A target is one module here that exports
NAME                  as `dq export --to` takes it
write(source, out)    a saved quantized pipeline or denoiser, into an empty folder; DQError for what it cannot hold; ->
                      lines for people, or None
restrict(recipe)      optional: the recipe with what the target holds alone, for `dq quantize --for`; DQError when
                      nothing is left
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from dq.errors import DQError, nearest


@cache
def targets() -> dict[str, ModuleType]:
    """Modules by the name of their target."""
    found = [importlib.import_module(f"{__name__}.{item.name}") for item in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in found}


def get(name: str, option: str = "--to") -> ModuleType:
    """The module of a target that an option names. DQError for unknown names."""
    if name not in targets():
        raise DQError(f"{option} {name!r} is unknown, {nearest(name, targets())}")
    return targets()[name]
