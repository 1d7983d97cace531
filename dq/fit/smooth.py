"""Smoothing, rotation and input format of layers that share one input, chosen by the error they leave at the output.

    z = (x * s) R,   s_c = max_row |W_rc|^beta / max |x_c|^alpha        x (tokens, in), W (out, in), s (in,)

SmoothQuant (arXiv 2211.10438) is beta = 1 - alpha; SVDQuant (2411.05007) also tries beta = 0. R is block-diagonal
Hadamard. A candidate is scored with the low-rank branch and both roundings in place: the squared error of all outputs
of the layers that share the input, each relative to its own power. "Nothing" is always a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dq.fit import lowrank
from dq.fit.drafts import DraftLinear, draft
from dq.layers import hadamard
from dq.plan import LayerPlan, TensorPlan
from dq.trace.seen import LayerSeen

ALPHAS = (0.25, 0.5, 0.75)
MOST_ROTATED = 128  # larger blocks cost more at run time than they gain
REFINE = 0.125  # the second round tries the best alpha a step to either side
SCORED_ROWS = 512  # rows a candidate is scored on
FEWEST_CHANNELS = 1e-5  # channels quieter than this share of the loudest are left as they are


@dataclass(frozen=True, eq=False)
class Transform:
    """What is done to an input before it is rounded.

    smooth (in,) or None, made with the exponents `powers` (alpha, beta); rotate as in LayerPlan; act takes the place
    of the planned formats of its bits, in whatever phase, None: as planned
    """

    smooth: torch.Tensor | None = None
    powers: tuple[float, float] = (0.0, 0.0)
    rotate: int = 0
    act: TensorPlan | None = None

    @property
    def label(self) -> str:
        """One name for each transform of one input: `smooth 0.5 0.5, rotate 64, int4a/group:64`, or `none`."""
        parts = ["smooth {:g} {:g}".format(*self.powers)] if self.smooth is not None else []
        parts += [f"rotate {self.rotate}"] if self.rotate else []
        return ", ".join(parts + ([str(self.act)] if self.act else [])) or "none"


@dataclass
class Shared:
    """Layers with one input. plans and modules by layer name; weights (rows, in, *kernel); `seen` of the first."""

    plans: dict[str, LayerPlan]
    modules: dict[str, nn.Module]
    seen: LayerSeen

    @property
    def plan(self) -> LayerPlan:
        return next(iter(self.plans.values()))

    def absmax(self) -> torch.Tensor:
        """(in,) largest magnitude of each input channel over all steps and branches."""
        if self.seen.absmax is not None:
            return self.seen.absmax.flatten(0, 1).amax(0)
        return self.seen.x.movedim(self._channels, -1).flatten(0, -2).abs().amax(0).float()

    def weight_absmax(self) -> torch.Tensor:
        """(in,) largest weight on each input channel over all layers."""
        return torch.stack([column_absmax(module.weight) for module in self.modules.values()]).amax(0)

    @property
    def _channels(self) -> int:
        return -1 if self.plan.kind == "linear" else 1


def column_absmax(weight: torch.Tensor) -> torch.Tensor:
    """(in,) largest magnitude of a weight (rows, in, *kernel) on each input channel."""
    return weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1)


def balance(shared: Shared, alpha: float, beta: float) -> torch.Tensor:
    """(in,) the vector s of the module docstring, geometric mean 1; silent channels get the mean."""
    x, w = shared.absmax(), shared.weight_absmax()
    usable = (x > x.amax() * FEWEST_CHANNELS) & (w > w.amax() * FEWEST_CHANNELS)
    log = beta * w.clamp(min=1e-30).log() - alpha * x.clamp(min=1e-30).log()
    log = torch.where(usable, log, log[usable].mean() if usable.any() else torch.zeros(()))
    return (log - log.mean()).exp()


def transformed(module: nn.Module, plan: LayerPlan, change: Transform) -> DraftLinear:
    """The draft of a layer under a transform: weight divided by s and rotated, branch empty."""
    plan = replace(_with_act(plan, change.act), smooth=change.smooth is not None, rotate=change.rotate)
    return draft(module, plan, change.smooth)


def _with_act(plan: LayerPlan, act: TensorPlan | None) -> LayerPlan:
    """The plan with a format in place of those of its bits."""
    if plan.act is None or act is None:
        return plan
    first, *late = [act if each.spec.bits == act.spec.bits else each for each in (plan.act, *plan.late)]
    return replace(plan, act=first, late=tuple(late))


@dataclass(frozen=True)
class SmoothSearch:
    """How far to look.

    rank  of the branch that is scored; rotations: orders of Hadamard blocks; acts: further activation formats
    clips  falling shares of the activations' measured range that codes may cover; the first that does not help ends it
    reach  of factors that are powers of two, 2^reach between the least and the largest at most; 0: any factors
    """

    rank: int = 0
    alphas: tuple[float, ...] = ALPHAS
    betas: tuple[str, ...] = ("1-alpha", "0")
    rotations: tuple[int, ...] = ()
    acts: tuple[TensorPlan, ...] = ()
    clips: tuple[float, ...] = ()
    reach: int = 0


@dataclass
class Found:
    """The best transform, the error it leaves (share of the outputs' power), that of none, how many were tried."""

    best: Transform
    error: float = 0.0
    before: float = 0.0
    tried: int = 0

    @property
    def reason(self) -> str:
        """Why the plan is as it is, for the report: what was chosen and by how much it beat doing nothing."""
        if self.tried < 2 or self.best.label == "none":
            return f"best of {self.tried}: input as it is" if self.tried > 1 else ""
        return f"best of {self.tried}: {self.best.label}, {10 * math.log10(self.before / self.error):+.1f} dB"


NOTHING = Found(Transform())


def orders(plan: LayerPlan) -> tuple[int, ...]:
    """Hadamard block orders worth trying: the largest up to MOST_ROTATED, and the activation's group size."""
    usable = hadamard.orders(plan.shape[1], MOST_ROTATED)
    groups = [act.grain.size for act in (plan.act, *plan.late) if act]
    return tuple(dict.fromkeys([*usable[-1:], *(group for group in groups if group in usable)]))


def narrowest(plan: LayerPlan) -> TensorPlan | None:
    """The activation format of least bits of all phases."""
    return None if plan.act is None else min((plan.act, *plan.late), key=lambda act: act.spec.bits)


class _Scorer:
    """Errors of transforms on a few rows, each computed once."""

    def __init__(self, shared: Shared, rank: int):
        self.shared, self.rank = shared, rank
        x, self.hat, self.phase = sample(shared.seen, shared.plan)
        self.targets = {name: module(x.to(module.weight.dtype)).float() for name, module in shared.modules.items()}
        self.errors: dict[str, float] = {}

    def __call__(self, change: Transform) -> float:
        if change.label not in self.errors:
            self.errors[change.label] = sum(self._one(name, change) for name in self.targets) / len(self.targets)
        return self.errors[change.label]

    def _one(self, name: str, change: Transform) -> float:
        made = transformed(self.shared.modules[name], self.shared.plans[name], change)
        y = self.targets[name]
        if self.rank:
            add_branch(made, self.hat, self.rank)
        return float((made(self.hat, self.phase) - y).square().sum() / y.square().sum().clamp(min=1e-30))


def sample(
    seen: LayerSeen, plan: LayerPlan, rows: int = SCORED_ROWS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(x, hat) fp32 and the phase of each: about `rows` of the rows or pixels that were seen, evenly spaced."""
    index = picked(seen, plan, rows)
    return seen.x[index].float(), seen.hat[index].float(), None if seen.phase is None else seen.phase[index]


def picked(seen: LayerSeen, plan: LayerPlan, rows: int = SCORED_ROWS) -> torch.Tensor:
    """Indices of the rows or crops that `sample` gives."""
    pixels = seen.x[0].numel() // plan.shape[1]
    count = max(1, min(len(seen.x), rows // pixels if pixels < rows else 1, len(seen.x)))
    return torch.linspace(0, len(seen.x) - 1, count).long()


@torch.no_grad()
def add_branch(made: DraftLinear, hat: torch.Tensor, rank: int) -> None:
    """Give a draft the low-rank branch of its weight, columns weighed by how loud their inputs are."""
    z, plan = made.transform(hat), made.plan
    dim = -1 if plan.kind == "linear" else 1
    loud = z.square().movedim(dim, -1).flatten(0, -2).mean(0).sqrt().clamp(min=1e-12)
    loud = loud.repeat_interleave(plan.columns // plan.shape[1])
    weight = made.weight.data.reshape(plan.rows, -1)
    down, up = lowrank.factors(weight * loud, rank)
    put_branch(made, down / loud, up, weight - up @ (down / loud))


@torch.no_grad()
def put_branch(made: DraftLinear, down: torch.Tensor, up: torch.Tensor, rest: torch.Tensor) -> None:
    """Set branch and remaining weight (rows, columns) of a draft; the plan's rank follows."""
    made.plan = replace(made.plan, rank=down.shape[0])
    made.proj_down, made.proj_up = (nn.Parameter(down), nn.Parameter(up)) if down.shape[0] else (None, None)
    made.weight.data.copy_(rest.reshape(made.plan.shape))


@torch.no_grad()
def search(shared: Shared, wish: SmoothSearch) -> Found:
    """The transform of a shared input that leaves the least error: smoothing, then rotation, format and clipping."""
    score = _Scorer(shared, wish.rank)
    nothing = Transform()
    smoothed = [_smooth(shared, wish, *pair) for pair in _pairs(wish)]
    best = _least(score, [nothing, *smoothed])
    if best.smooth is not None:
        alpha, beta = best.powers
        near = [(alpha + step, beta - step if beta else 0.0) for step in (-REFINE, REFINE)]
        best = _least(score, [best, *(_smooth(shared, wish, *pair) for pair in near)])
    turned = [replace(base, rotate=order) for order in wish.rotations for base in dict.fromkeys((nothing, best))]
    best = _least(score, [best, *turned])
    formats = [replace(best, act=act) for act in wish.acts]
    best = _least(score, [best, *formats])
    act = best.act or narrowest(shared.plan)
    tried = [] if act is None else [replace(best, act=replace(act, clip=clip)) for clip in wish.clips]
    for less in tried:
        if score(less) >= score(best):
            break
        best = less
    return Found(best, score(best), score(nothing), len(score.errors))


def _pairs(wish: SmoothSearch) -> Iterator[tuple[float, float]]:
    for alpha in wish.alphas:
        yield from ((alpha, 0.0 if beta == "0" else 1 - alpha) for beta in wish.betas)


def _least(score: _Scorer, changes: Sequence[Transform]) -> Transform:
    """The first of the changes with the least error."""
    return min(changes, key=score)


def _smooth(shared: Shared, wish: SmoothSearch, alpha: float, beta: float) -> Transform:
    factors = balance(shared, alpha, beta)
    if wish.reach:
        powers = factors.log2().round()
        factors = powers.clamp(max=float(powers.min()) + wish.reach).exp2()
    return Transform(factors, (alpha, beta))
