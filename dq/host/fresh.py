"""What loading starts from: a model made anew from its config. What was added to one after it was made is not in it.

Diffusers saves the tensors of an IP-Adapter or of fused q, k, v with the model, and leaves them out when it loads. A
plan that named them would fit no fresh model.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from dq.errors import DQError
from dq.host import files
from dq.model import found
from dq.plan import Plan


def loadable(model: Any, plan: Plan) -> Plan:
    """The part of a diffusers model's plan that fits a fresh model. DQError when a fresh one could not be filled."""
    fresh = _made(model)
    kept = {name: reason for name, reason in plan.kept.items() if _there(fresh, name)}
    plan = replace(plan, layers={name: row for name, row in plan.layers.items() if found(fresh, name)[0]}, kept=kept)
    kind = type(model).__name__
    for name, row in plan.layers.items():
        if found(fresh, name) != (row.kind, row.shape):
            raise DQError(
                f"{kind} was changed after it was made: layer {name!r} is {row.kind} {tuple(row.shape)}, "
                f"from_pretrained makes {found(fresh, name)}; change its config likewise before saving"
            )
    there = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, (shape, _) in files.expected(fresh, plan).items():
        if there.get(name) != shape:
            got = f"shape {there[name]}" if name in there else "none"
            raise DQError(
                f"{kind} was changed after it was made: from_pretrained expects tensor {name!r} of shape {shape}, got "
                f"{got}; change its config likewise, or undo the change, before saving"
            )
    return plan


def _made(model: Any) -> nn.Module:
    """A model of the same config, without weights."""
    entries = {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
    with init_empty_weights():
        return type(model).from_config(entries)


def _there(model: nn.Module, name: str) -> bool:
    home, _, key = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        owner = model.get_submodule(home)
        return key in owner._modules or key in owner._parameters
    return False
