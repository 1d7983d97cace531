"""Motion accuracy: share of clips in which every object the caption names moves as it says.

    accuracy = 1/N sum_n [ for every object m of clip n: motion seen of m = motion named of m ]

`objects_right` is the share of clips in which every object is seen in its colour and shape, `both` the share in which
all of that holds. Objects are followed from frame to frame by `pipelines.tiny.motion_judge`, the project's own
recogniser and fixed thresholds, right on 97 % of objects in held-out renders: smaller differences are its own noise.
"""

from collections.abc import Sequence

import torch

from eval.metrics.caption_accuracy import recogniser
from pipelines.tiny import motion, motion_judge, scenes

NEEDS = ("clips", "motions")
UNITS = dict.fromkeys(("motion_accuracy", "objects_right", "both"), "share of clips")
BETTER = "higher"
SHAPE = (motion.FRAMES, 3, scenes.SIDE, scenes.SIDE)


def _judged(clips: Sequence[torch.Tensor], motions: Sequence[motion.Clip]) -> list[tuple[bool, bool]]:
    """For each clip: whether all its motions, and all its objects, are seen."""
    if len(clips) != len(motions):
        raise ValueError(f"motion accuracy needs as many labels as clips, got {len(motions)} and {len(clips)}")
    found = []
    for frames, clip in zip(clips, motions, strict=True):
        if tuple(frames.shape) != SHAPE:
            raise ValueError(f"motion accuracy needs clips {SHAPE}, got {tuple(frames.shape)}")
        seen = motion_judge.judge(frames.float(), clip, recogniser())
        moves = all(kind == named.kind for (_, kind), named in zip(seen, clip.motions, strict=True))
        found.append((moves, all(right for right, _ in seen)))
    return found


def per_item(clips: Sequence[torch.Tensor], motions: Sequence[motion.Clip]) -> list[float]:
    """1 for each clip (8, 3, 64, 64) in [0, 1] in which everything moves as labelled, else 0."""
    return [float(moves) for moves, _ in _judged(clips, motions)]


def score(clips: Sequence[torch.Tensor], motions: Sequence[motion.Clip]) -> dict[str, float]:
    """Figures of N clips against the N labels their captions came from; see the module docstring."""
    found = _judged(clips, motions)
    rows = zip(*[(moves, right, moves and right) for moves, right in found], strict=True)
    return {name: sum(row) / len(found) for name, row in zip(UNITS, rows, strict=True)}
