"""One layer with stored activation scales: which smoothing, shift and ranges leave the least output error.

    y^ = W' (q(z + shift; s[bucket, part]) - shift) + bias,    z = x * smooth,  W' = q(W / smooth)

x (rows, in), W (out, in), smooth (in,), s (buckets, parts). A stored scale per tensor cannot follow uneven channels as
a scale per token does, but a factor per channel, folded into the weight, evens them out beforehand: smooth_c =
max_row |W_rc|^beta / max |x_c|^alpha (SmoothQuant, arXiv 2211.10438). Candidates are scored at the layer's output on
calls that their ranges were not fitted to, each row at the scale of its own step; doing nothing is one of them. What
new prompts add beyond the range seen is the risk of stored scales: wider ranges are candidates too, and none covers
less than half of the largest value that any call had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import gcd
from typing import Any

import torch
from torch import nn

from dq.errors import DQError, nearest
from dq.fit import moments, rounding, tables
from dq.fit.drafts import DraftLinear, draft
from dq.fit.smooth import column_absmax
from dq.layers import hadamard
from dq.layers.clock import Clock
from dq.plan import LayerPlan
from dq.trace.seen import LayerSeen, Seen, Unit

SCORED = 4096  # rows or pixels a candidate is scored on
POWERS = ((0.5, 0.0), (0.5, 0.5), (0.75, 0.0), (0.75, 0.25), (1.0, 0.0))  # (alpha, beta)
QUIET = 1e-2  # channels quieter than this share of the loudest count as so loud
MARGINS = (1.0, 1.25, 1.6)
FLOOR = 0.5  # share of the largest value ever seen that a searched range covers at least
GAIN = 0.9  # share of the error that a shift or a rotation, which cost time in every call, must come under


@dataclass(frozen=True)
class StaticWish:
    """How stored scales are chosen.

    ranges         "minmax", "search" or, for tables, "network"
    smooth, shift, rotate  whether candidates have them; margins: factors on the range that are tried
    power          of the error that the range search minimises
    round          "nearest", or "gptq": nearest or GPTQ, whatever leaves least error
    """

    ranges: str = "search"
    smooth: bool = True
    shift: bool = True
    rotate: bool = True
    margins: tuple[float, ...] = MARGINS
    power: float = tables.POWER
    round: str = "gptq"


def wish(options: Mapping[str, Any]) -> StaticWish:
    """The wish that a recipe's options state. DQError for an option that is none of its fields."""
    known = [item.name for item in fields(StaticWish)]
    for name in options:
        if name not in known:
            raise DQError(f"option {name!r} of stored scales is unknown, {nearest(name, known)}")
    return StaticWish(**options)


@dataclass(frozen=True)
class Change:
    """A candidate. powers: (alpha, beta) of the smoothing or None; rotate, shift: as in plans."""

    powers: tuple[float, float] | None = None
    rotate: int = 0
    shift: float = 0.0
    margin: float = 1.0


