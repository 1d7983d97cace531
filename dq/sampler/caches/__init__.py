"""Block caches: what a denoiser computed in one step serves the next ones. One kind a file, found by listing.

A plan says `kind:value`, for example `interval:2`; the value may be left out. A file exports
    VALUE, LEAST, MOST            the value when none is given, and between what it lies
    WHOLE                         whether values are whole numbers
    why_not(model)                why the cache does not fit a model, in one line; None when it does
    apply(model, value) -> names  puts diffusers' own or alike hooks on modules of the model; -> of the hooks
    line(value)                   what `dq.explain` says
Hooks are diffusers' (`diffusers.hooks`): their state is kept for each guidance branch and dropped between runs, see
`branches.py`. They lie around packed layers, adapters and fusions, which are as without them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from torch import nn

from dq.errors import DQError, nearest

ROOM = ("branches", "parts")


@cache
def files() -> dict[str, ModuleType]:
    """Modules by kind."""
    names = sorted(item.name for item in pkgutil.iter_modules(__path__) if item.name not in ROOM)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def parse(text: str) -> tuple[ModuleType, float]:
    """Kind and value of `kind[:value]`. DQError for another text."""
    name, _, given = text.partition(":")
    if name not in files():
        raise DQError(f"cache {text[:100]!r} is unknown, {nearest(name[:100], files())}")
    kind = files()[name]
    try:
        value = kind.VALUE if not given else float(given)
    except ValueError:
        value = float("nan")
    if not kind.LEAST <= value <= kind.MOST or (kind.WHOLE and value != int(value)):
        number = "a whole number" if kind.WHOLE else "a number"
        raise DQError(f"cache {text[:100]!r}: expected {number} from {kind.LEAST:g} to {kind.MOST:g} after {name!r}:")
    return kind, value


def check(model: nn.Module, text: str) -> None:
    """DQError when a cache does not fit a model."""
    kind, _ = parse(text)
    if (reason := kind.why_not(model)) is not None:
        raise DQError(f"cache {text!r}: {reason}")
    if getattr(model, "_cache_config", None) is not None:  # by diffusers' `enable_cache`
        raise DQError(f"cache {text!r}: {type(model).__name__} has a cache on already; call disable_cache() first")


def line(text: str) -> str:
    """What `dq.explain` says of a cache."""
    kind, value = parse(text)
    return kind.line(value)
