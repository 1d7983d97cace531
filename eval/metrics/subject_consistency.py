"""Subject consistency: how alike all frames of a video are to its first one and to the one before, in a network.

    consistency = 1 / (T - 1) sum_t>1 (max(0, cos(f(x_1), f(x_t))) + max(0, cos(f(x_t-1), f(x_t)))) / 2

x_t: frame t of T; f: one vector a frame, of DINO as in VBench, Huang et al., 2311.17982, or of the stand-in. Unlike
`frame_consistency` it falls when a subject turns into another one slowly. 1 for a still picture.
"""

from collections.abc import Sequence

import torch

from eval import features as networks

NEEDS = ("clips",)
UNITS = {"subject_consistency": "cos"}
BETTER = "higher"
DINO = "facebook/dino-vitb16"
JUDGES = {DINO: (), networks.RECOGNISER: ()}
JUDGE_FROM = ("subject", "model")


def why_not(judge: str, fetch: bool = True) -> str | None:
    return networks.why_not(judge, fetch)


def per_item(clips: Sequence[torch.Tensor], judge: str = DINO) -> list[float]:
    """Consistency of each video (T, 3, height, width) in [0, 1]; ValueError for a single frame."""
    found = []
    for clip in clips:
        if len(clip) < 2:
            raise ValueError(f"subject consistency needs videos of 2 frames or more, got {len(clip)}")
        vectors = networks.network(judge).features(clip)
        to_first = torch.cosine_similarity(vectors[:1], vectors[1:]).clamp(min=0)
        to_last = torch.cosine_similarity(vectors[:-1], vectors[1:]).clamp(min=0)
        found.append(float((to_first + to_last).mean() / 2))
    return found


def score(clips: Sequence[torch.Tensor], judge: str = DINO) -> dict[str, float]:
    """Mean consistency of some videos."""
    found = per_item(clips, judge)
    return {"subject_consistency": sum(found) / len(found)}
