"""Flicker: change from frame to frame that the full-precision video of the same seed does not have.

    flicker = 1 / (T - 1) sum_t mean |(x_t+1 - x_t) - (r_t+1 - r_t)|

x_t, r_t: frame t of T of the quantized and the full-precision video, pixels in [0, 1]; the mean is over pixels and
colours. What moves in both, and an error that stays the same in all frames, count nothing. 0 for equal videos.
"""

from collections.abc import Sequence

import torch

NEEDS = ("clips", "reference_clips")
UNITS = {"flicker": "share of range"}
BETTER = "lower"


def per_item(clips: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """Flicker of each video (T, 3, height, width); ValueError when the videos differ in shape or are one frame."""
    found = []
    for mine, theirs in zip(clips, reference, strict=True):
        if mine.shape != theirs.shape or len(mine) < 2:
            shapes = f"{tuple(mine.shape)} and {tuple(theirs.shape)}"
            raise ValueError(f"flicker needs two videos of equal shape, 2 frames or more, got {shapes}")
        found.append(float((mine - theirs).double().diff(dim=0).abs().mean()))
    return found


def score(clips: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean flicker of some videos against their references."""
    found = per_item(clips, reference)
    return {"flicker": sum(found) / len(found)}
