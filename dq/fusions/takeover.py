"""Another forward for a module while it is wanted: held by the instance, below hooks that replace forward, not saved.

A module may have several roles, each `role(module, inner, *args, **kwargs)`; the one taken last is the outermost.
Parameters, buffers and submodules stay as they are; copies of a module keep its roles.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

from torch import nn

SLOTS = ("_old_forward", "forward")  # accelerate's hooks keep the forward they replaced in the first


def forward(self, *args, **kwargs):
    """The forward of a module with roles. It has this name so that a pickled module finds its class's own again."""
    inner = self._dq_forward
    for role in self._dq_roles.values():
        inner = functools.partial(role, self, inner)
    return inner(*args, **kwargs)


def take(module: nn.Module, name: str, role: Callable) -> None:
    """Give a module a role. `name` is what `give_back` knows it by."""
    own = vars(module)  # not setattr: it looks for parameters and submodules
    if "_dq_forward" not in own:
        slot = next((slot for slot in SLOTS if slot in own), "forward")
        own["_dq_forward"], own["_dq_roles"] = own.get(slot, module.forward), {}
        own[slot] = types.MethodType(forward, module)
    own["_dq_roles"].pop(name, None)
    own["_dq_roles"][name] = role


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has a role."""
    return name in vars(module).get("_dq_roles", ())


def give_back(module: nn.Module, name: str) -> None:
    """Take a role away; without any left the module has the forward it had before."""
    own = vars(module)
    if not has(module, name):
        return
    del own["_dq_roles"][name]
    slot = next((slot for slot in SLOTS if getattr(own.get(slot), "__func__", None) is forward), None)
    if own["_dq_roles"] or slot is None:
        return  # without a slot a hook holds our method, which from now on passes through
    before = own.pop("_dq_forward")
    del own["_dq_roles"]
    if slot == "forward" and getattr(before, "__func__", None) is type(module).forward:
        del own[slot]  # the class has it
    else:
        own[slot] = before
