"""Rows of a live model for reports: what each layer is, what it weighs, and which kernel serves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dq import kernels
from dq.kernels import Choice, choice
from dq.layers import PackedStack, kind_of, naming, packed_layers, parameter_bytes
from dq.plan import LayerPlan, Plan, TensorPlan
from dq.report import Row

GROUPED = "torch's grouped products take activations that are rounded, stacked experts are weight-only"
SLOWER = MARGIN = 1.05  # times as long, from which on it is said


def planned_rows(part: str, model: nn.Module, plan: Plan, packed: Mapping, errors: Mapping) -> list[Row]:
    """Report rows of one model, in plan order, kept layers last."""
    rows = [
        row(part, name, layer, parameter_bytes(packed[name]), errors[part].get(name), layer.reason)
        for name, layer in plan.layers.items()
    ]
    return rows + [kept_row(part, model, name, reason) for name, reason in plan.kept.items()]


@torch.no_grad()
def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> float | None:
    """10 log10(sum x^2 / sum (x - y)^2); infinite for an exact match, None for a model without data (meta device)."""
    if reference.is_meta:
        return None
    x = reference.detach().float()
    noise = (x - value).square().sum().item()
    return float("inf") if noise == 0 else float(10 * torch.log10(x.square().sum() / noise))


def row(part: str, name: str, plan: LayerPlan, size: int, decibels: float | None, reason: str) -> Row:
    full = f"{part}.{name}" if part else name
    act = str(plan.act) if plan.act else None
    late = tuple(map(str, plan.late))
    return Row(full, plan.kind, str(plan.weight), act, plan.rank, size, decibels, reason, late=late)


def kept_row(part: str, model: nn.Module, name: str, reason: str) -> Row:
    owner, key = naming.place(model, name)
    full = f"{part}.{name}" if part else name
    if key in owner._parameters:
        weight: Any = owner._parameters[key]
        return Row(full, "stack", None, None, 0, weight.numel() * weight.element_size(), None, reason)
    layer: Any = owner._modules[key]
    kind = kind_of(layer) or type(layer).__name__
    return Row(full, kind, None, None, 0, parameter_bytes(layer), None, reason)


def with_kernels(rows: list[Row], models: Mapping[str, Any]) -> list[Row]:
    """Rows with the kernel that serves each packed layer, and the refusals of those preferred to it."""
    found = {}
    for part, entry in models.items():
        model = entry[0] if isinstance(entry, tuple) else entry
        found |= {f"{part}.{name}" if part else name: layer for name, layer in packed_layers(model).items()}
    return [_with_kernel(row, found.get(row.name)) for row in rows]


def _with_kernel(row: Row, layer: Any) -> Row:
    if layer is None:
        return row
    if isinstance(layer, PackedStack):
        kernel = f"decode {layer.plan.weight.format} when used"
        return replace(row, backend="dense", kernel=kernel, why_not=(("scaled", GROUPED),))
    return served(row, *layer.choices)


def served(row: Row, found: Choice, *later: Choice) -> Row:
    """A row with the kernels that were chosen for the phases of its layer; all but their labels are the first's.

    Whether one emulates, or leaves in floating point what the plan rounds, is said of the layer if it is so in any
    phase.
    """
    facts: dict[str, Any] = {"backend": found.backend, "kernel": found.label}
    facts |= {key: any(getattr(each, key) for each in (found, *later)) for key in ("emulated", "weight_only")}
    facts["late_kernels"] = tuple(each.label for each in later)
    if found.speedup is not None:
        facts["speedup"] = round(found.speedup, 2)
    refusals = dict.fromkeys(why for each in (found, *later) for why in each.refusals)
    return replace(row, **facts, why_not=tuple(refusals))


def measure(model: nn.Module) -> None:
    """Let every packed layer that never ran be measured as in a typical call, as long as that may take."""
    for layer in _served_layers(model):
        layer.meet_typical()


def speed_notes(model: nn.Module) -> list[str]:
    """What there is to say of layers not measured, slower than full precision, or in a dtype that is slow here."""
    layers = _served_layers(model)
    reasons = Counter(reason for layer in layers if (reason := layer.choice.unmeasured))
    lines = [f"kernels of {count} layers were chosen by rank: {reason}" for reason, count in reasons.items()]
    times = [(layer, found.ms, found.full_ms) for layer in layers if (found := layer.choice).speedup is not None]
    ours, full = sum(ms for _, ms, _ in times), sum(ms for _, _, ms in times)
    here = [layer for layer, _, _ in times if layer.stored.device == layer.home]
    if ours > SLOWER * full:
        lines.append(_slower(here, ours / full))
    return lines + _slow_dtype(here)


def _served_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in packed_layers(model).values() if not isinstance(layer, PackedStack)]


def _slower(layers: list[Any], times: float) -> str:
    """The line on layers that take so many times as long as in full precision, with the fastest of the same size."""
    found = {"weight-only": _as(layers, _weight_only), "with 8-bit activations": _as(layers, _with_int8)}
    known = {text: share for text, share in found.items() if share is not None and share < times / MARGIN}
    said = f"quantized layers take {times:.2f} times as long here as in full precision"
    if not known:
        return f"{said}; no other plan of the same weights is faster"
    best = min(known, key=lambda text: known[text])
    return f"{said}; the fastest plan of the same size is the same weights {best}: {known[best]:.2f} times"


def _as(layers: list[Any], other: Callable[[LayerPlan], LayerPlan]) -> float | None:
    """Milliseconds of layers under other plans over those in full precision; None where they may not be measured."""
    found = [layer.meet_as(other(layer.plan)) for layer in layers]
    if any(each.speedup is None for each in found):
        return None
    return sum(each.ms for each in found) / sum(each.full_ms for each in found) if found else None


def _weight_only(plan: LayerPlan) -> LayerPlan:
    return replace(plan, act=None, late=(), route=(), steps=1)


def _with_int8(plan: LayerPlan) -> LayerPlan:
    if plan.role == "time":
        return plan
    grain = "token" if plan.kind == "linear" or plan.pointwise else "tensor"
    return replace(plan, act=TensorPlan("int8", grain), late=(), route=(), steps=1)


def _slow_dtype(layers: list[Any]) -> list[str]:
    """A line on bf16 where the processor has no units for it: what fp32 gives, on the largest layer."""
    if kernels.bf16():
        return []
    slow = [layer for layer in layers if layer.stored.device.type == "cpu" and layer.busiest[0] is torch.bfloat16]
    if not slow:
        return []
    problem = max(slow, key=lambda layer: layer.plan.rows * layer.plan.columns).problem
    wide, narrow = choice.full_ms(problem, torch.float32), choice.full_ms(problem, torch.bfloat16)
    if wide is None or narrow is None or narrow < SLOWER * wide:
        return []
    said = (
        f"this processor has no bf16 units: full precision takes {narrow / wide:.1f} times as long in bf16 as in fp32"
    )
    return [f"{said}; dq's layers compute in fp32, the rest of the pipeline does with dtype=torch.float32"]


def step_notes(plans: Mapping[str, Plan]) -> list[str]:
    """Lines on what follows the step: tables of scales, and formats that switch."""
    tables = [
        f"{part or 'model'}: activation scales for {len(plan.edges) + 1} step buckets, cut at {plan.timestep} = "
        f"{plan.edges[0]:g} ... {plan.edges[-1]:g}; a timestep beyond takes the nearest bucket"
        for part, plan in plans.items()
        if plan.edges
    ]
    switches = [_switch_note(part, plan) for part, plan in plans.items() if plan.switch]
    return tables + switches + [_route_note(part, plan) for part, plan in plans.items() if plan.route is not None]


def _switch_note(part: str, plan: Plan) -> str:
    """How many layers switch formats, and when."""
    late = [layer for layer in plan.layers.values() if layer.late]
    rounded = sum(layer.act is not None for layer in plan.layers.values())
    cuts = ", then ".join(f"{plan.timestep} {'>=' if plan.rising else '<'} {edge:g}" for edge in plan.switch)
    said = f"{len(late)} of {rounded} layers with rounded activations switch formats at {cuts}"
    return f"{part or 'model'}: {said}; weights are the same in all steps"


def _route_note(part: str, plan: Plan) -> str:
    """How many layers have a rule, and what it decides by."""
    late = [layer for layer in plan.layers.values() if layer.late]
    said = (
        f"{len(late)} layers take their late format in steps in which their rule, by the last change of their block,"
    )
    return f"{part or 'model'}: {said} predicts an error above {plan.route:.3g}; weights are the same in all steps"


def dense_bytes(model: nn.Module) -> int:
    """Parameter bytes of the model with every packed layer in its compute dtype."""
    packed = packed_layers(model)
    total = parameter_bytes(model) - sum(parameter_bytes(layer) for layer in packed.values())
    for layer in packed.values():
        elements = layer.plan.rows * layer.plan.columns
        bias: torch.Tensor | None = getattr(layer, "bias", None)
        total += (elements + (0 if bias is None else bias.numel())) * layer.compute_dtype.itemsize
    return total
