"""The walk that applies a method to a traced model, unit after unit; resumable, shared between processes.

Layers that a method leaves out, and layers the trace cannot follow, are rounded to nearest.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dq import layers, schema
from dq.errors import DQError
from dq.fit import drafts, smooth, static
from dq.fit.drafts import DraftLinear
from dq.formats.base import FormatError
from dq.layers import PACKED, inherit, naming
from dq.layers.memory import aligned, peak_bytes
from dq.plan import LayerPlan, Plan, Recipe
from dq.trace.records import Store
from dq.trace.seen import Seen, Unit
from dq.trace.units import tensors_in
from dq.trace.walk import Trace
from dq.trace.world import processes

FEWEST_CALLS = 16
ENOUGH = 2**18
USED = 1.1  # largest over smallest scale of a table from which on it differs from one scale for all steps


def calls_worth(folder: Path, method: ModuleType) -> int:
    """How many of the recorded calls to walk through; 0 for all, as methods of stored scales or reconstruction need.

    A call with many tokens tells as much as many small ones: enough is ENOUGH latent elements in FEWEST_CALLS or more.
    """
    if not getattr(method, "FEW_CALLS", False):
        return 0
    store = Store(folder)
    first = store.read(store.keys("calls/")[0], kind="call")
    sizes = [value.numel() for value in tensors_in((first["args"], first["kwargs"])) if value.dim() > 2]
    return max(FEWEST_CALLS, -(-ENOUGH // max(sizes[0], 1))) if sizes else 0


@dataclass
class Fitted:
    """What the walk gives: packed layers and their output error in dB by layer name, and where the time went."""

    packed: dict[str, nn.Module] = field(default_factory=dict)
    error_db: dict[str, float] = field(default_factory=dict)
    seconds: Counter = field(default_factory=Counter)
    tried: int = 0

    def notes(self, trace: Trace) -> list[str]:
        """Lines for the report: how much was seen and tried, at which memory, and where the time went."""
        spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in self.seconds.most_common())
        mean = self.tried / max(len(self.error_db), 1)
        seen = f"{len(trace.units)} units, {mean:.1f} candidates tried a layer"
        peak = peak_bytes()
        held = "" if peak is None else f"peak memory {peak / 2**30:.1f} GiB; "
        return [f"{seen}; {held}{spent or 'all units were fitted before'}", *self._tables()]

    def _tables(self) -> list[str]:
        """How many layers store activation scales, and how many of those make use of a table: a line, if any has."""
        rounded: list[Any] = [layer for layer in self.packed.values() if layer.plan.act]  # pyright: ignore[reportAttributeAccessIssue]
        stored = [layer for layer in rounded if layer.plan.act.scale != "dynamic"]
        spreads = [float((s.amax(0) / s.amin(0)).amax()) for s in (layer.act_scale for layer in stored) if len(s) > 1]
        if not spreads:
            return []
        used = sum(spread > USED for spread in spreads)
        what = f"{len(spreads)} of {len(rounded)} layers with rounded activations have a table of scales"
        spread = f"the largest is over {USED:g} times the smallest, in the middle {median(spreads):.1f}"
        return [f"{what}; in {used} {spread}"]


def walk(trace: Trace, method: ModuleType, recipe: Recipe, dtype: torch.dtype, progress: bool = True) -> Fitted:
    """Fit one unit after the other, each on what the units before it leave; a restart goes on after the last one.

    method  the recipe's file of dq/methods
    dtype   compute dtype of the packed layers
    """
    fitted, state = Fitted(), processes()
    bar = tqdm(trace.units, desc=f"fit {recipe.name}", disable=not (progress and state.is_main_process), delay=2)
    with aligned([trace.model]):
        for index, unit in enumerate(bar):
            if unit.layers:
                _step(trace, index, method, recipe.options, dtype, fitted)
            elif index >= trace.finished:
                trace.skip(unit)
    return fitted


def _step(trace: Trace, index: int, method: ModuleType, options: Mapping, dtype: torch.dtype, fitted: Fitted) -> None:
    """Fit one unit, or take up what an earlier walk made of it, and lead the streams past it."""
    unit = trace.units[index]
    if index >= trace.finished and trace.load_unit(index) is None:
        _fit_unit(trace, index, method, options, dtype, fitted.seconds)
    tensors, note = trace.load_unit(index)
    packed = _unpacked(unit, tensors, note, dtype)
    fitted.packed |= packed
    fitted.error_db |= note["error_db"]
    fitted.tried += note["tried"]
    if index >= trace.finished:
        with _Timed(fitted.seconds, "quantized replay"):
            trace.advance(unit, packed if method.NEEDS.hat else {})  # without that stream nothing propagates


def _fit_unit(
    trace: Trace, index: int, method: ModuleType, options: Mapping, dtype: torch.dtype, spent: Counter
) -> None:
    """Observe and fit one unit and store what it becomes. All processes observe; the first one fits."""
    unit, state = trace.units[index], processes()
    with _Timed(spent, "observe"):
        seen = trace.observe(unit, method.NEEDS)
    if state.is_main_process:
        with _Timed(spent, "fit"):
            try:
                made = method.fit(unit, seen, options)
            except (FormatError, torch.linalg.LinAlgError) as error:  # what the quantized units before gave it
                raise DQError(f"unit {unit.name!r} cannot be fitted: {error}") from error
            made |= {name: _nearest(unit, name) for name in unit.layers if name not in made}
            _store(trace, index, made, seen, dtype)
    state.wait_for_everyone()


def _nearest(unit: Unit, name: str) -> DraftLinear:
    """A layer that saw no data, rounded to nearest with dynamic activation scales."""
    plan = unit.layers[name]
    act = plan.act
    if act is not None and act.scale != "dynamic":
        grain = "token" if plan.kind == "linear" or act.granularity == "token" else "tensor"
        act = replace(act, granularity=grain, scale="dynamic", shift=0.0)
    return drafts.draft(unit.layer(name), replace(plan, act=act, steps=1, smooth=False, rotate=0, rank=0))


@torch.no_grad()
def _store(trace: Trace, index: int, made: Mapping[str, DraftLinear], seen: Seen, dtype: torch.dtype) -> None:
    unit = trace.units[index]
    tensors, rows = {}, {}
    for name in unit.layers:
        packed = made[name].pack(dtype)
        tensors |= {f"{name}.{key}": value.detach() for key, value in packed.named_parameters()}
        rows[name] = made[name].plan.to_dict()
    errors = {name: _error_db(unit, name, made[name], seen) for name in unit.layers if name in seen.layers}
    tried = sum(draft.tried for draft in made.values())
    trace.save_unit(index, tensors, {"layers": rows, "error_db": errors, "tried": tried})


def _error_db(unit: Unit, name: str, made: DraftLinear, seen: Seen) -> float:
    """Output SQNR of one layer alone on full-precision inputs, over a few rows, each at the scale of its own step."""
    layer, module = seen.layers[name], unit.layer(name)
    index = smooth.picked(layer, unit.layers[name])
    x, phase = layer.x[index].float(), None if layer.phase is None else layer.phase[index]
    truth = module(x.to(module.weight.dtype)).float()
    y = static.outputs(made, x, layer.bucket[index]) if made.plan.steps > 1 else made(x, phase)
    noise = (y - truth).detach().square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(truth.square().sum() / noise))


def _unpacked(unit: Unit, tensors: Mapping, note: Mapping, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The packed layers of a unit from what was stored of it."""
    packed = {}
    schema.check("note", note, f"what was fitted to unit {unit.name!r}")
    for name, row in note["layers"].items():
        plan, module = LayerPlan.from_dict(name, row), unit.layer(name)
        own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        _check_fitted(name, plan, unit.layers.get(name), own)
        layer = PACKED[plan.kind].like(module, plan, dtype, str(module.weight.device))
        for key, value in own.items():
            layer.put(key, value)
        layer.bind(module.weight.device)
        inherit.hooks(layer, module)  # for the replays; what else stands on it moves when it is put into the model
        packed[name] = layer.train(module.training)
    return packed


