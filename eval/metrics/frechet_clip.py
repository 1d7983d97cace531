"""Frechet clip distance: FID's formula on one vector a video, made like FVD but not FVD.

    v = [1 / T sum_t f(x_t), 1 / (T - 1) sum_t |f(x_t+1) - f(x_t)|]
    d^2 = |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))

f(x_t) (d,): features of frame t of T; the first half says what a video shows, the second how much it changes between
frames. m, S: mean and covariance of the vectors (N, 2 d) of both sets. Unterthiner et al., 1812.01717, take a network
trained on videos of people (I3D); the networks here see pictures, so figures compare with each other alone. 0 for
equal sets; a set that froze, was shuffled or runs faster moves away in the second half.
"""

import torch

from eval import features as networks
from eval.metrics import fid, why_no_library

NEEDS = ("clips", "features", "reference_features")
UNITS = {"frechet_clip": "1"}
BETTER = "lower"
JUDGES = {networks.RECOGNISER: (), networks.INCEPTION: ()}
JUDGE_FROM = ("fid", "features")
TAKES_STATISTICS = True
TAKES_PAIRS = True
LEAST = 0.0


def why_not(judge: str, fetch: bool = True) -> str | None:
    return why_no_library("torchmetrics") or networks.why_not(judge, fetch)


def vector(frames: torch.Tensor) -> torch.Tensor:
    """One vector (2 d,) of the features (T, d) of a video's frames; ValueError for a single frame."""
    if len(frames) < 2:
        raise ValueError(f"a clip's vector needs 2 frames or more, got {len(frames)}")
    return torch.cat([frames.mean(0), frames.diff(dim=0).abs().mean(0)])


def score(features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Distance of vectors (N, 2 d) from vectors (M, 2 d). ValueError when they do not fit."""
    return {"frechet_clip": fid.score(features, reference)["fid"]}


def note(counts: list[int], width: int) -> str:
    """What few videos mean for a figure; counts: videos of each set."""
    return fid.note(counts, width).replace("pictures", "videos")
