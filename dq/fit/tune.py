"""What the user states of a tuning: how long, from how much, and what of the layers may move."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from dq.errors import DQError, nearest
from dq.plan import ROLES, Plan, Recipe

PARTS = ("weights", "scales", "branch", "bias", "smooth", "act")
INSTEAD = ("lowrank",)  # ways to move rounding that stand in for "weights"
FADING = ("aux",)  # trained beside "weights", and gone at the end
KNOWN = (*PARTS, *INSTEAD, *FADING)
LOSSES = ("plain", "guided", "ends")
ROLE = "role:"  # before a role, in place of a pattern of names
PRECISIONS = ("auto", "fp32", "bf16")
MOST_UPDATES, MOST_RUNS = 1_000_000, 10_000


def wished(recipe, tune: Tune | None) -> Tune | None:
    """The tuning asked for, or the one that a recipe brings along, for as long as asked for. DQError for others."""
    own = getattr(recipe, "options", {}).get("tune")
    if tune is not None and not isinstance(tune, Tune):
        raise DQError(f"tune is {tune!r}, expected dq.Tune(minutes=...)")
    if tune is not None and not isinstance(recipe, Recipe | Plan):
        raise DQError(f"tune: recipe {recipe.name!r} keeps the codes there are; expected one that rounds anew")
    if tune is not None and isinstance(recipe, Recipe) and recipe.route:
        raise DQError(f"tune: formats of {recipe.name!r} are decided by a rule fitted before; leave tune or it out")
    return tune if own is None else Tune.of(own, tune)


@dataclass(frozen=True)
class Stage:
    """A share of a tuning's updates, and what moves in it: parts by pattern, matched as those of `Tune.layers`."""

    share: float
    moves: Mapping[str, tuple[str, ...]]

    def of(self, name: str, role: str) -> set[str]:
        """The parts of a layer that move."""
        met = (parts for pattern, parts in self.moves.items() if matches(pattern, name, role))
        return {part for parts in met for part in parts}


def matches(pattern: str, name: str, role: str) -> bool:
    """Whether a layer is meant: by its role, or by its name from the start."""
    return role == pattern.removeprefix(ROLE) if pattern.startswith(ROLE) else re.match(pattern, name) is not None


def _check_pattern(pattern: Any) -> None:
    if isinstance(pattern, str) and pattern.startswith(ROLE) and pattern.removeprefix(ROLE) not in ROLES:
        raise DQError(f"tune: layers {pattern!r}: role is unknown, {nearest(pattern.removeprefix(ROLE), ROLES)}")
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise DQError(f"tune: layers {pattern!r} is no pattern of layer names: {error}") from error


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
               (stored activation scales); "aux" beside "weights": a low-rank help that fades and is gone at the end
    rank       of the updates of "lowrank", and of "aux" to begin with
    aware      rates of weights count in steps of each layer; False: in weights of all layers alike, as a control
    full       weights begin at their full-precision place within the code, not at the code: few updates then move
               more. Four bits to nearest gain by it; other starts are not measured
    layers     patterns, matched from the start of layer names, of those that are tuned; none: all. "role:time" stands
               for the layers that see one token a sample, "role:block" and "role:edge" for the others
    stages     what moves one after the other, in place of `parts` and `layers`
    local      weight of the error at the outputs of the layers whose weights move, as a share of their power
    loss       "plain": of the prediction; "guided": as guidance combines it, where one call holds both halves; "ends":
               of the prediction, each step by how far the end of a run follows it
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
    full: bool = False
    layers: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    local: float = 0.0
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
        for name, known in (("parts", KNOWN), ("loss", LOSSES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            for each in value if name == "parts" else (value,):
                if each not in known:
                    raise DQError(f"tune: {name} is {value!r}, {nearest(str(each), known)}")
        if isinstance(self.parts, str) or not self.parts:
            raise DQError(f"tune: parts is {self.parts!r}, expected a tuple of some of {', '.join(PARTS)}")
        if {"weights", "lowrank"} <= set(self.parts):
            raise DQError("tune: parts has weights and lowrank, expected one of them")
        if "aux" in self.parts and "weights" not in self.parts:
            raise DQError("tune: parts has aux without weights, which it helps; expected both")
        if isinstance(self.layers, str):
            raise DQError(f"tune: layers is {self.layers!r}, expected a tuple of patterns")
        if isinstance(self.local, bool) or not isinstance(self.local, int | float) or not 0 <= self.local < inf:
            raise DQError(f"tune: local is {self.local!r}, expected a number of at least 0")
        self._check_stages()

    def _check_stages(self) -> None:
        for each in self.stages:
            if not isinstance(each, Stage) or not 0 < each.share <= 1 or not each.moves:
                raise DQError(f"tune: stages has {each!r}, expected Stage(share of the updates, parts by pattern)")
            for part in (part for parts in each.moves.values() for part in parts):
                if part not in PARTS:
                    raise DQError(f"tune: stages moves {part!r}, {nearest(str(part), PARTS)}")
        whole = sum(each.share for each in self.stages)
        if self.stages and abs(whole - 1) > 1e-6:
            raise DQError(f"tune: stages have {whole:g} of the updates together, expected 1")
        for pattern in (pattern for each in self.course for pattern in each.moves):
            _check_pattern(pattern)

    @property
    def course(self) -> tuple[Stage, ...]:
        """The stages, of which a tuning without has one."""
        return self.stages or (Stage(1.0, dict.fromkeys(self.layers or ("",), self.parts)),)

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
        own["stages"] = tuple(
            Stage(each["share"], {key: tuple(parts) for key, parts in each["moves"].items()})
            for each in own.get("stages", ())
        )
        made = cls(**own)
        if given is None:
            return made
        mine = ("minutes", "updates", "runs", "stop", "checkpoint", "precision")
        return replace(made, **{name: getattr(given, name) for name in mine})
