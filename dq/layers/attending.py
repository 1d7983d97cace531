"""Attention modules of a model, found by their structure, and what each becomes under a choice."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from dq.attentionplan import AttentionPlan

REACH = frozenset(("scaled_dot_product_attention", "dispatch_attention_fn", "ALL_ATTENTION_FUNCTIONS"))


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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


def planned(model: nn.Module, choice: AttentionPlan) -> dict[str, AttentionPlan]:
    """By name what every attention module becomes under a choice: a start token is kept apart of texts alone."""
    return {name: replace(choice, start=choice.start and _attends_text(module)) for name, module in modules(model)}


def _attends_text(module: nn.Module) -> bool:
    """Whether a module of diffusers says that its keys are another sequence's."""
    return bool(getattr(module, "is_cross_attention", False))
