"""Stored activation scales per step bucket: a finite set, or a small network of the timestep.

    x^ = q(x + shift; s[bucket, part]) - shift        s (buckets, parts) fp32, x (..., in) cut into parts of channels

finite_set  each bucket its own range (TFMQ-DM's finite set calibration, arXiv 2311.16503)
network     s(t) = softplus(MLP(t)), trained by the straight-through gradient of a scale (LSQ, arXiv 1902.08153) and
            then tabulated (TDQ, arXiv 2306.02316)

Both look only at how values are distributed, so that a layer is first boiled down to weighted values (`Values`):
exact at both tails, where clipping is decided, and evenly spaced ranks in between. An element weighs as much as the
weight column it meets, if the caller says so. A bucket that saw nothing takes the scale of the nearest one that did.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dq.formats.base import SCALE_FLOOR, Granularity
from dq.plan import LayerPlan, TensorPlan

POINTS = 2048  # values kept per bucket and part
SAMPLE = 32768  # values they are chosen from, next to the smallest and the largest
SHRINKS = tuple(1 - 0.01 * i for i in range(80))  # of the full range, as published
POWER = 2.0  # of the error that a search minimises; PTQ4DM's 2.4 spares the tails more


@dataclass(frozen=True, eq=False)
class Values:
    """What a layer's input looks like. value, weight (buckets, parts, points) fp32; filled (buckets,) bool.

    weight sums to 1 over the points of a bucket and part. Buckets that saw nothing repeat the nearest filled one.
    """

    value: torch.Tensor
    weight: torch.Tensor
    filled: torch.Tensor


@torch.no_grad()
def boil_down(
    x: torch.Tensor, bucket: torch.Tensor, plan: LayerPlan, buckets: int, importance: torch.Tensor | None = None
) -> Values:
    """Values of rows (n, in) or maps (n, in, *space) as the activation rounding meets them: transformed and shifted.

    bucket      (n,) step bucket of each row or map; all 0 gives one static range
    importance  (in,) weight of an element of each channel, e.g. squared norms of the weight's columns
    """
    if x.numel() == 0:
        raise ValueError("no rows to fit activation scales to")
    weight = torch.ones(x.shape[1]) if importance is None else importance.float().cpu()
    shape = (-1, *[1] * (x.dim() - 2))
    shift, edges = plan.act.shift if plan.act else 0.0, [0, *plan.splits, x.shape[1]]
    filled = torch.bincount(bucket, minlength=buckets)[:buckets] > 0
    points, places = [], nearest(filled)
    for index in places.unique().tolist():
        rows = x[bucket == index].float() + shift
        parts = [(rows[:, a:b], weight[a:b].reshape(shape).expand(rows[:, a:b].shape)) for a, b in pairwise(edges)]
        points.append([_points(values.flatten(), shares.flatten()) for values, shares in parts])
    value = torch.stack([torch.stack([value for value, _ in row]) for row in points])
    share = torch.stack([torch.stack([share for _, share in row]) for row in points])
    index = torch.unique(places, return_inverse=True)[1]
    return Values(value[index], share[index], filled)


def _points(values: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(POINTS,) values at ranks dense towards both ends, and the share of the whole that each stands for."""
    if values.numel() > SAMPLE:
        picked = torch.randint(values.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        ends = torch.stack([values.argmin(), values.argmax()])
        rarity = torch.ones(SAMPLE + 2).index_fill_(0, torch.tensor([0, 1]), SAMPLE / values.numel())
        picked = torch.cat([ends, picked.to(values.device)])
        values, shares = values[picked], shares[picked] * rarity.to(values.device)
    order = values.argsort()
    n, mass = values.numel(), shares[order].double().cumsum(0)
    spread = torch.linspace(-1, 1, POINTS, dtype=torch.float64) * torch.log(torch.tensor(2.0 * n))
    edges = (torch.sigmoid(spread) * n).round().long().clamp(0, n)
    edges[0], edges[-1] = 0, n
    ranks = ((edges[:-1] + edges[1:]) // 2).clamp(max=n - 1)
    mass = torch.cat([mass.new_zeros(1), mass])[edges].diff()
    total = mass.sum()
    mass = mass / total if total > 0 else torch.full_like(mass, 1 / mass.numel())
    return values[order[ranks]], mass.float()


def nearest(filled: torch.Tensor) -> torch.Tensor:
    """(buckets,) int64: index of the nearest filled bucket (the lower one of two), for each bucket."""
    known = filled.nonzero().flatten()
    distance = (torch.arange(filled.numel())[:, None] - known[None]).abs()
    return known[distance.argmin(1)]


def widest(values: Values, act: TensorPlan) -> torch.Tensor:
    """(buckets, parts) scales that just cover everything."""
    return (values.value.abs().amax(-1) / act.spec.grid().max()).clamp(min=SCALE_FLOOR)


def error(values: Values, scale: torch.Tensor, act: TensorPlan, power: float = 2.0) -> torch.Tensor:
    """(buckets, parts) weighted mean |x - x^|^power under scales of that shape."""
    step = scale[..., None]
    return (values.weight * (act.spec.snap(values.value / step) * step - values.value).abs() ** power).sum(-1)


@torch.no_grad()
def finite_set(values: Values, act: TensorPlan, power: float = POWER) -> torch.Tensor:
    """(buckets, parts) scales with the least error of their own bucket, of 80 shrinks of its full range."""
    values, places = _seen(values)
    full = widest(values, act)
    best, lowest = full.clone(), torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        found = error(values, full * shrink, act, power)
        better = found < lowest
        best, lowest = torch.where(better, full * shrink, best), torch.where(better, found, lowest)
    return best[places]


def _seen(values: Values) -> tuple[Values, torch.Tensor]:
    """The buckets that saw something, and the place of each bucket's nearest one among them."""
    known = values.filled.nonzero().flatten()
    places = torch.searchsorted(known, nearest(values.filled))
    return Values(values.value[known], values.weight[known], values.filled[known]), places


def _trainable(values: Values, scale: torch.Tensor, act: TensorPlan) -> torch.Tensor:
    """(buckets, parts) weighted mean squared error under scales of that shape, with LSQ's gradient to them."""
    buckets, parts, points = values.value.shape
    flat, row = values.value.reshape(-1, points), scale.reshape(-1, 1)
    rounded = act.spec.fake(flat, Granularity("token"), scale=row)
    return (values.weight.reshape(-1, points) * (rounded - flat).square()).sum(-1).reshape(buckets, parts)


class Network(nn.Module):
    """s(t) = softplus(MLP(e(t))) * s0: t (n,) in the model's units -> (n, parts) positive scales.

    e(t) is t itself, spread over -1 ... 1: Fourier features are as good at trained timesteps and tens of percent off
    between them. The last layer starts at zero, so that every t starts at s0 (parts,).
    """

    def __init__(self, start: torch.Tensor, first: float, last: float, width: int = 64, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (1, width, width, width, start.numel())
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in layers:
            layer.weight.data.normal_(0, (2 / layer.in_features) ** 0.5, generator=generator)
            layer.bias.data.uniform_(-1, 1, generator=generator)  # kinks spread over the range of t
        layers[-1].weight.data.mul_(0.01)
        layers[-1].bias.data.fill_(0.5413248546)  # softplus of it is 1
        self.layers = nn.ModuleList(layers)
        self.start = start.detach().clone()
        self.first = first
        self.span = max(last - first, 1e-12)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        y = (2 * (t.float().reshape(-1, 1) - self.first) / self.span) - 1
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return F.softplus(self.layers[-1](y)) * self.start

    @torch.no_grad()
    def bake(self, t: torch.Tensor) -> torch.Tensor:
        """The table (n, parts): one row per timestep, the forward's own numbers."""
        return self.forward(t).detach().clone()


def centres(edges: tuple[float, ...]) -> torch.Tensor:
    """(buckets,) a timestep inside each bucket: half-way, outer buckets taken to be as wide as their neighbours."""
    if not edges:
        return torch.zeros(1)
    if len(edges) == 1:
        return torch.tensor([edges[0] - 0.5, edges[0] + 0.5])
    outer = [2 * edges[0] - edges[1], *edges, 2 * edges[-1] - edges[-2]]
    return torch.tensor([(a + b) / 2 for a, b in pairwise(outer)])


def network(
    values: Values, act: TensorPlan, edges: tuple[float, ...], steps: int = 400, lr: float = 1e-2, seed: int = 0
) -> torch.Tensor:
    """(buckets, parts) scales of a network of the timestep, trained on every bucket that saw something."""
    times, known = centres(edges), values.filled
    values, _ = _seen(values)
    own = finite_set(values, act)
    best = error(values, own, act).clamp(min=1e-30)
    with torch.enable_grad():
        net = Network(own.log().mean(0).exp(), float(times[0]), float(times[-1]), seed=seed)
        adam = torch.optim.Adam(net.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            adam.zero_grad()
            (_trainable(values, net(times[known]), act) / best).mean().backward()
            adam.step()
            schedule.step()
    return net.bake(times)
