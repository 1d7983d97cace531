"""Casts of quantized models: one to the dtype a model has changes nothing that is packed, any other is refused.

Rounded weights, their scales and the kernels belong to one compute dtype. Host libraries cast all the same, and often
to what is there already: `pipe.to("cuda", torch.bfloat16)`, `from_pipe`, loading an IP-Adapter, saving a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.host.mark import plan_of
from dq.layers import packed_layers
from dq.plan import compute_dtype


def to(model: Any, move: Callable, *args, **kwargs) -> Any:
    """`Module.to` of a quantized model. move(**arguments) is the host's own, and gets no dtype.

    What is not packed and came in another dtype (the weights of an adapter) is cast, except what the class keeps in
    fp32. Raises DQError for a dtype that the model does not have.
    """
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    if dtype is not None:
        refuse_change({type(model).__name__: model}, dtype)
    moves = {"device": device, "non_blocking": non_blocking or None, "memory_format": memory_format}
    moves = {key: value for key, value in moves.items() if value is not None}
    if moves:
        move(**moves)
    if dtype is not None:
        _cast_rest(model)
    return model


def refuse_change(parts: Mapping[str, Any], dtype: torch.dtype) -> None:
    """DQError naming the first quantized part that has another dtype than `dtype`."""
    for name, part in parts.items():
        if isinstance(part, nn.Module) and plan_of(part) is not None and dtype not in _own(part):
            own = _own(part)[0]
            raise DQError(
                f"{name} is quantized for {own} and cannot be cast to {dtype}; pass {own} (from_pipe: dtype={own}), "
                f"or load or quantize it anew in {dtype}"
            )


def _own(model: Any) -> tuple[torch.dtype, ...]:
    """The compute dtype of a quantized model, and the dtype that its host takes it to have."""
    plan = plan_of(model)
    name = None if plan is None else plan.compute_dtype
    own = compute_dtype(name) if name else model.dtype
    return own, getattr(model, "dtype", own)


@torch.no_grad()
def _cast_rest(model: Any) -> None:
    """Bring parameters outside of packed layers to the compute dtype."""
    own, kept = _own(model)[0], getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {kept} if isinstance(kept, str) else set(kept)
    packed = set(packed_layers(model).values())
    for home, module in model.named_modules():
        if module in packed or kept.intersection(home.split(".")):
            continue
        for key, value in module.named_parameters(recurse=False):
            if value.is_floating_point() and value.dtype != own and key not in kept:
                value.data = value.data.to(own)
