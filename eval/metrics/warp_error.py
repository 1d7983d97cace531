"""Warp error: change of what moves, once its motion is taken back.

    error = 1 / (T - 1) sum_t mean over seen p of |x_t+1(p + f_t(p)) - x_t(p)|^2

f_t: flow from frame t of T to t + 1, whole pixels, of `eval.flow`. A pixel is seen in both frames when the flow back
from where it went ends within a pixel of it. Lai et al., 1808.00449, section 4, with block matching in place of a
network's flow and without the reference video. 0 for a still picture, near 0 for even motion of whole pixels.
"""

from collections.abc import Sequence

import torch

from eval import flow

NEEDS = ("clips",)
UNITS = {"warp_error": "share of range, squared"}
BETTER = "lower"
NEAR = 1.0  # pixels


def per_item(clips: Sequence[torch.Tensor]) -> list[float]:
    """Error of each video (T, 3, height, width) in [0, 1]; ValueError for a single frame."""
    found = []
    for clip in clips:
        frames = flow.check(clip, 2, "warp error")
        first, second = frames[:-1], frames[1:]
        there, back = flow.between(first, second), flow.between(second, first)
        seen = (there + flow.warped(back, there)).norm(dim=1) <= NEAR
        change = (flow.warped(second, there) - first).double().square().mean(1)
        found.append(float((change * seen).sum() / seen.sum().clamp(min=1)))
    return found


def score(clips: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean error of some videos."""
    found = per_item(clips)
    return {"warp_error": sum(found) / len(found)}
