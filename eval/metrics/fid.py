"""Fréchet distance between two sets of pictures in the features of a network, by torchmetrics.

    fid = |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))

m (d,), C (d, d): mean and unbiased covariance of the features of one set, m', C' of the other. Heusel et al.,
1706.08500, which takes the 2048 features of Inception v3; through any other network the figure compares only with
others of that network, and its name says so. Under d + 1 pictures the covariance has no full rank; at any count the
figure is too high, about in proportion to 1 / count (Chong and Forsyth, 1911.07023), so that sets of different sizes
do not compare. Below full precision's own figure is common and means little.
"""

import torch
from torch import nn

from eval import features as networks
from eval.features import Statistics
from eval.metrics import why_no_library

NEEDS = ("features", "reference_features")
UNITS = {"fid": "1"}
BETTER = "lower"
JUDGES = {networks.INCEPTION: (), networks.RECOGNISER: ()}
JUDGE_FROM = ("fid", "features")
TAKES_STATISTICS = True  # beside features, a mean and a covariance will do
TAKES_PAIRS = True  # a reference of the same seeds will do
LEAST = 0.0  # no figure is below


def why_not(judge: str, fetch: bool = True) -> str | None:
    return why_no_library("torchmetrics") or networks.why_not(judge, fetch)


def score(features: torch.Tensor, reference: torch.Tensor | Statistics) -> dict[str, float]:
    """FID of features (N, d) against features (M, d) or statistics. ValueError when they do not fit."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    wanted = reference if isinstance(reference, Statistics) else Statistics.of(reference)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] != len(wanted.mean):
        raise ValueError(f"fid needs features (2 or more, {len(wanted.mean)}), got {tuple(features.shape)}")
    as_given = nn.Identity()
    as_given.num_features = len(wanted.mean)
    distance = FrechetInceptionDistance(as_given, sync_on_compute=False)
    distance.update(features.double(), real=False)
    count = wanted.count or 2  # the library keeps sums, and any count gives back the same mean and covariance
    distance.real_features_num_samples = torch.tensor(count)
    distance.real_features_sum = wanted.mean * count
    distance.real_features_cov_sum = wanted.covariance * (count - 1) + count * torch.outer(wanted.mean, wanted.mean)
    # eigenvalues of equal sets come out a little off: no distance is below 0
    return {"fid": max(0.0, float(distance.compute()))}


def note(counts: list[int], width: int) -> str:
    """What few pictures mean for a figure; counts: pictures of each set."""
    if min(counts) > width:
        return ""
    return (
        f"{min(counts)} pictures are too few for a covariance of {width} features (it has no full rank): "
        "the figure is too high and compares only with others of the same count"
    )
