"""A packed layer as tensors that can be trained, and back: its bytes, its kernels, its plan stay what they are.

    y = W x̂ + up (down z) + b,    W = snap(u) s,    x̂ = Q(z),    z = (x * smooth) R

u (rows, columns) is the weight in units of its step; it begins at the codes, so that the first forward is that of the
packed layer, or (`full`) at the full-precision weight where that rounds to the codes. s is the step that the stored
scales give, times exp(theta): theta has the shape of the scales that are stored as fp32 (of groups; of rows under two
levels; of the tensor of nvfp4; of none where steps are powers of two).

    dL/du = G s within the grid's limits, else 0,    dL/dtheta = sum over a scale's weights of G W,    G = dL/dW

With "lowrank" u = u_0 + B A, A (r, columns) as nn.Linear begins, B (rows, r) zeros: an update of low rank, merged
before rounding (EfficientDM, 2310.03270). u_0 is as with `full`. Counted in steps, one rate moves as many codes in
every layer, which the paper has from rates in proportion to a layer's mean step.

Codes of a codebook (formats/codebook.py) move by PV-Tuning's steps, its entries in place of s: dq/fit/vectors.py.

With "aux" a low-rank help stands beside the rounded weight while it is trained, and fades (dq/fit/auxiliary.py).

The first is the straight-through estimator; a step that moves carries its codes along, so that rounding and steps are
learned apart. W is worked out once an update and G summed over all its calls. Smoothing and stored activation scales
move by exp(theta) as well: a rate means the same share in every layer. Activations are rounded as at run time,
straight through where their scales come from the call itself, with LSQ's gradient (1902.08153) where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dq.fit import drafts, vectors
from dq.layers import PACKED, inherit

LEAST = 1e-3  # rates of tensors that are zeros are those of tensors of this size


class Trainable:
    """One layer while a whole model is tuned. `forward` stands for the layer's; `parameters` by part of PARTS.

    module  the layer in full precision, of whose geometry this is; its weights are not read
    packed  what it was quantized to; not changed
    parts   which of PARTS to train; those that the layer has not are left out
    full    weights begin at their full-precision place within the code, not in its middle
    """

    def __init__(self, module: nn.Module, packed: Any, parts: tuple[str, ...], rank: int = 32, full: bool = False):
        self.packed, self.plan, self._tensors = packed, packed.plan, packed.tensors()
        order = None if packed.permute is None else packed.permute.long()
        draft = drafts.draft(module, self.plan, packed.smooth, order)
        self.weight = vectors.weight_of(self.plan, self._tensors)
        asked = {"lowrank", "aux"} & set(parts) or (full and "weights" in parts)
        rest = _rest(draft, packed).reshape(self.plan.rows, -1) if asked else None
        if rest is not None and (full or "lowrank" in parts):
            self.weight.aim(rest)
        self.draft = _bare(draft, packed)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self._logs: list[tuple[nn.Parameter, nn.Parameter, torch.Tensor]] = []  # (theta, what it moves, from where)
        for part in parts:
            found = self.weight.helped(rest, rank) if part == "aux" and rest is not None else self._of(part, rank)
            if found:
                self.parameters[part] = found
        self.draft.soft = self._held
        self.draft._round = _rounder(self.plan, self.draft._round, self._stored)
        self.leaf: torch.Tensor | None = None

    @property
    def _stored(self) -> bool:
        return self.plan.act is not None and (self.plan.act.scale != "dynamic" or self.plan.act.clip != 1)

    def _of(self, part: str, rank: int) -> list[nn.Parameter]:
        own = self.draft
        if part in ("weights", "lowrank"):
            return self.weight.units() if part == "weights" else self.weight.factors(rank)
        if part == "scales":
            return self.weight.logs()
        if part == "branch":
            return [value for value in (own.proj_down, own.proj_up) if value is not None]
        if part == "bias":
            return [] if own.bias is None else [own.bias]
        moved = own.smooth if part == "smooth" else own.act_scale
        if moved is None:
            return []
        theta = nn.Parameter(torch.zeros_like(moved))
        self._logs.append((theta, moved, moved.detach().clone()))
        return [theta]

    @property
    def step(self) -> float:
        """The mean step of the weight's scales."""
        return float(self.weight.steps().mean())

    def rates(self, part: str) -> list[float]:
        """By how much a rate of 1 moves each of a part's tensors: their own size, a code, or 1 where shares count.

        0: no gradient's step moves it, but `Weight.jump`.
        """
        sizes = [max(float(value.detach().square().mean().sqrt()), LEAST) for value in self.parameters[part]]
        if part in ("branch", "bias", "aux"):
            return sizes
        if part == "weights":
            return self.weight.gaps()
        if part == "scales":
            return [self.weight.size()]
        if part == "lowrank":
            return [sizes[0], 1.0]
        return [1.0] * len(self.parameters[part])

    def _held(self) -> torch.Tensor:
        assert self.leaf is not None  # `hold` was called
        return self.leaf

    @torch.no_grad()
    def hold(self, helped: bool = False) -> None:
        """Work out the weight of this update; gradients gather in it until `gather`. `helped`: with what fades."""
        for theta, moved, start in self._logs:
            moved.data = start * theta.exp()
        trains = any(part in self.parameters for part in ("weights", "lowrank", "scales", "aux"))
        self.leaf = self.weight.rounded(helped).reshape(self.plan.shape).requires_grad_(trains)
        for part, values in self.parameters.items():
            for value in values:
                value.requires_grad_(part in ("branch", "bias"))
                value.grad = None
        for _, moved, _ in self._logs:
            moved.requires_grad_(True)

    @torch.no_grad()
    def gather(self) -> None:
        """Give every parameter its gradient, from those that the calls since `hold` left; zero where none came."""
        if self.leaf is not None and self.leaf.requires_grad:
            grad = self.leaf.grad
            self.weight.back(None if grad is None else grad.reshape(self.plan.rows, -1))
            self.leaf.grad = None
        for theta, moved, _ in self._logs:
            theta.grad = torch.zeros_like(theta) if moved.grad is None else moved.grad * moved.detach()
            moved.grad = None
        for value in (*self.parameters.get("branch", ()), *self.parameters.get("bias", ())):
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad

    def forward(self, input: torch.Tensor, then_gelu: bool = False) -> torch.Tensor:
        y = self.draft.forward(input)  # hooks are those of the module that calls this
        return y if self.packed.start_in is None or input.dim() != 3 else self.packed.started(input, y)

    @torch.no_grad()
    def pack(self) -> Any:
        """The layer as it now is, packed; what was not trained is what it was, to the byte."""
        self.hold()
        packed = PACKED[self.plan.kind].like(
            self.draft.source[0], self.plan, self.packed.compute_dtype, str(self._tensors.weight.device)
        )
        for name, value in self.packed.named_parameters(recurse=False):
            packed.put(name, value.detach().clone())
        for name, value in self.weight.stored().items():
            packed.put(name, value)
        kinds = {"proj_down": "branch", "proj_up": "branch", "bias": "bias", "smooth": "smooth", "act_scale": "act"}
        for name, part in kinds.items():
            if part in self.parameters and getattr(self.draft, name) is not None:
                packed.put(name, getattr(self.draft, name).detach().to(getattr(self.packed, name).dtype).clone())
        packed.clock = self.packed.clock
        packed.bind(packed.stored.device)
        inherit.hooks(packed, self.draft.source[0])
        return packed.train(self.draft.source[0].training)


@torch.no_grad()
def _rest(draft: drafts.DraftLinear, packed: Any) -> torch.Tensor:
    """The full-precision weight as it meets the transformed input, without what the branch has of it."""
    if packed.proj_up is None:
        return draft.weight.detach()
    branch = packed.proj_up.float() @ packed.proj_down.float()
    return draft.weight.detach() - branch.reshape(draft.weight.shape)


def _bare(draft: drafts.DraftLinear, packed: Any) -> drafts.DraftLinear:
    """A draft that holds what a packed layer holds, in fp32, and no weight of its own."""
    for name in ("bias", "proj_down", "proj_up", "act_scale"):
        if getattr(draft, name) is not None:
            getattr(draft, name).data.copy_(getattr(packed, name))
    draft.weight.data = draft.weight.data.new_empty(0)
    draft.clock = packed.clock
    return draft.requires_grad_(False)


class _Straight(torch.autograd.Function):
    """What a function without gradient gives, with that of its input."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, through: Callable) -> torch.Tensor:
        return through(x)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], None


def _rounder(plan, own: Callable, stored: bool) -> Callable:
    if plan.act is None or stored:
        return own
    return lambda x, _, phase: _Straight.apply(x, lambda value: own(value, None, phase))
