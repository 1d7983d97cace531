"""A packed layer as tensors that can be trained, and back: its bytes, its kernels, its plan stay what they are.

    y = W x̂ + up (down z) + b,    W = snap(u) s,    x̂ = Q(z),    z = (x * smooth) R

u (rows, columns) is the weight in units of its step; it begins at the codes, so that the first forward is that of the
packed layer. s is the step that the stored scales give, times exp(theta): theta has the shape of the scales that are
stored as fp32 (of groups; of rows under two levels; of the tensor of nvfp4; of none where steps are powers of two).

    dL/du = G s within the grid's limits, else 0,    dL/dtheta = sum over a scale's weights of G W,    G = dL/dW

With "lowrank" u = u_0 + B A, A (r, columns) as nn.Linear begins, B (rows, r) zeros: an update of low rank, merged
before rounding (EfficientDM, 2310.03270). u_0 is the full-precision weight in steps where that rounds to the codes,
else the code. Counted in steps, one rate moves as many codes in every layer, which the paper has from rates in
proportion to a layer's mean step.

The first is the straight-through estimator; a step that moves carries its codes along, so that rounding and steps are
learned apart. W is worked out once an update and G summed over all its calls. Smoothing and stored activation scales
move by exp(theta) as well: a rate means the same share in every layer. Activations are rounded as at run time,
straight through where their scales come from the call itself, with LSQ's gradient (1902.08153) where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq.fit import drafts
from dq.formats.base import block_view
from dq.kernels import Tensors, reference
from dq.layers import PACKED, inherit

LEAST = 1e-3  # rates of tensors that are zeros are those of tensors of this size


@dataclass(frozen=True)
class Slice:
    """Columns of a weight that were rounded as a matrix of their own, and the scales that are theirs."""

    form: Any
    columns: slice
    blocks: slice
    of: torch.Tensor  # (columns,) which of its blocks a column belongs to


class Trainable:
    """One layer while a whole model is tuned. `forward` stands for the layer's; `parameters` by part of PARTS.

    module  the layer in full precision, of whose geometry this is; its weights are not read
    packed  what it was quantized to; not changed
    parts   which of PARTS to train; those that the layer has not are left out
    """

    def __init__(self, module: nn.Module, packed: Any, parts: tuple[str, ...], rank: int = 32):
        self.packed, self.plan, self._tensors = packed, packed.plan, packed.tensors()
        order = None if packed.permute is None else packed.permute.long()
        draft = drafts.draft(module, self.plan, packed.smooth, order)
        self.weight = _Weight(self.plan, self._tensors)
        if "lowrank" in parts:
            self.weight.aim(_rest(draft, packed).reshape(self.plan.rows, -1), rank)
        self.draft = _bare(draft, packed)
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self._logs: list[tuple[nn.Parameter, nn.Parameter, torch.Tensor]] = []  # (theta, what it moves, from where)
        for part in parts:
            found = self._of(part)
            if found:
                self.parameters[part] = found
        self.draft.soft = self._held
        self.draft._round = _rounder(self.plan, self.draft._round, self._stored)
        self.leaf: torch.Tensor | None = None

    @property
    def _stored(self) -> bool:
        return self.plan.act is not None and (self.plan.act.scale != "dynamic" or self.plan.act.clip != 1)

    def _of(self, part: str) -> list[nn.Parameter]:
        own = self.draft
        if part in ("weights", "lowrank"):
            return self.weight.units() if part == "weights" else self.weight.factors()
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
        """By how much a rate of 1 moves each of a part's tensors: their own size, or 1 where they count in shares."""
        sizes = [max(float(value.detach().square().mean().sqrt()), LEAST) for value in self.parameters[part]]
        if part in ("branch", "bias"):
            return sizes
        if part == "lowrank":
            return [sizes[0], 1.0]
        return [1.0] * len(self.parameters[part])

    def _held(self) -> torch.Tensor:
        assert self.leaf is not None  # `hold` was called
        return self.leaf

    @torch.no_grad()
    def hold(self) -> None:
        """Work out the weight of this update; gradients gather in it until `gather`."""
        for theta, moved, start in self._logs:
            moved.data = start * theta.exp()
        trains = any(part in self.parameters for part in ("weights", "lowrank", "scales"))
        self.leaf = self.weight.rounded().reshape(self.plan.shape).requires_grad_(trains)
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
        y = self.draft(input)
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


