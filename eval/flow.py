"""Optical flow by block matching: where each pixel of a frame went, in whole pixels, for the motion figures.

    f(p) = argmin_d  mean over a window W around p of |y(q + d) - x(q)| + PENALTY |d|,   d in [-REACH, REACH]^2

x, y (N, 3, height, width): frames and the ones after them, pixels in [0, 1]. The penalty lets a flat area stand
still, the middle of a plain shape too. No network and no download, exact for whole steps of what has texture; figures
made with it compare with each other and with no published one, which take RAFT (Teed & Deng, 2003.12039).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

REACH = 8  # pixels a frame
WINDOW = 7  # pixels
PENALTY = 2e-4  # of range, a pixel of displacement


def shifted(images: torch.Tensor, dx: int, dy: int) -> torch.Tensor:
    """images(p + (dx, dy)): (N, c, height, width), edges repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) + dy).clamp(0, height - 1)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)
    return images[..., rows, :][..., columns]


def warped(images: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """images(p + flow(p)): (N, c, height, width) and whole steps (N, 2, height, width), edges repeated."""
    number, _, height, width = images.shape
    x = (torch.arange(width) + flow[:, 0].long()).clamp(0, width - 1)
    y = (torch.arange(height)[:, None] + flow[:, 1].long()).clamp(0, height - 1)
    return images[torch.arange(number)[:, None, None], :, y, x].permute(0, 3, 1, 2)


def between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Flow (x, y) from each first frame to its second, pixels: (N, 2, height, width)."""
    return _best(first, lambda dx, dy: (shifted(second, dx, dy) - first).abs())


def midway(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Half of the flow from first to second as the frame half-way between sees it: (N, 2, height, width), pixels."""
    return _best(first, lambda dx, dy: (shifted(second, dx, dy) - shifted(first, -dx, -dy)).abs())


def _steps() -> Iterator[tuple[int, int]]:
    """Displacements, near ones first, so that ties go to the smallest."""
    every = range(-REACH, REACH + 1)
    return iter(sorted(((dx, dy) for dx in every for dy in every), key=lambda d: d[0] ** 2 + d[1] ** 2))


@torch.no_grad()
def _best(like: torch.Tensor, error: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """The displacement of least error (N, c, height, width), averaged over a window, at each pixel."""
    least = torch.full((len(like), 1, *like.shape[2:]), torch.inf)
    flow = torch.zeros(len(like), 2, *like.shape[2:])
    for dx, dy in _steps():
        cost = error(dx, dy).mean(1, keepdim=True)
        cost = F.avg_pool2d(cost, WINDOW, 1, WINDOW // 2, count_include_pad=False)
        cost = cost + PENALTY * (dx * dx + dy * dy) ** 0.5
        better = cost < least
        least = torch.where(better, cost, least)
        flow = torch.where(better, torch.tensor([float(dx), float(dy)]).reshape(1, 2, 1, 1), flow)
    return flow


def check(clip: torch.Tensor, frames: int, what: str) -> torch.Tensor:
    """The clip in float32; ValueError unless it is (T, 3, height, width) with at least that many frames."""
    if clip.ndim != 4 or clip.shape[1] != 3 or len(clip) < frames:
        raise ValueError(
            f"{what} needs videos (T, 3, height, width) of {frames} frames or more, got {tuple(clip.shape)}"
        )
    return clip.float()
