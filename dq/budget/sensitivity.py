"""How much each choice for each layer harms what the denoiser predicts, or where the whole denoising run ends.

Four ways, from cheap to dear. `prediction`: gradients of single recorded calls. `trajectory` (dq.fit.trajectory):
gradients of the pictures (of videos the final latents) through all steps of the user's pipeline, guidance and
scheduler included; an error that is small in every prediction but points the same way in all of them, as that of a
cross attention does, counts as what it does to the picture. `judged`: MixDQ's way (arXiv 2405.17873), run with one
layer quantized at a time and look. `dq.fit.sampled`: random plans and regression. All give a table of errors by layer.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dq.budget import margins
from dq.budget.choices import Choice, Start
from dq.budget.margins import Listener
from dq.budget.predictions import BUCKETS, Predictions
from dq.fit import lowrank, rounding
from dq.fit.drafts import draft
from dq.fit.smooth import put_branch
from dq.fit.student import frozen
from dq.layers import naming, pack
from dq.plan import LayerPlan
from dq.trace.records import Store
from dq.trace.running import run_seed
from dq.trace.units import replaced

Errors = dict[str, np.ndarray]  # by layer: (choices, buckets + 1); the last column is for all steps together


class Judge(Protocol):
    """Tells how far a changed model is from the one it was made with; `keys` name what it looks at."""

    keys: Sequence[str]

    def error(self) -> np.ndarray:
        """(buckets + 1,) squared errors as shares of the power."""


def prediction(
    model: nn.Module,
    menus: Mapping[str, Sequence[Choice]],
    predictions: Predictions,
    store: Store,
    seed: int = 0,
    progress: bool = True,
    start: Start = None,
) -> Errors:
    """Errors of the predictions of single calls, to first order; weights rounded with `start`'s scales.

    store  keeps what was gathered after every call; a killed measurement goes on there
    """
    listener = Listener(model, menus, start)
    made = Progress.resume({"": listener}, store, "prediction", [*predictions.keys, seed])
    for call in tqdm(range(made.done, len(predictions.keys)), desc="gradients", disable=not progress, delay=2):
        begun, signs, listener.bucket = time.perf_counter(), generator(seed, call), predictions.buckets[call]
        with frozen([model]), listener.listening(), torch.enable_grad():
            args, kwargs = predictions.call(call)  # no input asks for a gradient: `listener` begins at the first layer
            backward(predictions.answer(args, kwargs, model(*args, **kwargs)), signs)
        listener.close(listener.end())
        made.step({"": listener}, time.perf_counter() - begun)
    return table(listener, menus, len(predictions.keys), progress)


@torch.no_grad()
def table(listener: Listener, menus: Mapping[str, Sequence[Choice]], runs: int, progress: bool) -> Errors:
    """The errors of every choice of every layer that was reached, means over the runs."""
    found: Errors = {}
    for name, own in tqdm(listener.margins.items(), desc="sensitivity", disable=not progress, delay=2):
        if float(own.rows.sum()) > 0:
            weight = listener.modules[name].get_parameter("weight").detach()
            found[name] = margins.energies(_rows(weight), menus[name], own, listener.start) / runs
    return found


def _rows(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(len(weight), -1).float()


def generator(seed: int, run: int) -> torch.Generator:
    return torch.Generator().manual_seed(run_seed(seed, run))


def backward(value: torch.Tensor, signs: torch.Generator) -> None:
    """Backpropagate from the sum of a tensor's entries under random signs."""
    drawn = torch.randint(0, 2, value.shape, generator=signs).to(value) * 2 - 1
    (value * drawn).sum().backward()


@dataclass
class Progress:
    """How far a measurement is, kept in a store with what was gathered, so that a killed one goes on there."""

    store: Store
    name: str
    identity: int
    done: int = 0
    seconds: float = 0.0

    @classmethod
    def resume(cls, listeners: Mapping[str, Listener], store: Store, name: str, of: Sequence) -> Progress:
        """`of` tells one measurement from another; what an interrupted one kept goes back into the listeners."""
        layers = {part: {key: list(value) for key, value in own.rounders.items()} for part, own in listeners.items()}
        fresh = cls(store, name, zlib.crc32(json.dumps([list(of), layers]).encode()))
        if not store.has(name) or (kept := store.read(name, kind="gathered"))["identity"] != fresh.identity:
            return fresh
        for part, listener in listeners.items():
            listener.restore(kept["margins"][part])
        return cls(store, name, fresh.identity, kept["done"], kept["seconds"])

    def step(self, listeners: Mapping[str, Listener], seconds: float) -> None:
        """One more is done."""
        self.done, self.seconds = self.done + 1, self.seconds + seconds
        kept = {"identity": self.identity, "done": self.done, "seconds": self.seconds}
        kept["margins"] = {part: listener.state() for part, listener in listeners.items()}
        self.store.write(self.name, kept, share=False)


@torch.no_grad()
def judged(
    model: nn.Module,
    menus: Mapping[str, Sequence[Choice]],
    judge: Judge,
    store: Store,
    dtype: torch.dtype,
    progress: bool = True,
    start: Start = None,
) -> Errors:
    """The errors of every choice by running the model with one layer quantized at a time; each layer is kept."""
    errors = {}
    for name, choices in tqdm(menus.items(), desc="one layer at a time", disable=not progress, delay=2):
        key = f"judged/{zlib.crc32(json.dumps([name, *map(str, choices), list(judge.keys)]).encode()):08x}"
        if not store.has(key):
            found = [_one(model, name, choice, judge, dtype, start).tolist() for choice in choices]
            store.write(key, {"errors": found}, share=False)
        errors[name] = np.array(store.read(key, kind="errors")["errors"])
    return errors


def _one(model: nn.Module, name: str, choice: Choice, judge: Judge, dtype: torch.dtype, start: Start) -> np.ndarray:
    if choice is None or choice.kind == "stack":
        return np.zeros(BUCKETS + 1)
    module = naming.at(model, name)
    with replaced({module: packed(name, module, choice, dtype, start).forward}):
        return judge.error()


@torch.no_grad()
def packed(name: str, module: nn.Module, choice: LayerPlan, dtype: torch.dtype, start: Start = None) -> nn.Module:
    """A layer under a choice, rounded to nearest, with the branch that the choice names."""
    choice = margins.dynamic(choice)
    if not choice.rank and start is None:
        return pack(name, module, choice, dtype)
    made, weight = draft(module, choice), _rows(module.get_parameter("weight").detach())
    if start is not None:
        made.scales = start(weight, choice)
    if not choice.rank:
        return made.pack(dtype)
    down, up = lowrank.factors(weight, choice.rank)
    put_branch(made, down, up, weight - up @ down)
    return made.pack(dtype)


@torch.no_grad()
def relative(weight: torch.Tensor, choices: Sequence[Choice], start: Start = None) -> np.ndarray:
    """(choices, buckets + 1) rounding errors as shares of the weight's own power: all there is without data."""
    weight = _rows(weight)
    power = float(weight.square().sum().clamp(min=1e-30))
    scales = [None if c is None or start is None else start(weight, c) for c in choices]
    pairs = zip(choices, scales, strict=True)
    rounded = [weight if choice is None else rounding.nearest(weight, choice, own)[0] for choice, own in pairs]
    shares = [float((each - weight).square().sum()) for each in rounded]
    return np.repeat(np.array(shares)[:, None] / power, BUCKETS + 1, 1)
