"""Background consistency: how little changes where the scene recogniser sees no object.

    consistency = 1 - 1 / (T - 1) sum_t>1 mean over p in B_t of |x_t(p) - x_1(p)|

B_t: pixels farther than 1.4 radii from every object found in frame 1 or frame t of T. Frames of another size
than 64x64 are scaled for the search. Not VBench's figure of that name, which compares CLIP features of whole frames:
this is for videos of the embedded models' scenes, whose background stands still. 1 for a still picture; where objects
leave no background, all pixels count.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

from eval import flow
from pipelines import tiny
from pipelines.tiny.recogniser import Found
from pipelines.tiny.scenes import RADII, SIDE

NEEDS = ("clips",)
UNITS = {"background_consistency": "share of range"}
BETTER = "higher"
REACH = 1.4  # radii: a star's points reach 1.12, and blurred edges a little farther


@cache
def _recogniser():
    return tiny.load_recogniser()


def _bare(found: Sequence[Found]) -> torch.Tensor:
    """Where none of these objects is: (64, 64)."""
    axis, bare = torch.arange(SIDE) + 0.5, torch.ones(SIDE, SIDE, dtype=torch.bool)
    for item in found:
        away = (axis[None, :] - item.x).square() + (axis[:, None] - item.y).square()
        bare &= away > (REACH * RADII[item.size]) ** 2
    return bare


def per_item(clips: Sequence[torch.Tensor]) -> list[float]:
    """Consistency of each video (T, 3, height, width) in [0, 1]; ValueError for a single frame."""
    found = []
    for clip in clips:
        frames = flow.check(clip, 2, "background consistency")
        seen = frames if frames.shape[2:] == (SIDE, SIDE) else F.interpolate(frames, (SIDE, SIDE), mode="bilinear")
        bare = torch.stack([_bare(row) for row in _recogniser().find(seen)])
        both = (bare[1:] & bare[:1])[:, None].float()
        both = F.interpolate(both, frames.shape[2:])[:, 0]
        both = torch.where(both.sum((1, 2), keepdim=True) > 0, both, 1.0)
        change = (frames[1:] - frames[:1]).double().abs().mean(1)
        found.append(1 - float(((change * both).sum((1, 2)) / both.sum((1, 2))).mean()))
    return found


def score(clips: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean consistency of some videos."""
    found = per_item(clips)
    return {"background_consistency": sum(found) / len(found)}
