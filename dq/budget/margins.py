"""Squared gradients of every layer, kept by their margins, and what any rounding costs by them.

    E[layer, choice] = sum_v (sum_ij dW_ij^2 g_ij^2 + sum dx^2 (dL_v/dx)^2) / |L|^2,   g = dL_v/dW
    g_ij^2 ~ r_i c_j / t                                r (rows), c (columns), t: margins of g^2 and its total

dW = Q(W) - W (rows, columns) is the rounding error of the weight, dx = Q(x) - x that of the activations. L is what
shall stay the same and L_v = <v, L> with random signs v, so that the mean of <dL_v/dW, dW>^2 over v is |J dW|^2: the
energy of the error in L, to first order. Errors of different weights are independent, which makes the square of the
sum a sum of squares, and the margins make it cheap: one measurement serves any number of formats. Layers with one
input (q, k, v) round it alike: their dL_v/dx are added before the square, and each layer gets of it the share that it
has among their own squares. Runs differ by orders of magnitude in how much an error moves their end, by the energy e
that rounding all layers to REFERENCE_BITS leaves there. Each is divided by e^FAIRNESS: with 1 the mean over runs is
one of decibels, with 0 the worst run rules. Pictures that an error tips over lose more than the first order says, so
that the hard runs count for more than with 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dq.budget.choices import Choice, Start, weight_bytes
from dq.budget.predictions import BUCKETS
from dq.fit import lowrank, rounding
from dq.kernels import reference
from dq.layers import naming
from dq.plan import LayerPlan, TensorPlan

REFERENCE_BITS = 4.5
FAIRNESS = 0.5
WHOLE = BUCKETS  # the row of the margins that counts steps together: errors of one weight add up over the steps


@dataclass
class Margins:
    """What is kept of one layer's squared gradients: by third of the steps, and of the sum over all steps.

    rows (buckets + 1, rows), columns (buckets + 1, columns), acts: by format (buckets + 1,); fp64
    """

    rows: torch.Tensor
    columns: torch.Tensor
    acts: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, plan: LayerPlan, acts: Sequence[str]) -> Margins:
        zeros = lambda *shape: torch.zeros((BUCKETS + 1, *shape), dtype=torch.float64)  # noqa: E731
        return cls(zeros(plan.rows), zeros(plan.columns), {act: zeros() for act in acts})

    def merge(self, other: Margins, share: float) -> None:
        """Add a share of other margins."""
        self.rows += share * other.rows
        self.columns += share * other.columns
        for text, energy in other.acts.items():
            self.acts[text] += share * energy

    def add(self, gradient: torch.Tensor, bucket: int) -> None:
        """gradient (rows, columns) of one step, or with bucket WHOLE of all steps of a run."""
        squares = gradient.float().square()
        self.rows[bucket] += squares.sum(1).double().cpu()
        self.columns[bucket] += squares.sum(0).double().cpu()


@dataclass
class _Input:
    """One input tensor in one call, how many uses of it still wait for their gradient, and the layers' gradients."""

    x: torch.Tensor
    waiting: int = 0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


