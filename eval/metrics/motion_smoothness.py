"""Motion smoothness: how well each frame is foretold by the frames before and after it.

    smoothness = 1 - 1 / (T - 2) sum_t mean |x_t - m_t|,   m_t(p) = (x_t-1(p - h(p)) + x_t+1(p + h(p))) / 2

h: half the motion from frame t - 1 to t + 1 of T as the frame between sees it, whole pixels, of `eval.flow`. VBench,
Huang et al., 2311.17982, makes m_t with a frame interpolation network; this is block matching, so figures compare with
each other alone. 1 for a still picture; even motion loses a little at edges that cover and uncover, more when faster.
"""

from collections.abc import Sequence

import torch

from eval import flow

NEEDS = ("clips",)
UNITS = {"motion_smoothness": "1"}
BETTER = "higher"


def per_item(clips: Sequence[torch.Tensor]) -> list[float]:
    """Smoothness of each video (T, 3, height, width) in [0, 1]; ValueError for fewer than three frames."""
    found = []
    for clip in clips:
        frames = flow.check(clip, 3, "motion smoothness")
        before, after = frames[:-2], frames[2:]
        half = flow.midway(before, after)
        foretold = (flow.warped(before, -half) + flow.warped(after, half)) / 2
        found.append(1 - float((frames[1:-1] - foretold).double().abs().mean()))
    return found


def score(clips: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean smoothness of some videos."""
    found = per_item(clips)
    return {"motion_smoothness": sum(found) / len(found)}
