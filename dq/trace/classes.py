"""The classes whose values may stand in records: a closed list, told by name, found without importing anything.

Classes of dq stand there by a short kind, since their modules may move; those of other libraries by `module:name`. A
name is looked up in what the running program has imported already, never imported, and a value is made without running
code of its class: only outputs of diffusers and transformers are made by their own constructors. So a folder of
somebody else can name nothing that would run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

KINDS: dict[str, type] = {}  # classes of dq that may be stored; see `storable`
HOSTS = ("diffusers", "transformers")
OUTPUTS = ("BaseOutput", "ModelOutput")  # what their outputs are made from
Class = TypeVar("Class", bound=type)


def storable(kind: str) -> Callable[[Class], Class]:
    """Decorator of a NamedTuple or dataclass of dq that stands in stores as `kind`."""

    def enter(cls: Class) -> Class:
        KINDS[kind] = cls
        return cls

    return enter


def fields(cls: Any) -> list[str] | None:
    """Fields of a NamedTuple or dataclass, [] for another kind of dict, None for what cannot be made again."""
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return list(cls._fields) or None  # pyright: ignore[reportAttributeAccessIssue]
    if dataclasses.is_dataclass(cls):
        own = cls in KINDS.values() or _is_output(cls)
        return [field.name for field in dataclasses.fields(cls) if field.init or not own] or None
    return [] if issubclass(cls, dict) and not issubclass(cls, defaultdict) else None


def whole(value: Any) -> bool:
    """Whether the fields of a value are all there is to it."""
    return _is_output(type(value)) or set(getattr(value, "__dict__", ())) <= set(fields(type(value)) or ())


def name(cls: type) -> str:
    """What a class is called in a store: its kind, or `module:name` outside of dq."""
    return next((kind for kind, known in KINDS.items() if known is cls), f"{cls.__module__}:{cls.__qualname__}")


def find(path: str) -> type | None:
    """The class of a name in a store; None for one that is not known here, or that nobody has imported."""
    module, _, inside = path.partition(":")
    if not inside or module.partition(".")[0] == "dq":
        return KINDS.get(path)
    found: Any = sys.modules.get(module)
    for part in inside.split("."):
        found = (
            vars(found).get(part) if hasattr(found, "__dict__") else None
        )  # no getattr: modules answer it with code
    return found if isinstance(found, type) else None


def build(cls: type, content: Sequence | Mapping) -> Any:
    """A value of a class from its fields in order, or of another kind of dict from its items.

    ValueError when their number is not right.
    """
    names = fields(cls)
    if names and len(names) != len(content):
        raise ValueError(f"{cls.__name__} has {len(names)} fields, got {len(content)}")
    if cls in KINDS.values() or _is_output(cls):
        return cls(**dict(zip(names or (), content, strict=True)))
    if issubclass(cls, tuple):
        return tuple.__new__(cls, content)
    base: Any = OrderedDict if issubclass(cls, OrderedDict) else dict if issubclass(cls, dict) else object
    value: Any = base.__new__(cls)
    for key, item in zip(names, content, strict=True) if names else dict(content).items():
        object.__setattr__(value, key, item) if names else base.__setitem__(value, key, item)
    return value


def _is_output(cls: type) -> bool:
    """Whether a class is an output of diffusers or transformers, and defined there."""
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in cls.__mro__}
    known = any((host, output) in bases for host in HOSTS for output in OUTPUTS)
    return known and cls.__module__.partition(".")[0] in HOSTS and dataclasses.is_dataclass(cls)
