"""Milliseconds of every layer under every choice, measured on this machine at the shapes the model really sees.

Layers of the same shape share one measurement. Figures are kept in the table of `dq.kernels.times`, so that a second
search on the same machine measures nothing.
"""

from __future__ import annotations

import json
import statistics
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from dq import kernels, timing
from dq.budget.choices import Choice, label
from dq.budget.predictions import Predictions
from dq.budget.sensitivity import packed
from dq.kernels import choice as choosing
from dq.kernels import times
from dq.layers import naming
from dq.plan import LayerPlan, Plan
from dq.trace.units import replaced, tensors_in

SECONDS = 0.3  # spent on the choices of one shape, all in turn
COPIES_BYTES = 2**27  # layers of the same shape that take turns, so that weights come from memory as in the model
MOST_COPIES = 8


class Costs:
    """Measured milliseconds of one model's layers.

    ms     by layer: a figure per choice, one call of the model
    fixed  what one call of the model takes beyond the sum of its layers, each alone: everything between them, and
           what they cost each other in caches and memory; measured with all layers in the recipe's own formats
    calls  of the model per step
    """

    def __init__(self, ms: Mapping[str, Sequence[float]], fixed: float, calls: float):
        self.ms = dict(ms)
        self.fixed = fixed
        self.calls = calls


@torch.inference_mode()
def measure(
    model: nn.Module,
    menus: Mapping[str, Sequence[Choice]],
    predictions: Predictions,
    plan: Plan,
    progress: bool = True,
) -> Costs:
    """Time every distinct (layer shape, input shape, choice), and a whole call with all layers as in the plan."""
    dtype = plan.dtype
    args, kwargs = predictions.call(len(predictions.keys) // 2)
    inputs = _inputs(model, menus, args, kwargs)
    table = times.table(next(model.parameters()).device)
    how = f"budget {dtype} {kernels.selected()} {choosing.mode()}"
    ms = {}
    alike: dict[str, list[str]] = {}
    for name, shape in inputs.items():
        alike.setdefault(f"{how} {_shape_key(naming.at(model, name), shape)}", []).append(name)
    for key, names in tqdm(alike.items(), desc="time layers", disable=not progress, delay=2):
        choices = {label(choice): choice for name in names for choice in menus[name]}
        missing = {text: choice for text, choice in choices.items() if (key, text) not in table}
        if missing:
            modules = [naming.at(model, name) for name in names]
            table.add(key, _time(modules, missing, inputs[names[0]], dtype))
        for name in names:
            ms[name] = [table[key, label(choice)] for choice in menus[name]]
    for name in menus.keys() - ms.keys():  # experts, or never called
        ms[name] = [0.0] * len(menus[name])
    whole = _whole(model, {name: plan.layers[name] for name in inputs}, dtype, args, kwargs)
    alone = sum(ms[name][menus[name].index(plan.layers[name])] for name in inputs)
    return Costs(ms, whole - alone, predictions.calls_per_step)


def _inputs(model: nn.Module, menus: Mapping, args: tuple, kwargs: dict) -> dict[str, torch.Size]:
    """Input shape of every layer in one call, in order of the call; layers that it does not reach are missing."""
    shapes: dict[str, torch.Size] = {}

    def watch(name: str):
        return lambda module, given, output: shapes.setdefault(name, given[0].shape) and None

    names = [name for name, choices in menus.items() if choices[-1] is None or choices[-1].kind != "stack"]
    hooks = [naming.at(model, name).register_forward_hook(watch(name)) for name in names]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _shape_key(module: nn.Module, shape: torch.Size) -> str:
    settings = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")]
    sizes = [list(module.weight.shape), list(shape), module.bias is not None]
    return json.dumps([type(module).__name__, *sizes, settings])


def _time(modules: Sequence[nn.Module], choices: Mapping[str, Choice], shape: torch.Size, dtype: torch.dtype) -> dict:
    """Median milliseconds of each choice, over copies of the layer that together do not fit a cache."""
    size = modules[0].weight.numel() * modules[0].weight.element_size()
    modules = modules[: max(1, min(MOST_COPIES, COPIES_BYTES // max(size, 1)))]
    x = torch.randn(shape, dtype=dtype, device=modules[0].weight.device)
    runs = {}
    for text, choice in choices.items():
        made = [module if choice is None else packed("timed", module, choice, dtype) for module in modules]
        runs[text] = lambda made=made: [layer(x) for layer in made]
    times = timing.in_turn(runs, SECONDS)
    return {text: statistics.median(values) / len(modules) for text, values in times.items()}


def _whole(model: nn.Module, plans: Mapping[str, LayerPlan], dtype: torch.dtype, args: tuple, kwargs: dict) -> float:
    """Median milliseconds of a call of the model with layers rounded as planned."""
    modules = {name: naming.at(model, name) for name in plans}
    forwards = {module: packed(name, module, plans[name], dtype).forward for name, module in modules.items()}
    with replaced(forwards):
        times = timing.in_turn({"whole": lambda: model(*args, **kwargs)}, SECONDS * 5)
    return statistics.median(times["whole"])


@torch.inference_mode()
def held_bytes(model: nn.Module, predictions: Predictions) -> int:
    """The most that one call of the model holds beside its parameters, inputs included."""
    args, kwargs = predictions.call(0)
    with _Held() as held:
        model(*args, **kwargs)
    return held.most + sum(value.numel() * value.element_size() for value in tensors_in((args, kwargs)))


class _Held(TorchDispatchMode):
    """Bytes of the storages made inside the block that are alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {value.untyped_storage()._cdata for value in tensors_in((args, kwargs or {}))}
        output = func(*args, **(kwargs or {}))
        for value in tensors_in(output):
            storage = value.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return output

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
