"""Kernel distance between generated and real pictures in the features of a network, by torchmetrics.

    kid = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(a, b) = (a.b / d + 1)^3

x, y (count, d): features of the two sets. Binkowski et al., 1801.01401: an unbiased estimate at any count, so it may
fall a little below 0. It asks for sets that are independent: pictures of the same seeds are not (equal sets come out
below 0), so there is no KID against full precision. The mean over subsets of 1000 pictures, or of as many as the
smaller set has, always the same ones. Through another network than Inception v3 it compares only with others of that
network.
"""

import warnings

import torch
from torch import nn

from eval import features as networks
from eval.metrics import why_no_library

NEEDS = ("features", "reference_features")
UNITS = {"kid": "1"}
BETTER = "lower"
JUDGES = {networks.INCEPTION: (), networks.RECOGNISER: ()}
JUDGE_FROM = ("fid", "features")
TAKES_STATISTICS, TAKES_PAIRS = False, False
LEAST = float("-inf")
SUBSET, SUBSETS = 1000, 20


def why_not(judge: str, fetch: bool = True) -> str | None:
    return why_no_library("torchmetrics") or networks.why_not(judge, fetch)


def score(features: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """KID of features (N, d) against features (M, d). ValueError when they do not fit."""
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = features.double(), reference.double()
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"kid needs features (2 or more, d) of two sets, equal d, got {shapes}")
    size = min(SUBSET, len(x), len(y))
    subsets = 1 if size == len(x) == len(y) else SUBSETS  # every subset is then the whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept in memory is meant
        distance = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=size, sync_on_compute=False)
    distance.update(x, real=False)
    distance.update(y, real=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"kid": float(distance.compute()[0])}


def note(counts: list[int], width: int) -> str:
    return ""
