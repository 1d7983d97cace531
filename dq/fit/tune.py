"""What the user states of a tuning: how long, from how much, and what of the layers may move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from dq.errors import DQError, nearest
from dq.plan import Plan, Recipe

PARTS = ("weights", "scales", "branch", "bias", "smooth", "act")
INSTEAD = ("lowrank",)  # ways to move rounding that stand in for "weights"
LOSSES = ("plain", "guided")
PRECISIONS = ("auto", "fp32", "bf16")
MOST_UPDATES, MOST_RUNS = 1_000_000, 10_000


def wished(recipe, tune: Tune | None) -> Tune | None:
    """The tuning asked for, or the one that a recipe brings along, for as long as asked for. DQError for others."""
    own = getattr(recipe, "options", {}).get("tune")
    if tune is not None and not isinstance(tune, Tune):
        raise DQError(f"tune is {tune!r}, expected dq.Tune(minutes=...)")
    if tune is not None and not isinstance(recipe, Recipe | Plan):
        raise DQError(f"tune: recipe {recipe.name!r} keeps the codes there are; expected one that rounds anew")
    return tune if own is None else Tune.of(own, tune)


@dataclass(frozen=True)
class Tune:
    """A tuning after the recipe: quantized layers learn to answer as the full-precision model does.

    minutes    of training, on this machine; what is recorded before and judged meanwhile counts
    updates    so many, however long they take, in place of minutes; what is trained is then the same everywhere
    batch      recorded calls an update
    runs       runs of the pipeline that are recorded to learn from; a sixth of the minutes bounds them, too
    held       share of the runs that is not learned from: by them the best state is chosen
    parts      what moves: "weights" (their rounding), or in its place "lowrank" (their rounding by an update of low
               rank that is merged before it); "scales" (of weights), "branch" (low rank), "bias", "smooth", "act"
               (stored activation scales)
    rank       of the updates of "lowrank"
    aware      rates of weights count in steps of each layer; False: in weights of all layers alike, as a control
    layers     patterns, matched from the start of layer names, of those that are tuned; none: all
    loss       "plain": of the prediction; "guided": as guidance combines it, where one call holds both halves
    rate       all learning rates times this
    precision  of the products: "bf16", "fp32", or "auto": bf16 on GPUs that have it
    checkpoint activations of a block are computed again on the way back: None where memory asks for it
    stop       asked before each update; True ends the tuning, the best state so far is kept
    Raises DQError at once for what cannot work.
    """

    minutes: float = 20.0
    updates: int | None = None
    batch: int = 4
    runs: int = 512
    held: float = 0.125
    parts: tuple[str, ...] = PARTS
    rank: int = 32
    aware: bool = True
    layers: tuple[str, ...] = ()
    loss: str = "plain"
    rate: float = 1.0
    precision: str = "auto"
    checkpoint: bool | None = None
    stop: Callable[[], bool] | None = field(default=None, compare=False)

    def __post_init__(self):
        for name, low, high in (("minutes", 0, inf), ("held", 0, 1), ("rate", 0, inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise DQError(f"tune: {name} is {value!r}, expected a number above 0" + " and below 1" * (high == 1))
        for name, most in (("updates", MOST_UPDATES), ("batch", 4096), ("runs", MOST_RUNS), ("rank", 4096)):
            value = getattr(self, name)
            if value is not None or name != "updates":
                if type(value) is not int or not 1 <= value <= most:
                    raise DQError(f"tune: {name} is {value!r}, expected an integer of 1 to {most}")
        for name, known in (("parts", (*PARTS, *INSTEAD)), ("loss", LOSSES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            for each in value if name == "parts" else (value,):
                if each not in known:
                    raise DQError(f"tune: {name} is {value!r}, {nearest(str(each), known)}")
        if isinstance(self.parts, str) or not self.parts:
            raise DQError(f"tune: parts is {self.parts!r}, expected a tuple of some of {', '.join(PARTS)}")
        if {"weights", "lowrank"} <= set(self.parts):
            raise DQError("tune: parts has weights and lowrank, expected one of them")
        if isinstance(self.layers, str):
            raise DQError(f"tune: layers is {self.layers!r}, expected a tuple of patterns")

    def identity(self) -> dict:
        """What decides the result; a killed tuning goes on only where it is the same."""
        without = {"stop", "minutes"} if self.updates else {"stop"}
        return {key: value for key, value in vars(self).items() if key not in without}

    @classmethod
    def of(cls, fields: Mapping, given: Tune | None = None) -> Tune:
        """The tuning of a recipe; with one that the user gave, for as long, from as much, and stopped by the same."""
        own: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        made = cls(**own)
        if given is None:
            return made
        mine = ("minutes", "updates", "runs", "stop", "checkpoint", "precision")
        return replace(made, **{name: getattr(given, name) for name in mine})
