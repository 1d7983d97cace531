"""Frame consistency: how alike the frames of a video are that follow each other, in the image features of a network.

    consistency = 1 / (T - 1) sum_t cos(f(x_t), f(x_t+1))

x_t: frame t of T; f: one vector a frame, usually CLIP's image embedding, as CLIP-Temp of Liu et al., 2310.11440, has
it. 1 for a still picture: a video that froze scores best, so the figure means something beside the full-precision one
and beside `flicker`.
"""

from collections.abc import Sequence

import torch

from eval import features as networks

NEEDS = ("clips",)
UNITS = {"frame_consistency": "cos"}
BETTER = "higher"
JUDGES = {networks.CLIP: (), networks.RECOGNISER: ()}
JUDGE_FROM = ("clip", "model")


def why_not(judge: str, fetch: bool = True) -> str | None:
    return networks.why_not(judge, fetch)


def per_item(clips: Sequence[torch.Tensor], judge: str = networks.CLIP) -> list[float]:
    """Consistency of each video (T, 3, height, width) in [0, 1]; ValueError for a single frame."""
    found = []
    for clip in clips:
        if len(clip) < 2:
            raise ValueError(f"frame consistency needs videos of 2 frames or more, got {len(clip)}")
        vectors = networks.network(judge).features(clip)
        found.append(float(torch.cosine_similarity(vectors[:-1], vectors[1:]).mean()))
    return found


def score(clips: Sequence[torch.Tensor], judge: str = networks.CLIP) -> dict[str, float]:
    """Mean consistency of some videos."""
    found = per_item(clips, judge)
    return {"frame_consistency": sum(found) / len(found)}
