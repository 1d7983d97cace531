"""What dq writes on a user's module, in one place: `vars(module)["_dq"]`, neither saved nor a parameter."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from dq.attentionplan import AttentionPlan

if TYPE_CHECKING:
    from dq.plan import Plan

KEY = "_dq"


@dataclass
class Notes:
    """What is known of one module; copies of the module take it along.

    plan       of a quantized model that is neither of diffusers nor of transformers
    forward    the forward that stands below the roles, None while there are none
    roles      what runs around it, by name, the outermost last
    attention  what a module's attention is rounded to, nothing included, where it may be dq's; else None
    backend    name of the kernel backend that was set for its model alone, None: the process's default
    """

    plan: Plan | None = None
    forward: Callable | None = None
    roles: dict[str, Callable] = field(default_factory=dict)
    attention: AttentionPlan | None = None
    backend: str | None = None

    def __setstate__(self, state: dict) -> None:
        """Of a module that is read from a pickle: its own forward is pickled by name, so the name must be ours again.

        A module's notes are written, and thus read, before what they say about its forward is done.
        """
        vars(self).update(state)
        owner = getattr(self.forward, "__self__", None)
        if self.roles and owner is not None:
            vars(owner)["forward"] = types.MethodType(forward, owner)


def forward(self, *args, **kwargs):
    """The forward of a module with roles. It has this name so that it is pickled as the module's forward."""
    own = read(self)
    inner = own.forward
    for role in own.roles.values():
        inner = functools.partial(role, self, inner)
    return inner(*args, **kwargs)  # pyright: ignore[reportOptionalCall]


NOTHING = Notes()


def read(module: nn.Module) -> Notes:
    """The notes on a module; empty ones, not to be changed, where there are none."""
    return vars(module).get(KEY, NOTHING)


def write(module: nn.Module, **values) -> Notes:
    """Set fields of a module's notes; a module whose notes say nothing any more carries none."""
    own = vars(module)  # not setattr: it looks for parameters and submodules
    found = own.setdefault(KEY, Notes())
    for name, value in values.items():
        setattr(found, name, value)
    if found == NOTHING:
        del own[KEY]
    return found