def _check_fitted(name: str, plan: LayerPlan, asked: LayerPlan | None, tensors: Mapping[str, torch.Tensor]) -> None:
    """DQError, before anything is allocated, when what was stored of a layer is of another one, or not all there."""
    wanted = {key: shape for key, (shape, _) in layers.tensor_shapes(plan).items()}
    found = {key: tuple(value.shape) for key, value in tensors.items() if key != "bias"}
    if asked is None or (asked.kind, asked.shape) != (plan.kind, plan.shape) or found != wanted:
        raise DQError(f"layer {name!r}: what was fitted to it is of another layer; delete the folder of the work")


class _Timed:
    """Adds the seconds of a block to a counter."""

    def __init__(self, counter: Counter, key: str):
        self.counter, self.key = counter, key

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.counter[self.key] += time.perf_counter() - self.start


def finish(model: nn.Module, plan: Plan, trace: Trace, fitted: Fitted) -> Plan:
    """The plan of what was fitted: layers as fitted, step edges if a layer has a table. Pack what was left over."""
    for name, layer in list(plan.layers.items()):
        if name not in fitted.packed and layer.kind != "stack":
            reason = trace.unfit.get(name, "never called during calibration")
            free = replace(_nearest(Unit(name, naming.at(model, name), {name: layer}), name).plan, reason=reason)
            fitted.packed[name] = layers.pack(name, naming.at(model, name), free, plan.dtype)
        elif layer.kind == "stack":
            fitted.packed[name] = layers.pack_stack(name, model.get_parameter(name), layer, plan.dtype)
        plan.layers[name] = fitted.packed[name].plan
    plan.edges = trace.edges if any(layer.steps > 1 for layer in plan.layers.values()) else ()
    return plan