class Listener:
    """Hooks that gather the gradients of all layers of one model while something is run forward and back.

    start    scales that weights are rounded with
    bucket   the third of the steps that is running
    summed   gradients of the weights added up since the last `close`, by layer
    """

    margins: dict[str, Margins]  # of all runs that were closed

    def __init__(self, model: nn.Module, menus: Mapping[str, Sequence[Choice]], start: Start = None):
        self.start = start
        plans = {name: next(filter(None, reversed(menu))) for name, menu in menus.items()}
        plans = {name: plan for name, plan in plans.items() if plan.kind != "stack"}
        self.modules = {name: naming.at(model, name) for name in plans}
        self.rounders = {name: _rounders(menus[name]) for name in plans}
        self.plans = plans
        self.margins, self.running = self._empty(), self._empty()
        self.noise = {name: _row_noise(module.weight, menus[name]) for name, module in self.modules.items()}
        self.bucket = 0
        self.summed: dict[str, torch.Tensor] = {}
        self._inputs: dict[tuple, _Input] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Gather while the block runs."""
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def end(self) -> float:
        """A run has ended: what it added up is squared; -> the energy that plain rounding would leave at its end."""
        for key in list(self._inputs):  # inputs of layers that no gradient reached
            self._count(key)
        for name, gradient in self.summed.items():
            self.running[name].add(gradient, WHOLE)
        self.summed.clear()
        return sum(float(self.running[name].rows[WHOLE] @ noise) for name, noise in self.noise.items())

    def close(self, energy: float) -> None:
        """Count the run that ended by its energy (0: all weights are on a grid), and be ready for the next."""
        share = energy**-FAIRNESS if energy > 0 else 1.0
        for name, run in self.running.items():
            self.margins[name].merge(run, share)
        self.running = self._empty()

    def _empty(self) -> dict[str, Margins]:
        return {name: Margins.empty(plan, tuple(self.rounders[name])) for name, plan in self.plans.items()}

    def _hook(self, name: str):
        def heard(module, args, output):
            if not torch.is_grad_enabled():
                return output
            x, bucket = args[0].detach(), self.bucket
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            if self.rounders[name]:
                self._inputs.setdefault(key, _Input(x)).waiting += 1
            if not output.requires_grad:  # nothing before this layer asks for a gradient
                output = output.detach().requires_grad_(True)
            output.register_hook(lambda gradient: self._see(name, module, x, gradient, bucket, key))
            return output

        return heard

    @torch.no_grad()
    def _see(
        self, name: str, module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, bucket: int, key: tuple
    ) -> None:
        margins = self.running[name]
        to_weight, to_input = _gradients(module, x, gradient, bool(self.rounders[name]))
        to_weight = to_weight.reshape(len(module.weight), -1).float()
        margins.add(to_weight, bucket)
        self.summed[name] = self.summed[name].add_(to_weight) if name in self.summed else to_weight
        if self.rounders[name]:
            shared = self._inputs[key]
            shared.gradients[name] = shared.gradients.get(name, 0) + to_input.float()
            shared.waiting -= 1
            if not shared.waiting:
                self._count(key)

    @torch.no_grad()
    def _count(self, key: tuple) -> None:
        """All gradients of an input are there: the energy of its rounding, shared out among its layers."""
        shared = self._inputs.pop(key)
        x = shared.x.float()
        texts = dict.fromkeys(text for name in shared.gradients for text in self.rounders[name])
        for text in texts:
            mine = {name: g for name, g in shared.gradients.items() if text in self.rounders[name]}
            rounded = self.rounders[next(iter(mine))][text](x, None)
            own = torch.stack([((rounded - x) * g).square().sum().double() for g in mine.values()])
            whole = ((rounded - x) * sum(mine.values())).square().sum().double()
            for name, energy in zip(mine, (own * whole / own.sum().clamp(min=1e-300)).cpu(), strict=True):
                self.running[name].acts[text][self.bucket] += energy
                self.running[name].acts[text][WHOLE] += energy  # activations are rounded anew in every step

    def state(self) -> dict[str, dict[str, Any]]:
        """What was gathered, as a tree that a store takes."""
        return {name: dict(vars(margins)) for name, margins in self.margins.items()}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.margins = {name: Margins(**rows) for name, rows in state.items()}


@torch.no_grad()
def _row_noise(weight: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """(rows,) mean squared error of the choice of about REFERENCE_BITS, fp64."""
    rows, sizes = weight.detach().reshape(len(weight), -1).float(), []
    for choice in choices:
        bits = 8 * weight_bytes(choice, weight.dtype, weight.numel()) / weight.numel()
        sizes.append(abs(bits - REFERENCE_BITS) if choice is not None else float("inf"))
    choice = choices[int(np.argmin(sizes))]
    return (rounding.nearest(rows, replace(choice, rank=0))[0] - rows).square().mean(1).double().cpu()


def _rounders(choices: Sequence[Choice]) -> dict[str, Callable]:
    """Roundings of the input by name, for the activation formats among the choices."""
    found = {str(choice.act): choice for choice in choices if choice is not None and choice.act is not None}
    return {
        text: reference.input_rounder(dynamic(plan), -1 if plan.kind == "linear" else 1)
        for text, plan in found.items()
    }


def dynamic(plan: LayerPlan) -> LayerPlan:
    """The plan with scales that every call finds anew: stored ones are not known before fitting."""
    if plan.act is None or plan.act.scale == "dynamic":
        return plan
    grain = "token" if plan.kind == "linear" or plan.act.granularity == "token" else "tensor"
    return replace(plan, act=TensorPlan(plan.act.format, grain, "dynamic", plan.act.shift), steps=1)


def _gradients(module: nn.Module, x: torch.Tensor, gradient: torch.Tensor, both: bool) -> tuple:
    """Gradients with respect to weight and input of one layer; the latter None unless both are wanted."""
    if isinstance(module, nn.Linear):
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_weight = flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype)
        return to_weight, (flat @ module.weight.to(flat.dtype)).reshape(x.shape) if both else None
    with torch.enable_grad():
        weight, x = module.weight.detach().requires_grad_(True), x.requires_grad_(both)
        y = module._conv_forward(x, weight, None)
        found = torch.autograd.grad(y, (weight, x) if both else (weight,), gradient)
    return found[0], found[1] if both else None


def energies(weight: torch.Tensor, choices: Sequence[Choice], margins: Margins, start: Start = None) -> np.ndarray:
    """(choices, buckets + 1) energies of the error; weight (rows, columns) fp32."""
    rows, columns = margins.rows.float(), margins.columns.float()
    total = rows.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    most = max((choice.rank for choice in choices if choice is not None), default=0)
    branch = _branch(weight, most, columns[WHOLE]) if most else None
    rests: dict[int, torch.Tensor] = {0: weight}
    known: dict[tuple, np.ndarray] = {}
    found = np.zeros((len(choices), BUCKETS + 1))
    for index, choice in enumerate(choices):
        if choice is None:
            continue
        if choice.rank not in rests:
            rests[choice.rank] = weight - branch[1][:, : choice.rank] @ branch[0][: choice.rank]
        key = (choice.weight, choice.rank)
        if key not in known:
            rest = rests[choice.rank]
            scales = None if start is None else start(rest, choice)
            squares = (rounding.nearest(rest, choice, scales)[0] - rest).square_()
            known[key] = ((rows @ squares * columns).sum(1) / total).double().numpy()
        found[index] = known[key] + (0 if choice.act is None else margins.acts[str(choice.act)].numpy())
    return found


def _branch(weight: torch.Tensor, rank: int, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """down, up of the best branch in the norm of the columns' gradients; its first r columns are that of rank r."""
    scale = (columns / columns.mean().clamp(min=1e-30)).clamp(min=1e-4).sqrt()
    down, up = lowrank.factors(weight * scale, rank)
    return down / scale, up
