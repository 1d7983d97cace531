"""Names of a model's layers, the same whether adapters are attached to them or not.

An adapter of peft takes the place of the layer it adapts and holds it as `base_layer`, beside factors of its own. Here
the layer keeps its name, and what belongs to the adapter has none: a plan says `to_q`, never `to_q.base_layer`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

BASE = "base_layer"


def inner(module: nn.Module) -> nn.Module:
    """The layer within the adapters on it; a module without adapters itself."""
    while adapts(module):
        module = module._modules[BASE]  # pyright: ignore[reportAssignmentType]
    return module


def adapts(module: nn.Module) -> bool:
    """Whether a module is an adapter around a layer."""
    return module._modules.get(BASE) is not None and hasattr(type(module), "get_base_layer")


def at(model: nn.Module, name: str) -> nn.Module:
    """The layer of a dotted name. AttributeError when there is none."""
    return inner(model.get_submodule(name))


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(module, key) that that holds the layer or parameter of a dotted name. AttributeError without the module."""
    home, _, key = name.rpartition(".")
    owner = at(model, home)
    while (child := owner._modules.get(key)) is not None and adapts(child):
        owner, key = child, BASE
    return owner, key


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) as `named_modules` gives them, of the model without its adapters."""
    yield from _named("", model, set())


def _named(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = inner(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _named(f"{name}.{key}" if name else key, child, seen)
