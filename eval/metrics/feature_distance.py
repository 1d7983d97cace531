"""Distance of pictures in the features of the project's own scene recogniser, made like LPIPS but not LPIPS.

    d(x, y) = sum_l 1 / (H_l W_l) sum_hw |u_l(x)_hw - u_l(y)_hw|^2,    u_l = f_l / |f_l| over channels

f_l (channels, H_l, W_l): what the recogniser computes at each of its eight stages, for pictures x, y in [0, 1].
Zhang et al., 1801.03924, equation 1 with all channel weights 1. LPIPS takes ImageNet nets and weights fitted to human
judgements; this net was trained on the scenes that the embedded models draw and needs no download, so figures compare
with each other and with no published one. 0 for equal pictures, at most 4 a stage.
"""

import contextlib
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from eval.metrics import psnr
from pipelines import tiny

NEEDS = ("images", "reference")
UNITS = {"feature_distance": "1", "feature_distance_worst": "1"}
BETTER = "lower"
CHUNK = 64  # pictures that go through the net at once


@cache
def _recogniser() -> nn.Module:
    return tiny.load_recogniser()


@contextlib.contextmanager
def _stages(net: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that gets the feature maps of every stage while `net` runs: five of the stem, three residual sums."""
    maps: list[torch.Tensor] = []
    hooks = [stage.register_forward_hook(lambda _, args, output: maps.append(output)) for stage in net.stem]
    sums = [*list(net.blocks)[1:], net.head]  # a residual sum is the input of what comes next
    hooks += [stage.register_forward_pre_hook(lambda _, args: maps.append(args[0])) for stage in sums]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _directions(images: torch.Tensor) -> list[torch.Tensor]:
    """Unit features (N, channels, H, W) of each stage."""
    net = _recogniser()
    with _stages(net) as maps:
        net(images)
    return [F.normalize(features, dim=1) for features in maps]


def per_picture(images, reference) -> torch.Tensor:
    """Distance of each picture from its reference, (N,); ValueError when the sets differ in shape or are not RGB."""
    x, y = psnr.as_batch(images).float(), psnr.as_batch(reference).float()
    if x.shape != y.shape or x.shape[1] != 3:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"feature distance needs two sets (N, 3, height, width) of equal shape, got {shapes}")
    parts = []
    for mine, theirs in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        pairs = zip(_directions(mine), _directions(theirs), strict=True)
        parts.append(sum((a - b).square().sum(1).mean((1, 2)) for a, b in pairs))
    return torch.cat(parts)


def per_item(images, reference) -> list[float]:
    """Distance of each picture from its reference."""
    return per_picture(images, reference).tolist()


def score(images, reference) -> dict[str, float]:
    """Mean and largest distance of N pictures from their N references."""
    distances = per_picture(images, reference)
    return {"feature_distance": float(distances.mean()), "feature_distance_worst": float(distances.max())}
