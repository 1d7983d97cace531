"""Room that quantized models need, for those who plan device maps before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import CustomDtype
from torch import nn

from dq.host.config import DQConfig
from dq.layers import packed_layers, parameter_bytes, stored_bytes
from dq.model import swap
from dq.plan import LayerPlan

KINDS = {CustomDtype.INT2: 0.25, CustomDtype.INT4: 0.5, CustomDtype.FP8: 1.0}  # bytes of an element, as accelerate has


def element_bytes(plan: LayerPlan, dtype: torch.dtype) -> float:
    """Packed bytes of a layer, scales included, for each element of its full-precision weight."""
    return stored_bytes(plan, dtype) / (plan.rows * plan.columns)


def kinds(plans: Mapping[str, LayerPlan], dtype: torch.dtype) -> tuple[dict[str, CustomDtype], float]:
    """-> (accelerate's dtype nearest to what each layer's weights become, by name of the layer; share).

    share  of the real bytes that these dtypes count, at most 1: scales have no element of their own there
    """
    found, counted, real = {}, 0.0, 0
    for name, plan in plans.items():
        size = element_bytes(plan, dtype)
        found[name] = min(KINDS, key=lambda kind, size=size: abs(math.log(KINDS[kind] / size)))
        counted += KINDS[found[name]] * plan.rows * plan.columns
        real += stored_bytes(plan, dtype)
    return found, min(1.0, counted / real) if real else 1.0


def own_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes that tensors of packed layers keep whatever dtype is asked for."""
    return {
        f"{name}.{key}": value.dtype
        for name, layer in packed_layers(model).items()
        for key, value in layer.named_parameters(recurse=False)
    }


def measured(model: Any) -> Any:
    """The model; where its config says that dq quantized it, a module of as many bytes as it has packed.

    model  as a host made it of a config alone, on the meta device; None passes through
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, dict) or config.get("quant_method") != "dq":
        return model
    made = DQConfig.from_dict(config)
    swap(model, made.plan_for(model) if made.plan is None else made.plan, model.dtype)
    size = parameter_bytes(model) + sum(value.nbytes for value in model.buffers())
    found = nn.Module()  # of bytes: what counts by a dtype would count scales at half
    found.bytes = nn.Parameter(torch.empty(size, dtype=torch.int8, device="meta"), requires_grad=False)
    return found
