"""Layers whose weight other code reads instead of calling the layer: found in the bytecode of the modules above them.

`nn.MultiheadAttention` multiplies with `self.out_proj.weight` itself, CLIP casts pixels to
`self.patch_embedding.weight.dtype`, resamplers convolve with `self.Conv2d_0.weight`: packed bytes in their place are
wrong. Values count where `forward` reads them, dtypes anywhere. No reader is code that asks for the device only, or
that knows of weights in integers (T5 asks whether its `wo` has them).
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from functools import cache

from torch import nn

ONCE = {"__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters"}  # before dq's time
Path = tuple[str, ...]


def read_directly(model: nn.Module) -> set[str]:
    """Dotted names of the layers whose weight is read by a method of a module that holds them."""
    found = set()
    for name, module in model.named_modules():
        for path in _paths(type(module)):
            if _has_weight(module, path):
                found.add(".".join(filter(None, (name, *path))))
    return found


def _has_weight(module: nn.Module, path: Path) -> bool:
    at: nn.Module | None = module
    for key in path:
        at = None if at is None else at._modules.get(key)
    return at is not None and at._parameters.get("weight") is not None


@cache
def _paths(kind: type) -> frozenset[Path]:
    """Attribute paths from `self` to the layers whose weight the methods of a module class read: ("out_proj",)."""
    called, found = _called(kind), set()
    for base in kind.__mro__:
        for name, value in vars(base).items() if issubclass(base, nn.Module) and base is not nn.Module else ():
            for code in () if name in ONCE else _codes(value):
                found |= {path for path, key in _reads(code) if _counts(key, code, name in called)}
    return frozenset(found)


def _counts(key: str, code: types.CodeType, runs: bool) -> bool:
    """Whether code that reads the attribute `key` ("": all) of a weight would go wrong with packed bytes."""
    if "int8" in code.co_names or key == "device":
        return False
    return "is_floating_point" not in code.co_names if key == "dtype" else runs


def _called(kind: type) -> set[str]:
    """`forward` and the names of what it calls or reads, and what these do in turn."""
    seen, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        value = getattr(kind, name, None)
        if name not in seen and vars(nn.Module).get(name) is not value:
            waiting += [key for code in _codes(value) for key in code.co_names]
        seen.add(name)
    return seen


def _codes(value) -> Iterator[types.CodeType]:
    """The bytecode of a method, a property or a wrapped method, with the functions defined in it."""
    if isinstance(value, property):
        value = value.fget
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__  # pyright: ignore[reportOptionalMemberAccess]
    waiting = [value.__code__] if isinstance(value, types.FunctionType) else []
    while waiting:
        code = waiting.pop()
        waiting += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        yield code


def _reads(code: types.CodeType) -> Iterator[tuple[Path, str]]:
    """(path from `self` to a layer, attribute of its weight that is read or "") of every `self.path.weight`."""
    path: list[str] | None = None  # of the value on the stack, None where it does not begin with self
    index = None
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP", "EXTENDED_ARG")]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step.opname.startswith("LOAD_FAST") or step.opname == "LOAD_DEREF":
            last = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            path = [] if last == "self" else None
        elif path is None:
            continue
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if step.argval == "weight" and path:
                yield tuple(path), after.argval if after is not None and after.opname == "LOAD_ATTR" else ""
            path.append(step.argval)
        elif isinstance(step.argval, int) and step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            index = str(step.argval)
        elif index is not None and (step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"):
            path.append(index)
            index = None
        else:
            path = None
