"""Another forward for a module while it is wanted: held by the instance, below hooks that replace forward, not saved.

A module may have several roles, each `role(module, inner, *args, **kwargs)`; the one taken last is the outermost.
Parameters, buffers and submodules stay as they are; copies of a module keep its roles.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from torch import nn

from dq.layers import notes

SLOTS = ("_old_forward", "forward")  # accelerate's hooks keep the forward they replaced in the first


def take(module: nn.Module, name: str, role: Callable) -> None:
    """Give a module a role. `name` is what `give_back` knows it by."""
    found, own = notes.read(module), vars(module)
    if found.forward is None:
        slot = next((slot for slot in SLOTS if slot in own), "forward")
        found = notes.write(module, forward=own.get(slot, module.forward))
        own[slot] = types.MethodType(notes.forward, module)
    found.roles.pop(name, None)
    found.roles[name] = role


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has a role."""
    return name in notes.read(module).roles


def give_back(module: nn.Module, name: str) -> None:
    """Take a role away; without any left the module has the forward it had before."""
    if not has(module, name):
        return
    own, found = vars(module), notes.read(module)
    del found.roles[name]
    slot = next((slot for slot in SLOTS if getattr(own.get(slot), "__func__", None) is notes.forward), None)
    if found.roles or slot is None:
        return  # without a slot a hook holds our method, which from now on passes through
    before = found.forward
    notes.write(module, forward=None)
    if slot == "forward" and getattr(before, "__func__", None) is type(module).forward:
        del own[slot]  # the class has it
    else:
        own[slot] = before