class Layer:
    """A layer to fit: its module, plan and what it saw, the rows cut in two by calls."""

    def __init__(
        self, module: Any, plan: LayerPlan, seen: LayerSeen, whole: Seen, permute: torch.Tensor | None = None
    ):
        assert plan.act is not None  # only layers with stored scales are fitted here
        self.module, self.permute = module, permute
        self.seen = seen
        self.whole = whole
        self.act = plan.act
        self.plan = replace(plan, steps=whole.buckets if self.act.scale == "table" else 1)
        self.bucket = seen.bucket if self.plan.steps > 1 else torch.zeros_like(seen.bucket)
        self.channels = -1 if plan.kind == "linear" else 1
        self.used, self.held = _halves(seen.bucket, seen.hat[0].numel() // plan.shape[1])
        self.everything = torch.arange(len(seen.hat))
        self.target = module(seen.x[self.held].to(module.weight.dtype)).float()

    def start(self, change: Change, rows: torch.Tensor) -> DraftLinear:
        """A draft with this transform, from the statistics of these rows; act_scale not yet set."""
        act = replace(self.act, shift=change.shift)
        plan = replace(self.plan, smooth=change.powers is not None, rotate=change.rotate, act=act)
        smooth = None if change.powers is None else self.balance(*change.powers, rows)
        return draft(self.module, plan, smooth, self.permute)

    def balance(self, alpha: float, beta: float, rows: torch.Tensor) -> torch.Tensor:
        """(in,) smoothing vector of the module docstring, geometric mean 1."""
        log = beta * _floored(column_absmax(self.module.weight)).log() - alpha * _floored(self.absmax(rows)).log()
        return (log - log.mean()).exp()

    def absmax(self, rows: torch.Tensor) -> torch.Tensor:
        """(in,) largest magnitude of each input channel: in these rows, or ever if these are all rows."""
        if self.seen.absmax is not None and rows is self.everything:
            return self.seen.absmax.flatten(0, 1).amax(0)
        return self.seen.hat[rows].float().abs().movedim(self.channels, -1).flatten(0, -2).amax(0)

    def transformed(self, made: DraftLinear, rows: torch.Tensor) -> torch.Tensor:
        """Those rows or maps of the quantized stream as they are rounded."""
        return made.transform(made.padded(self.seen.hat[rows].float()))

    def ranges(self, made: DraftLinear, wish: StaticWish, rows: torch.Tensor) -> torch.Tensor:
        """(steps, parts) scales fitted to those rows, none far below what the largest value ever seen asks for."""
        act, steps = made.plan.act, made.plan.steps
        assert act is not None
        plain = made.plan.rotate == 0 and act.shift == 0
        if wish.ranges == "minmax" and self.seen.absmax is not None and plain:
            return self._widest(made)
        importance = made.weight.data.square().transpose(0, 1).flatten(1).sum(1)
        z = self.transformed(made, rows)
        values = tables.boil_down(z, self.bucket[rows], made.plan, steps, importance)
        if wish.ranges == "minmax":
            return tables.widest(values, act)
        if wish.ranges == "network" and steps > 1:
            found = tables.network(values, act, self.whole.edges, seed=self.whole.seed)
        else:
            found = tables.finite_set(values, act, wish.power)
        if self.seen.absmax is None or not plain:
            return found
        return torch.maximum(found, FLOOR * self._widest(made).to(found.device))

    def _widest(self, made: DraftLinear) -> torch.Tensor:
        """(steps, parts) scales that cover everything that was ever seen."""
        assert self.seen.absmax is not None
        tops = self.seen.absmax.amax(1) * (1.0 if made.smooth is None else made.smooth.data)
        tops = tops if self.permute is None else tops[:, self.permute]
        tops = (tops if made.plan.steps > 1 else tops.amax(0, keepdim=True))[
            tables.nearest(tops.amax(1) > 0) if made.plan.steps > 1 else slice(None)
        ]
        cuts = pairwise([0, *made.plan.splits, tops.shape[1]])
        return torch.stack([tops[:, a:b].amax(1) for a, b in cuts], 1) / self.act.spec.grid().max()

    @torch.no_grad()
    def error(self, made: DraftLinear) -> float:
        """Share of the output's power that the draft misses on the held rows, each row at its own bucket's scale."""
        y = outputs(made, self.seen.hat[self.held], self.bucket[self.held])
        return float((y - self.target).square().sum() / self.target.square().sum().clamp(min=1e-30))


def _halves(bucket: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (rows to fit ranges to, rows to score on): the first and the last half of every bucket, which are different
    calls wherever a bucket has two; of the latter about SCORED rows or pixels."""
    if len(bucket) < 2:
        return torch.arange(len(bucket)), torch.arange(len(bucket))
    used, held = [], []
    for index in bucket.unique():
        rows = (bucket == index).nonzero().flatten()
        used.append(rows[: (len(rows) + 1) // 2])
        held.append(rows[(len(rows) + 1) // 2 :])
    held = torch.cat(held)
    return torch.cat(used), held[:: max(1, len(held) * pixels // SCORED)] if len(held) else used[0]


def outputs(made: DraftLinear, x: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
    """The draft's output for rows or maps of different step buckets at once."""
    z = made.transform(made.padded(x.float()))
    dim, act = (-1 if made.op == "linear" else 1), made.plan.act
    scale = made.act_scale.data[bucket if made.plan.steps > 1 else torch.zeros_like(bucket)]
    shape = (-1, *[1] * (z.dim() - 1))
    parts = []
    for part, (a, b) in enumerate(pairwise([0, *made.plan.splits, z.shape[dim]])):
        step = scale[:, part].reshape(shape)
        parts.append(act.spec.snap((z.narrow(dim, a, b - a) + act.shift) / step) * step - act.shift)
    return made.product(torch.cat(parts, dim) if len(parts) > 1 else parts[0], made.rounded_weight())


def _floored(absmax: torch.Tensor) -> torch.Tensor:
    return absmax.clamp(min=float(absmax.amax()) * QUIET).clamp(min=1e-12)


def _centre(layer: Layer, change: Change, rows: torch.Tensor) -> Change:
    """The same with the transformed input's range centred on zero, over all parts and steps; as plans write it."""
    z = layer.transformed(layer.start(change, rows), rows)
    return replace(change, shift=float(f"{-float(z.amax() + z.amin()) / 2:g}"))


@torch.no_grad()
def fit(
    module: nn.Module,
    plan: LayerPlan,
    seen: LayerSeen,
    whole: Seen,
    wish: StaticWish,
    permute: torch.Tensor | None = None,
) -> DraftLinear:
    """The draft of a layer whose plan has stored activation scales, its weight rounded; `permute` (in,) of its plan's.

    `draft.plan` is final; `draft.tried` counts candidates; its clock stands at the middle bucket.
    """
    layer = Layer(module, plan, seen, whole, permute)
    best, tried = _choose(layer, wish)
    rows = layer.everything
    made = layer.start(best, rows)
    made.act_scale.data.copy_(layer.ranges(made, wish, rows) * best.margin)
    if wish.round == "gptq" and seen.gram is not None:
        tried += _round(layer, made)
    made.tried, made.clock = tried, middle(whole.buckets)
    return made


def _choose(layer: Layer, wish: StaticWish) -> tuple[Change, int]:
    """The candidate of least error, and how many there were. A search stands for networks, too slow to score."""
    quick = replace(wish, ranges="minmax" if wish.ranges == "minmax" else "search")
    changes = [Change(), *(Change(powers) for powers in POWERS if wish.smooth)]
    scores: dict[Change, float] = {}
    for change in changes if len(changes) * len(wish.margins) > 1 or wish.shift or wish.rotate else ():
        _score(layer, change, quick, scores)
    best = min(scores, key=scores.get) if scores else Change()
    plain = replace(best, margin=1.0)
    further = [replace(base, rotate=_order(layer.plan)) for base in {plain: 0, Change(): 0} if wish.rotate]
    further += [_centre(layer, plain, layer.used)] if wish.shift else []
    for change in further:
        _score(layer, change, quick, scores)
    dear = min((change for change in scores if change.shift or change.rotate), key=scores.get, default=best)
    return dear if scores and scores[dear] < GAIN * scores[best] else best, len(scores)


def _order(plan: LayerPlan) -> int:
    """The largest Hadamard order up to 256 that divides every part of the input, 0 if there is none."""
    width = gcd(plan.shape[1], *plan.splits)
    return max(hadamard.orders(width, 256), default=0)


def _score(layer: Layer, change: Change, wish: StaticWish, scores: dict[Change, float]) -> None:
    made = layer.start(change, layer.used)
    scale = layer.ranges(made, wish, layer.used)
    for margin in wish.margins:
        made.act_scale.data.copy_(scale * margin)  # pyright: ignore[reportOptionalMemberAccess]
        scores[replace(change, margin=margin)] = layer.error(made)


def _round(layer: Layer, made: DraftLinear) -> int:
    """Set weight and weight scales to whatever of nearest and GPTQ leaves the least error."""
    start, plan = made.weight.data.reshape(made.plan.rows, -1).clone(), made.plan
    met = moments.rounded(layer.seen, made)
    variants = [rounding.nearest(start, plan), rounding.gptq(start, plan, met, search=True)]
    errors = []
    for weight, scales in variants:
        made.weight.data.copy_(weight.reshape(plan.shape))
        made.scales = scales
        errors.append(layer.error(made))
    weight, made.scales = variants[errors.index(min(errors))]
    made.weight.data.copy_(weight.reshape(plan.shape))
    return len(variants)


def layers(unit: Unit, seen: Seen, wish: StaticWish) -> dict[str, DraftLinear]:
    """Drafts of the layers of a unit that saw data and are planned to have stored activation scales."""
    made = {}
    for name, plan in unit.layers.items():
        if plan.act is not None and plan.act.scale != "dynamic" and name in seen.layers:
            made[name] = fit(unit.layer(name), plan, seen.layers[name], seen, wish)
    return made


def middle(buckets: int) -> Clock:
    """A clock that stands at the middle bucket."""
    clock = Clock()
    clock.index.fill_(buckets // 2)
    return clock
