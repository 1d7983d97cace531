"""DGQ: activation scales for groups of alike channels, or for positions, whichever differ more. ICLR 2025, 2501.04304.

    D_d = (max_i a_i - min_i a_i) + (max_i b_i - min_i b_i),   a_i, b_i: least and largest value at index i of axis d
    y^ = sum_g q(W_g) q(z_g; s_g) + bias,   z = x permuted,  g = K-means cluster of the channels' max(|a_i|, |b_i|)

x (tokens, in) or (batch, in, ...), W (out, in, ...). Where channels differ more than positions, channels of a cluster
are put next to each other and have a stored scale, and weight scales, of their own; where positions do, each token has
a scale that is found in every call, which is a group for each position. A text's start token is stored as MixDQ stores
it, and does not count in ranges. A quiet group's range is that of the prompts it was fitted to: where a layer sees the
text, some tens of them are needed. Deviations: ranges are symmetric and searched by squared error, and clusters are of
magnitudes (the paper: minimum and maximum with zero points, clusters of both); position groups of convolutions are
one scale and zero point a sample; weights are rounded by GPTQ (the paper: AdaRound, or nearest). The paper's
logarithmic scores of attention are added by `+dgq-attention`. Options: `groups` clusters of channels, 1 for none;
`permute` False makes as many groups of equal size of channels in their own order.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from dq.fit import static
from dq.fit.drafts import DraftLinear
from dq.layers import STARTS_ALIKE
from dq.methods import mixdq, qdiffusion
from dq.plan import LayerPlan, Recipe, TensorPlan
from dq.trace.seen import LayerSeen, Needs, Seen, Unit, UnitCall

NEEDS = Needs(rows=4096, gram=True, calls=True, hat=False)
GROUPS = 8
RECIPES = tuple(
    Recipe(name, formats, formats, method="dgq", status="experimental", options={"groups": GROUPS})
    for name, formats in (
        ("dgq-w4a8", ("int4/channel", "int8/tensor/static")),
        ("dgq-w4a6", ("int4/channel", "int6/tensor/static")),
    )
)
WISH = static.StaticWish(smooth=False, shift=False, rotate=False, margins=(1.0,))


@dataclass
class Ends:
    """Least and largest values of a layer's input at each channel and at each position over all calls: (n, 2)."""

    channels: torch.Tensor
    positions: torch.Tensor

    @property
    def by_channel(self) -> bool:
        return spread(self.channels) >= spread(self.positions)


def smooths(options: Mapping) -> bool:
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers with rounded activations; weight-only layers are left to plain rounding."""
    made, starts = {}, mixdq.start_tokens(unit, seen.calls("full"))
    found = ends(unit, seen.calls("full"), starts)
    for name, plan in unit.layers.items():
        if plan.act is not None and name in seen.layers:
            layer = _without(seen.layers[name], starts.get(name))
            made[name] = _fitted(unit.layer(name), plan, layer, found[name], seen, options)
            if name in starts:
                made[name].plan, made[name].start_in = replace(made[name].plan, start=True), starts[name]
    return made


def _fitted(module, plan: LayerPlan, layer: LayerSeen, found: Ends, seen: Seen, options: Mapping) -> DraftLinear:
    assert plan.act is not None  # only layers with rounded activations are fitted here
    if not found.by_channel or len(found.channels) != plan.shape[1]:  # a grouped convolution has no groups of its own
        grain, form = ("token", plan.act.format) if plan.kind == "linear" else ("tensor", f"{plan.act.format}a")
        plan = replace(plan, act=TensorPlan(form, grain, "dynamic"), reason="a scale for each position")
        return qdiffusion.rounded(module, plan, layer, seen, {})[0]
    channels, groups = len(found.channels), options["groups"]
    labels = torch.arange(channels) * min(groups, channels) // channels
    if options.get("permute", True):
        labels = clusters(found.channels.abs().amax(1, keepdim=True), groups, seen.seed)
    sizes, order = torch.bincount(labels), labels.argsort(stable=True)
    splits = tuple(accumulate(sizes.tolist()))[:-1]
    permute = bool((order.diff() < 0).any())
    plan = replace(plan, permute=permute, splits=splits, reason=f"a scale for each of {len(sizes)} groups of channels")
    return static.fit(module, plan, layer, seen, WISH, order if permute else None)


def spread(found: torch.Tensor) -> float:
    """D of the module docstring, of (n, 2) ends."""
    return float((found.amax(0) - found.amin(0)).sum())


def clusters(found: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(n,) the K-means cluster of each of (n, d) points, at most `count`, numbered without gaps."""
    points = found.double().numpy()
    count = min(count, len(np.unique(points, axis=0)))
    labels = kmeans2(points, count, minit="++", rng=np.random.default_rng(seed))[1]
    return torch.unique(torch.from_numpy(labels), return_inverse=True)[1]


def _without(layer: LayerSeen, start: torch.Tensor | None) -> LayerSeen:
    """What a layer saw but for the start token, whose output is stored."""
    if start is None:
        return layer
    far = (layer.hat - start).square().sum(1) >= STARTS_ALIKE * start.square().sum()
    rows = {name: getattr(layer, name)[far] for name in ("x", "hat", "bucket", "branch")}
    return replace(layer, gram=rows["hat"].float().t() @ rows["hat"].float() / far.sum(), **rows)


@torch.no_grad()
def ends(unit: Unit, calls: Iterable[UnitCall], starts: Container[str] = ()) -> dict[str, Ends]:
    """By layer that is called: the ends of its inputs over the calls, without first tokens in `starts`."""
    found: dict[str, Ends] = {}

    def watch(name: str, dim: int):
        def look(module, args):
            x = args[0][:, 1:].float().cpu() if name in starts else args[0].float().cpu()
            table = x.movedim(dim, -1).reshape(len(x), -1, x.shape[dim])  # (batch, positions, channels)
            own = [torch.stack([table.amin(axes), table.amax(axes)], 1) for axes in ((0, 1), (0, 2))]
            known = vars(found[name]).values() if name in found else own
            found[name] = Ends(*(merged(*pair) for pair in zip(known, own, strict=True)))

        return look

    looks = {
        name: watch(name, -1 if plan.kind == "linear" else 1)
        for name, plan in unit.layers.items()
        if plan.act is not None
    }
    mixdq.replayed(unit, calls, looks)
    return found


def merged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Ends (n, 2) over both, as long as the longer one."""
    found = torch.tensor([torch.inf, -torch.inf]).repeat(max(len(one), len(other)), 1)
    for each in (one, other):
        found[: len(each), 0] = torch.minimum(found[: len(each), 0], each[:, 0])
        found[: len(each), 1] = torch.maximum(found[: len(each), 1], each[:, 1])
    return found
