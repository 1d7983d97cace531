"""Attention modules of a model on dq's kernels: found by their structure, switched at run time, never saved.

Every model reaches `F.scaled_dot_product_attention` its own way: through processors, through diffusers' dispatch, or
from its forward. While an attached module runs, a `TorchFunctionMode` stands in for that one function; everything else
passes through. `torch.compile` traces the mode like other code. Nothing is added to parameters, buffers or submodules,
so state dicts, saving, copies and hooks are as before.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dq import kernels
from dq.fusions import takeover
from dq.kernels.cpu import attention as cpu

REACH = frozenset(("scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS"))
ROLE = "attention"


class _Attention(TorchFunctionMode):
    """Calls of torch's attention go to dq's kernel."""

    def __init__(self, int8: bool):
        super().__init__()
        self.int8 = int8

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return cpu.sdpa(*args, **kwargs, int8=self.int8)
        if func is torch.Tensor.unflatten:  # it calls super(), which torch.compile follows from a method call only
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _attend(module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of an attached module (see `takeover`)."""
    if kernels.selected() not in ("auto", "cpu"):
        return inner(*args, **kwargs)
    with _Attention(module._dq_attention == "int8"):
        return inner(*args, **kwargs)


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything that has a processor, or whose forward names one of the ways to attention."""
    for name, module in model.named_modules():
        if callable(getattr(module, "processor", None)) or _reached(type(module)) & REACH:
            yield name, module


def _reached(kind: type) -> set[str]:
    """Global and attribute names in a module class's forward and in the methods of its own that it calls."""
    seen, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        if name not in seen and isinstance(method, types.FunctionType) and vars(nn.Module).get(name) is not method:
            waiting += method.__code__.co_names
        seen.add(name)
    return seen


def attach(model: nn.Module, int8: bool = False) -> list[str]:
    """Run the attention of a model on dq's CPU kernels; -> names of the modules, [] where there are no kernels.

    int8  products of bytes instead of bf16. Calls the kernel cannot take (see `why_not`) run on torch's attention.
    """
    detach(model)
    if why_not() is not None:
        return []
    names = []
    for name, module in attention_modules(model):
        names.append(name)
        vars(module)["_dq_attention"] = "int8" if int8 else "bf16"
        takeover.take(module, ROLE, _attend)
    return names


def detach(model: nn.Module) -> None:
    """Undo `attach`; a model that is not attached stays as it is."""
    for module in model.modules():
        takeover.give_back(module, ROLE)
        vars(module).pop("_dq_attention", None)


def attached(model: nn.Module) -> dict[str, str]:
    """Precision ("bf16" or "int8") of every attached module by name."""
    kinds = ((name, vars(module).get("_dq_attention")) for name, module in model.named_modules())
    return {name: kind for name, kind in kinds if kind}


def why_not() -> str | None:
    """Why no attention can run on dq's kernels here, in one line; None when some can."""
    return cpu.missing()
