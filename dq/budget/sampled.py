"""The second estimator of sensitivity: run the denoiser under random plans and regress on what each layer got.

    y_k = sum_i f_i E[i, c_ik] + noise,   f >= 0 by ridge regression towards a common factor,   k = 1 ... samples

y is the prediction's error under plan k, E the gradient's error of layer i under choice c_ik, f one factor for each
layer. This is the additive core of Qua2SeDiMo (arXiv 2412.14628), which fits a graph network to FID scores of 500
plans; with 48 plans there is no room for a number for each layer and choice.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from tqdm import tqdm

from dq.budget import sensitivity
from dq.budget.choices import Choice
from dq.budget.sensitivity import Errors, Judge
from dq.layers import naming, parameter_bytes
from dq.trace.records import Store
from dq.trace.units import replaced

STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the pull towards the first guess; the one that predicts left-out plans best
FOLDS = 5


def plans(menus: Mapping[str, Sequence[Choice]], count: int, seed: int) -> list[list[int]]:
    """Random plans, a choice per layer: each leans to the exact or the coarse end of the menus by its own share."""
    dice, found = np.random.default_rng(seed), []
    for _ in range(count):
        lean = dice.beta(0.7, 0.7)
        picks = [dice.binomial(max(len(choices) - 2, 0), lean) for choices in menus.values()]
        found.append([int(pick) + (len(choices) > 1) for pick, choices in zip(picks, menus.values(), strict=True)])
    return found


@torch.no_grad()
def scores(
    model: nn.Module,
    menus: Mapping[str, Sequence[Choice]],
    drawn: Sequence[Sequence[int]],
    judge: Judge,
    store: Store,
    dtype: torch.dtype,
    progress: bool = True,
) -> np.ndarray:
    """(plans, buckets + 1): the error under every plan; each is kept in the store."""
    names, found, layers = list(menus), [], _Layers(model, menus, dtype)
    for chosen in tqdm(drawn, desc="random plans", disable=not progress, delay=2):
        given = [[name, str(menus[name][choice])] for name, choice in zip(names, chosen, strict=True)]
        key = f"sampled/{zlib.crc32(json.dumps([given, list(judge.keys)]).encode()):08x}"
        if not store.has(key):
            forwards = {}
            for name, choice in zip(names, chosen, strict=True):
                plan = menus[name][choice]
                if plan is not None and plan.kind != "stack":
                    forwards[naming.at(model, name)] = layers.get(name, choice).forward
            with replaced(forwards):
                store.write(key, {"error": judge.error().tolist()}, share=False)
        found.append(store.read(key, kind="error")["error"])
    return np.array(found)


class _Layers:
    """Packed layers, made when asked for and kept as long as together they take no more than the model's weights."""

    def __init__(self, model: nn.Module, menus: Mapping[str, Sequence[Choice]], dtype: torch.dtype):
        self.model = model
        self.menus = menus
        self.dtype = dtype
        self.kept: dict[tuple[str, int], nn.Module] = {}
        self.left = parameter_bytes(model)

    def get(self, name: str, choice: int) -> nn.Module:
        if (name, choice) in self.kept:
            return self.kept[name, choice]
        made = sensitivity.packed(name, naming.at(self.model, name), self.menus[name][choice], self.dtype)  # pyright: ignore[reportArgumentType]
        if parameter_bytes(made) <= self.left:
            self.left -= parameter_bytes(made)
            self.kept[name, choice] = made
        return made


def fitted(guess: Errors, drawn: Sequence[Sequence[int]], measured: np.ndarray) -> Errors:
    """The guess with every layer's errors multiplied by a factor found by regression on the measured plans."""
    table = np.array(
        [[guess[name][choice, -1] for name, choice in zip(guess, chosen, strict=True)] for chosen in drawn]
    )
    total = measured[:, -1]
    table, target = table / total[:, None], np.ones(len(total))  # relative errors: plans differ by orders of magnitude
    best = min(STRENGTHS, key=lambda strength: _left_out(table, target, strength))
    factors = _ridge(table, target, best)
    return {name: errors * factor for (name, errors), factor in zip(guess.items(), factors, strict=True)}


def _ridge(table: np.ndarray, target: np.ndarray, strength: float) -> np.ndarray:
    """Factors >= 0 that minimise |table f - target|^2 + strength * |table|^2 / layers * |f - level|^2."""
    level = float((table.sum(1) @ target) / (table.sum(1) @ table.sum(1)))
    pull = np.sqrt(strength * np.square(table).sum() / table.shape[1] / len(table)) * np.eye(table.shape[1])
    both = np.concatenate([table, pull]), np.concatenate([target, pull @ np.full(table.shape[1], level)])
    return nnls(*both)[0]


def _left_out(table: np.ndarray, target: np.ndarray, strength: float) -> float:
    """Squared error on plans that the regression did not see."""
    total = 0.0
    for fold in range(FOLDS):
        out = np.arange(len(target)) % FOLDS == fold
        factors = _ridge(table[~out], target[~out], strength)
        total += float(np.square(table[out] @ factors - target[out]).sum())
    return total
