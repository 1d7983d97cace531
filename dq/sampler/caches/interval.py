"""Interval cache of Q&C: attention and feed-forward run in every N-th step, between they give what they gave last.

    y(s) = y(s - s mod N)      y: output of each attention and feed-forward module, before gates. arXiv 2503.02508

Modulation, norms, gates and residual sums run in every step, in a U-Net the convolutions as well. Any denoiser with
diffusers' attention or feed-forward classes has it. N = 1 runs all, and leaves every bit as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from dq.sampler.caches import parts

VALUE, LEAST, MOST, WHOLE = 2, 1, 100, True
NAME = "dq_interval_cache"


class _State(BaseState):
    """Calls of a module in one branch of a run, and its last output."""

    def __init__(self):
        self.reset()

    def reset(self, *args, **kwargs) -> None:
        self.calls, self.output = 0, None


class _Hook(ModelHook):
    """Runs the module in every `every`-th call of a branch."""

    _is_stateful = True

    def __init__(self, every: int, states: StateManager):
        super().__init__()
        self.every, self.states = every, states

    @torch.compiler.disable
    def _turn(self) -> Any:
        state = self.states.get_state()
        state.calls += 1
        return state, (state.calls - 1) % self.every == 0

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, due = self._turn()  # pyright: ignore[reportAttributeAccessIssue]
        if due or state.output is None:
            state.output = self.fn_ref.original_forward(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
        return state.output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


def why_not(model: nn.Module) -> str | None:
    """None for a model with attention or feed-forward modules of diffusers' classes."""
    if not parts.inner(model):
        return f"{type(model).__name__} has no attention and no feed-forward of diffusers' classes, nothing to cache"
    return None


def apply(model: nn.Module, value: float) -> list[str]:
    """Put the hooks on; -> their name."""
    for module in parts.inner(model).values():
        hook = _Hook(int(value), StateManager(_State))  # pyright: ignore[reportArgumentType]
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    return [NAME]


def line(value: float) -> str:
    return f"attention and feed-forward run in every {int(value)}th step, and give the same between (interval cache)"
