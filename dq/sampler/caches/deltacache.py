"""Temporal delta cache of 6Bit-Diffusion: a block whose change hardly moves gives its last change once more.

    Delta_s = out_s - in_s            of a block in step s;  left out: out_s = in_s + Delta
    moved   = |Delta_s - Delta_r|_1 / |Delta_r|_1            s, r: its last two computed steps. arXiv 2603.18742

Each step that leaves a block out adds `moved` to its debt; it is left out while the debt stays below the threshold, at
most MOST steps in a row, and never in the first WARM of the run's steps or in its last one. A threshold of 0 leaves
every bit. Under a rule (`dq.sampler.routing`) a block that was left out takes its late format when it runs again, as
what it gives serves further steps. Deviations: the paper names no threshold (0.1 here), and runs layers with outliers
in 16 bits in those steps; a pipeline of two denoisers tells neither which step is its last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

from dq.sampler.caches import branches, parts

VALUE, LEAST, MOST, WHOLE = 0.1, 0.0, 10.0, False
NAME = "dq_delta_cache"
IN_A_ROW, WARM = 2, 0.1


@dataclass
class _Block:
    """What is known of one block. moved: a number on the block's device; debt, left: since it ran."""

    deltas: tuple[torch.Tensor, ...]
    output: Any
    moved: torch.Tensor | None = None
    debt: float = 0.0
    left: int = 0


class _State(BaseState):
    """Of a branch of a run: its step, the blocks that ran in it, and which are left out of it."""

    def __init__(self):
        self.reset()

    def reset(self, *args, **kwargs) -> None:
        self.step = 0
        self.blocks: dict[str, _Block] = {}
        self.done: set[str] = set()
        self.out: set[str] = set()

    def begin(self, threshold: float, steps: int) -> None:
        """Decide which blocks are left out of the next step; a card is waited for once."""
        self.step += 1
        self.done, self.out = set(), set()
        if self.step <= math.ceil(WARM * steps) or self.step == steps:
            return
        for name, moved in parts.read({name: each.moved for name, each in self.blocks.items()}).items():
            each = self.blocks[name]
            if each.left < IN_A_ROW and each.debt + moved < threshold:
                each.debt, each.left = each.debt + moved, each.left + 1
                self.out.add(name)


class _Hook(ModelHook):
    """Runs a block, or adds its last change to what comes in. `model`: a list, which hides it from the block."""

    _is_stateful = True

    def __init__(self, name: str, model: nn.Module, threshold: float, states: StateManager):
        super().__init__()
        self.name, self.model, self.threshold, self.states = name, [model], threshold, states

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.ends = parts.Ends(module)
        return module

    @torch.compiler.disable
    def _turn(self) -> _State:
        state: Any = self.states.get_state()
        if not state.step or self.name in state.done:
            role = branches.of(self.model[0])
            state.begin(self.threshold, 0 if role is None else role.steps)
        state.done.add(self.name)
        return state

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state = self._turn()  # pyright: ignore[reportAttributeAccessIssue]
        before, last = self.ends.before(args, kwargs), state.blocks.get(self.name)
        if self.name in state.out and [x.shape for x in before] == [delta.shape for delta in last.deltas]:
            return self.ends.given(tuple(x + delta for x, delta in zip(before, last.deltas, strict=True)), last.output)
        output = self.fn_ref.original_forward(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
        self._keep(state, last, before, output)  # pyright: ignore[reportAttributeAccessIssue]
        return output

    @torch.compiler.disable
    @torch.no_grad()
    def _keep(self, state: _State, last: _Block | None, before: tuple, output: Any) -> None:
        deltas = tuple(y - x for x, y in zip(before, self.ends.after(output), strict=True))
        made = state.blocks[self.name] = _Block(deltas, self.ends.given(None, output))
        if last is not None and last.deltas[0].shape == deltas[0].shape:
            power = last.deltas[0].float().abs().sum().clamp_min(1e-30)
            made.moved = (deltas[0].float() - last.deltas[0].float()).abs().sum() / power

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


def why_not(model: nn.Module) -> str | None:
    """None for a model of transformer blocks in classes that diffusers' hooks know."""
    reason = parts.strange(model)
    return None if reason is None else f"{reason}; `interval` needs none"


def apply(model: nn.Module, value: float) -> list[str]:
    """Put the hooks on; -> their name."""
    states = StateManager(_State)  # pyright: ignore[reportArgumentType]
    for name, block in parts.blocks(model).items():
        HookRegistry.check_if_exists_or_initialize(block).register_hook(_Hook(name, model, value, states), NAME)
    return [NAME]


def line(value: float) -> str:
    return (
        f"a block gives its last change again, {IN_A_ROW} steps in a row at most, while that has moved by less than "
        f"{value:g} of its size (temporal delta cache)"
    )
