"""The second estimator of sensitivity: run the denoiser under random plans and regress on what each layer got.

    y_k = sum_i (f_i + h_om) E[i, c_ik] + noise,   f, h >= 0 by ridge regression towards a common factor,   k = 1 ...

y is the prediction's error under plan k, E the gradient's error of layer i under choice c_ik, f one factor for each
layer. Where menus have several ways of rounding to the same bits, h is one for each operation o and way m: an
operation's namesakes in all blocks, what m of their weights costs beside what the gradient says. This is the additive
core of Qua2SeDiMo (arXiv 2412.14628), which fits a graph network to FID scores of 500 plans; with a few dozens there
is no room for a number for each layer and choice.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from tqdm import tqdm

from dq.budget import sensitivity
from dq.budget.choices import Choice, Start
from dq.budget.sensitivity import Errors, Judge
from dq.layers import naming, parameter_bytes
from dq.trace.records import Store
from dq.trace.units import replaced

STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of the pull towards the first guess; the one that predicts left-out plans best
FOLDS = 5


def plans(menus: Mapping[str, Sequence[Choice]], count: int, seed: int) -> list[list[int]]:
    """Random plans, a choice per layer: each leans to the exact or the coarse end of the menus by its own share.

    Ways of rounding to the same bits are equally likely.
    """
    dice, found = np.random.default_rng(seed), []
    levels = [list(_levels(choices)) for choices in menus.values()]
    for _ in range(count):
        lean = dice.beta(0.7, 0.7)
        picks = [int(dice.binomial(max(len(own) - 2, 0), lean)) + (len(own) > 1) for own in levels]
        picked = [own[pick] for own, pick in zip(levels, picks, strict=True)]
        found.append([ways[0] if len(ways) == 1 else int(dice.choice(ways)) for ways in picked])
    return found


def _levels(choices: Sequence[Choice]) -> Iterator[list[int]]:
    """Places of choices that differ in nothing but the way their weights are rounded, from the most exact on."""
    found: dict[tuple, list[int]] = {}
    for place, choice in enumerate(choices):
        key = (place,) if choice is None else (choice.weight.spec.bits_per_weight, choice.act, choice.rank)
        found.setdefault(key, []).append(place)
    yield from found.values()


def way(choice: Choice) -> str:
    """How weights are rounded, whatever the bits: `lut/channel`, `inta/group:64`; "kept" for full precision."""
    if choice is None:
        return "kept"
    return f"{re.sub('[0-9]+', '', choice.weight.format)}/{choice.weight.granularity}"


def operation(name: str) -> str:
    """A layer's name without the numbers of blocks: `transformer_blocks.attn#.to_q`."""
    return re.sub(r"\.[0-9]+(?=\.|$)", "", name)


@torch.no_grad()
def scores(
    model: nn.Module,
    menus: Mapping[str, Sequence[Choice]],
    drawn: Sequence[Sequence[int]],
    judge: Judge,
    store: Store,
    dtype: torch.dtype,
    progress: bool = True,
    start: Start = None,
) -> np.ndarray:
    """(plans, buckets + 1): the error under every plan; each is kept in the store."""
    names, found, layers = list(menus), [], _Layers(model, menus, dtype, start)
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

    def __init__(self, model: nn.Module, menus: Mapping[str, Sequence[Choice]], dtype: torch.dtype, start: Start):
        self.start = start
        self.model = model
        self.menus = menus
        self.dtype = dtype
        self.kept: dict[tuple[str, int], nn.Module] = {}
        self.left = parameter_bytes(model)

    def get(self, name: str, choice: int) -> nn.Module:
        if (name, choice) in self.kept:
            return self.kept[name, choice]
        plan = self.menus[name][choice]
        assert plan is not None  # full precision needs no layer
        made = sensitivity.packed(name, naming.at(self.model, name), plan, self.dtype, self.start)
        if parameter_bytes(made) <= self.left:
            self.left -= parameter_bytes(made)
            self.kept[name, choice] = made
        return made


def fitted(
    guess: Errors, menus: Mapping[str, Sequence[Choice]], drawn: Sequence[Sequence[int]], measured: np.ndarray
) -> Errors:
    """The guess with every error multiplied by factors found by regression on the measured plans."""
    columns = _columns(menus)
    table = np.zeros((len(drawn), 1 + max(place for own in columns.values() for at in own for place in at)))
    for row, chosen in zip(table, drawn, strict=True):
        for name, choice in zip(guess, chosen, strict=True):
            row[list(columns[name][choice])] += guess[name][choice, -1]
    total = measured[:, -1]
    table, target = table / total[:, None], np.ones(len(total))  # relative errors: plans differ by orders of magnitude
    best = min(STRENGTHS, key=lambda strength: _left_out(table, target, strength))
    factors = _ridge(table, target, best)
    shares = {name: np.array([factors[list(at)].sum() for at in columns[name]]) for name in guess}
    return {name: errors * shares[name][:, None] for name, errors in guess.items()}


def _columns(menus: Mapping[str, Sequence[Choice]]) -> dict[str, list[tuple[int, ...]]]:
    """By layer and choice: its factors, the layer's and, where ways compete, that of operation and way."""
    several = any(len(ways) > 1 for choices in menus.values() for ways in _levels(choices))
    places: dict[tuple, int] = {}
    at = lambda *key: places.setdefault(key, len(places))  # noqa: E731
    found = {}
    for name, choices in menus.items():
        ways = [(at("way", operation(name), way(choice)),) if several else () for choice in choices]
        found[name] = [(at("layer", name), *more) for more in ways]
    return found


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
