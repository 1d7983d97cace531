"""Attention modules of a model on dq's kernels: found by their structure, switched at run time, never saved.

Every model reaches `F.scaled_dot_product_attention` its own way: through processors, through diffusers' dispatch, or
from its forward. While an attached module runs, a `TorchFunctionMode` stands in for that one function; everything else
passes through. `torch.compile` traces the mode like other code. Nothing is added to parameters, buffers or submodules,
so state dicts, saving, copies and hooks are as before.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dq import kernels
from dq.fusions import backends
from dq.kernels.cpu import attention as cpu
from dq.kernels.cpu import library
from dq.layers import notes, takeover

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
    own = notes.read(module)
    given = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    if given is not None and given.device.type != "cpu":  # moved there since: no mode around its calls
        return inner(*args, **kwargs)
    if (own.backend or kernels.selected()) not in ("auto", "cpu"):
        return inner(*args, **kwargs)
    with _Attention(own.attention == "int8"):
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
    """Run the attention of a model on dq's CPU kernels; -> names of the modules that can (see `why_not`).

    int8  products of integers; otherwise of floats, as exact as torch's attention in the dtype of the inputs, and
          called "bf16" whichever that is. Calls that the kernel cannot take, or where torch is faster, are torch's.
    """
    detach(model)
    names = []
    for name, module in attention_modules(model):
        if why_not(module, model) is None:
            names.append(name)
            notes.write(module, attention="int8" if int8 else "bf16")
            takeover.take(module, ROLE, _attend)
    return names


def detach(model: nn.Module) -> None:
    """Undo `attach`; a model that is not attached stays as it is."""
    for module in model.modules():
        takeover.give_back(module, ROLE)
        if notes.read(module).attention:
            notes.write(module, attention="")


def attached(model: nn.Module) -> dict[str, str]:
    """Precision of every attached module by name: "int8", or "bf16" for that of the inputs, fp32 and fp16 included."""
    kinds = ((name, notes.read(module).attention) for name, module in model.named_modules())
    return {name: kind for name, kind in kinds if kind}


def why_not(*modules: nn.Module) -> str | None:
    """Why attention cannot run on dq's kernels, in one line; None when it can.

    modules  a module, then what it is part of: the first with parameters says where they run; without any, here
    """
    found = next(filter(None, map(places, modules)), {"cpu"})
    return cpu.missing() if "cpu" in found else f"its weights are on {', '.join(sorted(found))}"


def lines(model: nn.Module) -> list[str]:
    """Lines for `dq.explain`: which kernels attention runs on now, and why not on dq's."""
    kinds, reasons, on_gpu = Counter(), Counter(), "cuda" in places(model)
    for _, module in attention_modules(model):
        if on_gpu and backends.attached(module):
            continue  # `backends` has lines for these
        kind, reason = notes.read(module).attention, why_not(module, model)
        if kind and not reason:
            kinds[kind] += 1
        else:
            reasons[reason or "dq's was not attached where the model was when it was quantized or loaded"] += 1
    words, on = {"bf16": "as exact as torch's", "int8": "in int8"}, library.UNITS.get(library.level())
    found = [f"attention runs on dq's kernels on {on}: {count} modules {words[kind]}" for kind, count in kinds.items()]
    found += ["attention stays torch's in calls so small that it is faster there"] * bool(kinds)
    return found + [f"attention is torch's in {count} modules: {reason}" for reason, count in reasons.items()]


def places(module: nn.Module) -> set[str]:
    """Types of the devices where a module's parameters are, or where accelerate brings them for a call."""
    found = set()
    for part in module.modules():
        brought = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if brought is not None and part._parameters:
            found.add("cuda" if isinstance(brought, int) else torch.device(brought).type)
        else:
            found |= {parameter.device.type for parameter in part.parameters(recurse=False)}
    return found
