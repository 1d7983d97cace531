"""Milliseconds of every layer under every choice, measured on this machine inside calls of the model itself.

A layer alone misleads: its input is in the cache, nothing drives out its weights and its code, and the plans of a
budget came out 15 to 30 % slower than their sums said. So the model is called with layers in mixed formats, a clock at
each of them, and from pass to pass every layer moves on to its next choice. Layers of the same shape share their
figures, which are kept in the table of `dq.kernels.times`: a second search on the same machine runs MIXED passes.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from dq import kernels, timing
from dq.budget import margins
from dq.budget.choices import Choice, label
from dq.budget.predictions import Predictions
from dq.kernels import choice as choosing
from dq.kernels import times
from dq.layers import naming, pack
from dq.plan import Plan
from dq.trace.units import replaced, tensors_in

SECONDS = 0.5  # of calls in one pass, in which every layer has one choice
LEAST = 3  # calls of a pass
MIXED = 3  # passes of mixed formats where there is nothing new to measure
SEED = 0


class Costs:
    """Measured milliseconds of one model's layers.

    ms     by layer: a figure per choice, one call of the model
    fixed  what one call of the model takes beyond the sum of its layers: everything between them. A layer slower than
           full precision also holds up what comes after it; that is in its own figure
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
    """Time every distinct (layer shape, input shape, choice) in calls of the model, and what is between the layers."""
    dtype = plan.dtype
    args, kwargs = predictions.call(len(predictions.keys) // 2)
    inputs = _inputs(model, menus, args, kwargs)
    table = times.table(next(model.parameters()).device)
    how = f"budget {dtype} {kernels.selected()} {choosing.mode()}"
    keys = {name: f"{how} {_shape_key(naming.at(model, name), shape)}" for name, shape in inputs.items()}
    new = {name: [c for c in menus[name] if (keys[name], label(c)) not in table] for name in inputs}
    ends: list[dict[str, Choice]] = [{name: plan.layers[name] for name in inputs}, dict.fromkeys(inputs)]
    found: dict[str, dict[str, list[float]]] = {}
    passes = [*ends, *_passes(new, {name: menus[name] for name in inputs})]
    wholes = []
    for chosen in tqdm(passes, desc="time layers", disable=not progress, delay=2):
        spent, whole = _timed(model, chosen, dtype, lambda: model(*args, **kwargs))
        wholes.append(whole)
        for name, ms in spent.items():
            found.setdefault(keys[name], {}).setdefault(label(chosen[name]), []).append(ms)
    for key, mine in found.items():
        table.add(key, {text: statistics.mean(values) for text, values in mine.items()})
    taken = {name: {choice: table[keys[name], label(choice)] for choice in (None, *menus[name])} for name in inputs}
    fixed, more = _between(passes, taken, wholes)
    ms = {name: [_with_more(taken[name], choice, more) for choice in menus[name]] for name in inputs}
    for name in menus.keys() - ms.keys():  # experts, or never called
        ms[name] = [0.0] * len(menus[name])
    return Costs(ms, fixed, predictions.calls_per_step)


def _between(passes: Sequence[Mapping[str, Choice]], taken: Mapping, wholes: Sequence[float]) -> tuple[float, float]:
    """Milliseconds of a call beside its layers: whole - sum = fixed + more * excess, by least squares.

    excess: milliseconds of a pass beyond full precision in the layers that are slower than it. What they unpack drives
    out of the caches what stands between layers. fixed is the mean of the first two passes, between which a budget in
    time moves: all layers in the recipe's own formats, and in full precision.
    """
    rests = [
        whole - sum(taken[name][choice] for name, choice in chosen.items())
        for whole, chosen in zip(wholes, passes, strict=True)
    ]
    excess = [sum(_excess(taken[name], choice) for name, choice in chosen.items()) for chosen in passes]
    square = sum(x * x for x in excess)
    fixed = statistics.mean(rests[:2])
    slope = sum(x * (rest - fixed) for x, rest in zip(excess, rests, strict=True)) / square if square else 0.0
    return fixed, max(slope, 0.0)


def _excess(taken: Mapping[Choice, float], choice: Choice) -> float:
    return max(taken[choice] - taken[None], 0.0)


def _with_more(taken: Mapping[Choice, float], choice: Choice, more: float) -> float:
    return taken[choice] + more * _excess(taken, choice)


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


@torch.inference_mode()
def products(model: nn.Module, menus: Mapping[str, Sequence[Choice]], predictions: Predictions) -> dict[str, int]:
    """Multiplications of every layer in one call of the model; layers that it does not reach are missing."""
    counts: dict[str, int] = {}

    def watch(name: str, each: int):
        def count(module, given, output) -> None:
            counts[name] = counts.get(name, 0) + output.numel() * each

        return count

    args, kwargs = predictions.call(len(predictions.keys) // 2)
    found = {name: menu[-1] for name, menu in menus.items() if menu[-1] is not None and menu[-1].kind != "stack"}
    hooks = [naming.at(model, name).register_forward_hook(watch(name, plan.columns)) for name, plan in found.items()]
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _shape_key(module: nn.Module, shape: torch.Size) -> str:
    settings = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")]
    sizes = [list(module.weight.shape), list(shape), module.bias is not None]
    return json.dumps([type(module).__name__, *sizes, settings])


def _passes(new: Mapping[str, Sequence[Choice]], menus: Mapping[str, Sequence[Choice]]) -> Iterator[dict[str, Choice]]:
    """A choice per layer and pass, each layer in an order of its own, until all had their new ones; at least MIXED."""
    dice = random.Random(SEED)
    orders = {name: dice.sample(new[name] or menus[name], len(new[name] or menus[name])) for name in menus}
    for i in range(max(MIXED, *(len(choices) for choices in new.values()))):
        yield {name: order[i % len(order)] for name, order in orders.items()}


def _timed(
    model: nn.Module, chosen: Mapping[str, Choice], dtype: torch.dtype, call: Callable[[], object]
) -> tuple[dict[str, float], float]:
    """Median milliseconds of each layer in calls of the model, and of a call."""
    modules = {name: naming.at(model, name) for name in chosen}
    spent: dict[str, list[float]] = {name: [] for name in chosen}
    forwards = {}
    for name, choice in chosen.items():
        layer = modules[name] if choice is None else pack(name, modules[name], margins.dynamic(choice), dtype)
        forwards[modules[name]] = _clocked(layer.forward, spent[name])
    with replaced(forwards):
        clocked = timing.in_turn({"clocked": call}, SECONDS, LEAST)["clocked"]
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}  # the first call warms up
    return medians, statistics.median(clocked)


def _clocked(forward: Callable, spent: list[float]) -> Callable:
    """The same forward that writes down its milliseconds."""

    def run(*args, **kwargs):
        timing.wait()
        began = time.perf_counter()
        y = forward(*args, **kwargs)
        timing.wait()
        spent.append(1000 * (time.perf_counter() - began))
        return y

    return run


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
