"""Rows of a live model for reports: what each layer is, what it weighs, and which kernel serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dq.kernels import Choice
from dq.layers import PackedStack, kind_of, naming, packed_layers, parameter_bytes
from dq.layers.memory import serving
from dq.plan import LayerPlan, Plan
from dq.report import Row


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
    return Row(full, plan.kind, str(plan.weight), act, plan.rank, size, decibels, reason)


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
        return replace(row, backend="decode", kernel=f"decode {layer.plan.weight.format} when used")
    return served(row, serving(layer))


def served(row: Row, choice: Choice) -> Row:
    """A row with the kernel that was chosen for its layer."""
    facts = {"backend": choice.backend, "kernel": choice.label, "emulated": choice.emulated}
    return replace(row, **facts, why_not=choice.refusals)


def dense_bytes(model: nn.Module) -> int:
    """Parameter bytes of the model with every packed layer in its compute dtype."""
    packed = packed_layers(model)
    total = parameter_bytes(model) - sum(parameter_bytes(layer) for layer in packed.values())
    for layer in packed.values():
        elements = layer.plan.rows * layer.plan.columns
        bias: torch.Tensor | None = getattr(layer, "bias", None)
        total += (elements + (0 if bias is None else bias.numel())) * layer.compute_dtype.itemsize
    return total
