"""GELU in the product before it: gelu_tanh(x W^T + b) as the epilogue of one kernel.

A module is fused when it is one packed linear and a tanh GELU of its output, which a probe shows. At every call the
fused path is taken only while nothing has come between: an adapter or a hook on the linear, gradients, another kernel.
The linear is still called as a module, so that offloading works, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dq.layers import PackedLinear, takeover

PROBE_ROWS = 2
ROLE = "gelu"


def attach(model: nn.Module) -> None:
    """Fuse every module that is one packed linear and a tanh GELU; parameters and submodules stay as they are."""
    for module in model.modules():
        if _is_activation(module):
            takeover.take(module, ROLE, _activate)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        takeover.give_back(module, ROLE)


def attached(model: nn.Module) -> int:
    """Number of fused modules whose linear has a kernel with the epilogue."""
    return sum(takeover.has(module, ROLE) and _has_kernel(_linear_of(module)) for module in model.modules())


def _linear_of(module: nn.Module) -> PackedLinear | None:
    """The packed linear that is a module's only child and holds all its parameters."""
    children = list(module.children())
    if len(children) != 1 or not isinstance(children[0], PackedLinear) or module._parameters or module._buffers:
        return None
    return children[0]


@torch.no_grad()
def _is_activation(module: nn.Module) -> bool:
    """Whether the module is gelu_tanh(linear(x)), to the bit, whatever the linear gives (so no weight is needed)."""
    linear = _linear_of(module)
    if linear is None:
        return False
    dice = torch.Generator().manual_seed(0)
    x, y = (torch.randn(PROBE_ROWS, size, generator=dice) for size in (linear.in_features, linear.out_features))
    hooked = vars(linear).get("forward")
    vars(linear)["forward"] = lambda given: y
    try:
        return torch.equal(type(module).forward(module, x), F.gelu(y, approximate="tanh"))
    except (TypeError, ValueError, RuntimeError):  # another signature or shape: another kind of module
        return False
    finally:
        del vars(linear)["forward"]
        if hooked is not None:
            vars(linear)["forward"] = hooked


def _has_kernel(linear: PackedLinear | None) -> bool:
    """Whether the kernel of a linear ends in a GELU, and nothing comes between: a stored output has none yet."""
    return linear is not None and linear.start_in is None and linear.choice.gelu is not None


def _can_fuse(linear: nn.Module, x: torch.Tensor) -> bool:
    """Nothing has come between the module and its packed linear, and the linear's kernel has the epilogue."""
    if not isinstance(linear, PackedLinear) or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    linear.ready(x.device)
    return _has_kernel(linear) and not (torch.is_grad_enabled() and x.requires_grad)


def _activate(module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of a fused activation (see `takeover`)."""
    if len(args) == 1 and not kwargs:
        (linear,) = module.children()
        if _can_fuse(linear, args[0]):
            return linear(args[0], then_gelu=True)
    return inner(*args, **kwargs)
