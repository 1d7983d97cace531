"""Dynamic degree: how far the fastest parts of a video move from frame to frame.

    degree = 1 / (T - 1) sum_t mean of the largest 5 % of |f_t(p)| over pixels p

f_t: flow from frame t of T to t + 1 of `eval.flow` (block matching, at most 8 pixels along each axis). VBench, Huang
et al., 2311.17982, takes the same 5 % of RAFT's flow and then counts videos above a threshold. 0 for a still picture:
beside the full-precision figure it shows a video that froze; of one that shakes, `motion_smoothness` falls.
"""

from collections.abc import Sequence

import torch

from eval import flow

NEEDS = ("clips",)
UNITS = {"dynamic_degree": "pixels a frame"}
BETTER = "higher"
SHARE = 0.05  # of the pixels


def per_item(clips: Sequence[torch.Tensor]) -> list[float]:
    """Degree of each video (T, 3, height, width) in [0, 1]; ValueError for a single frame."""
    found = []
    for clip in clips:
        frames = flow.check(clip, 2, "dynamic degree")
        lengths = flow.between(frames[:-1], frames[1:]).norm(dim=1).flatten(1)
        found.append(float(lengths.topk(max(1, round(SHARE * lengths.shape[1]))).values.mean()))
    return found


def score(clips: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean degree of some videos."""
    found = per_item(clips)
    return {"dynamic_degree": sum(found) / len(found)}