class _Weight:
    """The rounded weight of a layer, part by part, as units and steps."""

    def __init__(self, plan, tensors: Tensors):
        self.plan, self.tensors, self.spec = plan, tensors, plan.weight.spec
        codes = self.spec.unpack(tensors.weight, plan.columns)
        table, span = reference.tables(plan), self.spec.span
        self.slices, values = [], []
        pairs = enumerate(zip(plan.parts, reference.scale_columns(plan), strict=True))
        for i, ((first, last), (left, right)) in pairs:
            form = self.spec.of(table(tensors, i))
            width = plan.weight.grain.width(last - first)
            of = torch.arange(last - first, device=codes.device) // width
            self.slices.append(Slice(form, slice(first, last), slice(left, right), of))
            part = codes[:, first // span : last // span].contiguous()
            found = form.values_of(block_view(part, plan.weight.grain)).reshape(len(part), -1)
            values.append(found[:, : last - first])
        self.values = torch.cat(values, 1)
        if tensors.zero is not None:
            self.values -= self._wide(tensors.zero.float())
        self.log: nn.Parameter | None = None
        self.unit: nn.Parameter | None = None
        self.start = self.values
        self.low: tuple[nn.Parameter, nn.Parameter] | None = None

    @torch.no_grad()
    def aim(self, weight: torch.Tensor, rank: int) -> None:
        """Let units begin at a weight (rows, columns) where it rounds to the codes, and move by updates of `rank`."""
        if not self._free:
            return
        wide = self._wide(self.steps())
        grid = self.spec.grid().to(wide.device)
        wanted = weight.float() / wide.masked_fill(wide == 0, torch.inf)
        zero = 0.0 if self.tensors.zero is None else self._wide(self.tensors.zero.float())
        self.unit = nn.Parameter((wanted + zero).clamp(grid[0], grid[-1]) - zero)
        same = self.codes() == self.spec.unpack(self.tensors.weight, self.plan.columns)
        self.start = torch.where(same, self.unit.detach(), self.values)
        rank = min(rank, *self.values.shape)
        down = torch.empty(rank, self.values.shape[1])
        bound = self.values.shape[1] ** -0.5
        down.uniform_(
            -bound, bound, generator=torch.Generator().manual_seed(rank * self.plan.rows + self.plan.columns)
        )
        down, up = down.to(self.values.device), self.values.new_zeros(self.plan.rows, rank)
        self.low = nn.Parameter(down), nn.Parameter(up)

    @property
    def _free(self) -> bool:
        """Whether codes may move: not those of several weights or of a stored table."""
        return self.spec.span == 1 and not self.spec.tabled

    def factors(self) -> list[nn.Parameter]:
        return [] if self.low is None else list(self.low)

    @property
    def carrier(self) -> str | None:
        """The tensor of scales that is stored as fp32."""
        if self.tensors.scale_global is not None:
            return "scale_global"
        return "scale" if self.tensors.scale.dtype is torch.float32 else None

    def units(self) -> list[nn.Parameter]:
        """The trained weight; none for codes of several weights or of a stored table, which stay what they are."""
        if not self._free:
            return []
        self.unit = nn.Parameter(self.values.clone())
        return [self.unit]

    def logs(self) -> list[nn.Parameter]:
        if self.carrier is None:
            return []
        self.log = nn.Parameter(torch.zeros_like(getattr(self.tensors, self.carrier)))
        return [self.log]

    def _wide(self, blocks: torch.Tensor) -> torch.Tensor:
        """One value for every weight from one for every block of scales: (rows | 1, blocks) -> (rows, columns)."""
        parts = [blocks[:, each.blocks].index_select(1, each.of) for each in self.slices]
        wide = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return wide.expand(self.plan.rows, -1)

    def scales(self) -> dict[str, torch.Tensor]:
        """The stored scales as they now are."""
        own = {name: getattr(self.tensors, name) for name in ("scale", "scale_global")}
        if self.log is not None and self.carrier is not None:
            own[self.carrier] = own[self.carrier] * self.log.detach().exp()
        return {name: value for name, value in own.items() if value is not None}

    def steps(self) -> torch.Tensor:
        """(rows | 1, blocks), by the arithmetic of the run time."""
        own, two_level = self.scales(), self.plan.weight.grain.two_level
        if "scale_global" not in own:
            return self.spec.step(own["scale"])
        found = []
        for i, each in enumerate(self.slices):
            whole = own["scale_global"][:, i : i + 1] if two_level else own["scale_global"][i : i + 1]
            found.append(self.spec.step(own["scale"][:, each.blocks], whole))
        return torch.cat(found, 1)

    def snapped(self) -> torch.Tensor:
        if self.unit is None:
            return self.values
        if self.tensors.zero is None:
            return self.spec.snap(self.unit.detach().clone())
        zero = self._wide(self.tensors.zero.float())
        return self.spec.snap(self.unit.detach().round() + zero).sub_(zero)

    def rounded(self) -> torch.Tensor:
        """The weight (rows, columns) fp32."""
        if self.low is not None and self.unit is not None:
            down, up = self.low
            self.unit.data = self.start + up.detach() @ down.detach()
        self._step = self._wide(self.steps())
        self._snapped = self.snapped()
        return self._snapped * self._step

    def back(self, grad: torch.Tensor | None) -> None:
        """Gradients of units and logs from that of the weight `rounded` gave last."""
        grad = torch.zeros_like(self._snapped) if grad is None else grad
        along = grad * self._step
        if self.log is not None:
            self.log.grad = self._summed(along * self._snapped)
        if self.unit is not None:
            low, high = self.spec.limits()
            zero = 0.0 if self.tensors.zero is None else self._wide(self.tensors.zero.float())
            at = self.unit.detach() + zero
            self.unit.grad = along.masked_fill_((at < low) | (at > high), 0.0)
            if self.low is not None:
                down, up = self.low
                down.grad, up.grad = up.detach().t() @ self.unit.grad, self.unit.grad @ down.detach().t()
                self.unit.grad = None

    def _summed(self, each: torch.Tensor) -> torch.Tensor:
        """(rows, columns) summed over the weights of every stored fp32 scale."""
        log, found = self.log, []
        assert log is not None
        for part in self.slices:
            own = each[:, part.columns]
            count = part.blocks.stop - part.blocks.start
            if self.carrier == "scale_global":
                found.append(own.sum(1, keepdim=True))
            else:
                found.append(own.new_zeros(len(own), count).index_add_(1, part.of, own))
        total = found[0] if len(found) == 1 else torch.cat(found, 1)
        if self.carrier == "scale_global" and not self.plan.weight.grain.two_level:
            return total.sum(0)
        return total.sum(0, keepdim=True) if len(log) == 1 else total

    def stored(self) -> dict[str, torch.Tensor]:
        """The packed tensors that changed."""
        found = {}
        if self.log is not None:
            found |= self.scales()
        if self.unit is not None:
            found["weight"] = self.spec.pack(self.codes())
        return found

    def codes(self) -> torch.Tensor:
        """int8 (rows, columns): what the units round to."""
        assert self.unit is not None, "asked of codes that move"
        units = self.unit.detach()
        units = units if self.tensors.zero is None else units.round() + self._wide(self.tensors.zero.float())
        return self.spec.codes_of(units.clone())
