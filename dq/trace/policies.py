"""Which calls of a calibration are kept: (run, step) pairs, from a seed alone.

A run is one call of the pipeline with one prompt and T denoising steps; N pairs are kept:

    uniform     any N pairs, each equally likely
    all         every step of as many runs as fit into N
    normal      steps back from the clean end = floor of Normal(0.4 T, 0.4 T), clamped to [0, T - 1]: PTQ4DM (Shang et
                al., CVPR 2023)
    stratified  a fixed stride T / 4 within a run, from an offset that differs from run to run: Q-Diffusion (Li et al.,
                ICCV 2023)
    clustered   the steps of all runs are grouped by likeness, as many pairs come from each group: TAP of Q&C (arXiv
                2503.02508) with affinity A (pool, landmarks) = (1 + cos(x, x')) / 4 + exp(-|step - step'|) / 2

Deviations: the papers keep one step of each of N trajectories, here four on average, since a run costs all its steps.
TAP's affinity is taken against the sub-sample as landmarks, so that each sub-sample labels the whole pool; the three
labelings are matched by the Hungarian method and merged by majority (the paper leaves this open).
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment

from dq.trace.calibration import Calibration

PER_RUN = 4  # pairs kept of a run, on average
MEAN, DEVIATION = 0.4, 0.4  # of the normal policy, as fractions of the steps
LABELINGS, PER_CLUSTER, POOL_SHARE = 3, 8, 20  # TAP: sub-samples, samples per cluster, pool / sub-sample
ROUNDS = 30  # of k-means

Pairs = dict[int, set[int]]  # run -> steps


def runs(calibration: Calibration) -> int:
    """Runs over which the pairs are spread, for every policy but "all"."""
    return math.ceil(calibration.samples / min(PER_RUN, calibration.steps))


def choose(calibration: Calibration, pool: np.ndarray | None = None, of: np.ndarray | None = None) -> Pairs:
    """The pairs to record, runs rising; deterministic.

    pool, of   for "clustered" alone: features (n, numbers) of n calls, and their (run, step) as (n, 2) integers
    """
    steps, samples, count = calibration.steps, calibration.samples, runs(calibration)
    draw = np.random.default_rng(calibration.seed)
    if calibration.policy == "all":
        found = [(run, step) for run in range(samples // steps) for step in range(steps)]
    elif calibration.policy == "uniform":
        found = [divmod(i, steps) for i in draw.choice(count * steps, samples, replace=False).tolist()]
    elif calibration.policy == "normal":
        found = _normal(steps, samples, count, draw)
    elif calibration.policy == "stratified":
        found = _stratified(steps, samples, count, draw)
    else:
        found = of[_cluster(pool, of[:, 1], samples, draw)].tolist()
    return {run: {step for other, step in found if other == run} for run in sorted({run for run, _ in found})}


def _normal(steps: int, samples: int, count: int, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Equal steps go to different runs: dealt out in order of steps, over no fewer runs than equal steps."""
    back = np.floor(draw.normal(MEAN * steps, DEVIATION * steps, samples)).clip(0, steps - 1).astype(int)
    count = max(count, *Counter(back.tolist()).values())
    return [(i % count, steps - 1 - step) for i, step in enumerate(sorted(back.tolist()))]


def _stratified(steps: int, samples: int, count: int, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Run r takes step floor((stratum + offset_r) steps / strata); the last run as many strata as are left."""
    strata = min(PER_RUN, steps)
    offsets = (draw.permutation(count) + 0.5) / count
    left = samples - strata * (count - 1)
    last = draw.permutation(strata)[:left].tolist()
    return [
        (run, int((stratum + offsets[run]) * steps / strata))
        for run in range(count)
        for stratum in (last if run == count - 1 else range(strata))
    ]


def _cluster(x: np.ndarray, step: np.ndarray, samples: int, draw: np.random.Generator) -> np.ndarray:
    """Indices (samples,) into the pool x (n, numbers), equally many from each cluster as far as it has them."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    clusters = max(1, min(samples // PER_CLUSTER, len(x) // 2))
    landmarks = min(len(x), max(len(x) // POOL_SHARE, 2 * clusters))
    labelings = [
        _label(x, step, np.sort(draw.choice(len(x), landmarks, replace=False)), clusters, draw)
        for _ in range(LABELINGS)
    ]
    members = [draw.permutation(np.flatnonzero(_merge(labelings, clusters) == k)) for k in range(clusters)]
    rounds = range(max(map(len, members)))
    dealt = [group[i] for i in rounds for group in members if i < len(group)]  # one of each cluster in turn
    return np.sort(dealt[:samples])


def _label(x: np.ndarray, step: np.ndarray, chosen: np.ndarray, clusters: int, draw) -> np.ndarray:
    """Cluster (n,) of every row by spectral co-clustering against the rows `chosen`."""
    likeness = (1 + x @ x[chosen].T) / 2
    affinity = 0.5 * likeness + 0.5 * np.exp(-np.abs(step[:, None] - step[None, chosen]))
    scaled = affinity / np.sqrt(affinity.sum(1, keepdims=True) * affinity.sum(0, keepdims=True))
    left = np.linalg.svd(scaled, full_matrices=False)[0][:, :clusters]
    left = left / np.linalg.norm(left, axis=1, keepdims=True).clip(1e-12)
    return kmeans2(left, clusters, iter=ROUNDS, minit="++", seed=draw, missing="warn")[1]


def _merge(labelings: list[np.ndarray], clusters: int) -> np.ndarray:
    """Majority of labelings once each is renamed to agree best with the first; ties go to the lowest label."""
    votes = np.zeros((len(labelings[0]), clusters), dtype=int)
    for labels in labelings:
        together = np.zeros((clusters, clusters), dtype=int)
        np.add.at(together, (labels, labelings[0]), 1)
        names = linear_sum_assignment(-together)[1]
        votes[np.arange(len(labels)), names[labels]] += 1
    return votes.argmax(1)
