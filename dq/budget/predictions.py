"""What the denoiser predicts in recorded calls, by third of the steps, and how far a changed model is from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dq.trace.records import Store
from dq.trace.units import tensors_in

BUCKETS = 3  # early (noisy), middle and late steps
NAMES = ("early", "middle", "late")


class Predictions:
    """The answers of a model to some of the calls in `store`, held in memory.

    keys     of the calls; buckets: the third of the steps each belongs to
    calls_per_step  denoiser calls of one step of a run
    power    (buckets,) sum of squares of the answers; 1 where a third has no call
    """

    def __init__(self, model: nn.Module, store: Store, most: int = 0):
        """most  calls to keep, chosen evenly over the timesteps; 0: all."""
        self.model, self._store = model, store
        keys, times, moments = store.keys("calls/"), [], set()
        for key in keys:
            info = store.read(key, kind="call")["info"]
            times.append(info.get("timestep") or 0.0)
            moments.add((info.get("run"), info.get("step")))
        self.calls_per_step = len(keys) / max(len(moments), 1)
        thirds = _thirds(times)
        order = sorted(range(len(keys)), key=lambda call: (-times[call], keys[call]))
        if 0 < most < len(order):
            order = [order[(2 * i + 1) * len(order) // (2 * most)] for i in range(most)]
        self.keys, self.buckets = [keys[call] for call in order], [thirds[call] for call in order]
        self._truth = [self._predict(call) for call in range(len(self.keys))]
        self.power = np.zeros(BUCKETS)
        for bucket, truth in zip(self.buckets, self._truth, strict=True):
            self.power[bucket] += float(truth.square().sum(dtype=torch.float64))
        self.power[self.power == 0] = 1.0

    def call(self, index: int) -> tuple[tuple, dict]:
        """(args, kwargs) of one call."""
        tree = self._store.read(self.keys[index], next(self.model.parameters()).device, kind="call")
        return tree["args"], tree["kwargs"]

    @staticmethod
    def answer(args: tuple, kwargs: dict, output: Any) -> torch.Tensor:
        """The prediction in what a denoiser returned, without the channels of a learned variance."""
        found = tensors_in(output)[0]
        given = next((x for x in tensors_in((args, kwargs)) if x.is_floating_point() and x.dim() > 1), None)
        doubled = given is not None and found.dim() == given.dim() > 2 and found.shape[1] == 2 * given.shape[1]
        return found[:, : given.shape[1]] if doubled else found

    @torch.no_grad()
    def error(self) -> np.ndarray:
        """(buckets + 1,) squared error of the model as it is now, as a share of the power; the last over all."""
        noise = np.zeros(BUCKETS)
        for index, truth in enumerate(self._truth):
            noise[self.buckets[index]] += float((self._predict(index) - truth).square().sum(dtype=torch.float64))
        return np.append(noise / self.power, noise.sum() / self.power.sum())

    @torch.no_grad()
    def _predict(self, index: int) -> torch.Tensor:
        args, kwargs = self.call(index)
        return self.answer(args, kwargs, self.model(*args, **kwargs)).detach().float()


def _thirds(times: Sequence[float]) -> list[int]:
    """The third of the distinct timesteps that each call belongs to, 0 for the noisiest (largest)."""
    steps = sorted(set(times), reverse=True)
    return [min(BUCKETS - 1, steps.index(time) * BUCKETS // len(steps)) for time in times]
