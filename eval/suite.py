"""A suite: which pipelines, entries (a recipe, plan or saved folder), prompts, seeds and metrics make one run.

    suite = Suite.read("eval/suites/tiny.yaml")  # every default filled in; paths are as the command line sees them
    Suite.from_dict(suite.to_dict()) == suite

The entry `full`, the model as it came, is always there and first: everything else is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dq.errors import DQError, nearest

FULL = "full"
DTYPES = ("float32", "bfloat16", "float16")
NAME = re.compile(r"\w[\w .,+=-]*")  # names are folder names too
KEYS = ("name", "pipelines", "recipes", "prompts", "seeds", "steps", "batch", "metrics", "fid", "clip", "timing")
SCENES, LINES = ("scenes", "seed", "objects"), ("file", "column", "limit")
CALIBRATION = ("prompts", "samples", "steps", "seed", "policy")


@dataclass(frozen=True)
class Pipeline:
    """What to draw with. path: a folder, an embedded name or a Hub id; call: arguments of every call."""

    name: str
    path: str
    dtype: str = "float32"
    call: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One way to quantize: exactly one of recipe, plan (a JSON file) and folder (a saved pipeline); none for `full`.

    calibration  changes to what a calibrated recipe records
    budget       arguments of dq.Budget, None without one
    """

    name: str
    recipe: str | None = None
    plan: str | None = None
    folder: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Suite:
    """All of a suite, checked.

    entries  `full` first
    metrics  None for every one that can be computed
    fid      real: a folder of pictures, a statistics file or `scenes`; features: the network FID and KID look through
    clip     model: the CLIP model
    timing   repeats: measured calls, 0 for none
    """

    name: str
    pipelines: tuple[Pipeline, ...]
    entries: tuple[Entry, ...]
    prompts: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    steps: int = 20
    batch: int = 16
    metrics: tuple[str, ...] | None = None
    fid: Mapping[str, str] = field(default_factory=dict)
    clip: Mapping[str, str] = field(default_factory=dict)
    timing: Mapping[str, int] = field(default_factory=lambda: {"repeats": 5})

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """The suite of a YAML file; DQError in one line for whatever is wrong with it."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DQError(f"suite {str(path)!r} cannot be read: {reason}; expected a YAML file") from None
        except yaml.YAMLError as error:
            raise DQError(f"suite {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict({"name": Path(path).stem} | _mapping(data, "the suite"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Suite:
        """A suite from what a YAML file or a manifest holds."""
        _known(data, KEYS, "suite")
        for key in ("pipelines", "recipes", "prompts"):
            if not data.get(key):
                raise DQError(f"suite: {key} is missing; eval/suites/tiny.yaml shows what a suite looks like")
        pipelines = tuple(_pipeline(name, given) for name, given in _mapping(data["pipelines"], "pipelines").items())
        recipes = [_entry(given) for given in _list(data["recipes"], "recipes")]
        entries = (Entry(FULL), *(entry for entry in recipes if entry.name != FULL))
        _distinct([entry.name for entry in entries], "recipes")
        seeds = tuple(_whole(seed, "seeds", 0) for seed in _list(data.get("seeds", [0]), "seeds"))
        _distinct(seeds, "seeds")
        if not seeds:
            raise DQError("suite: seeds is empty, expected one seed or more, for example seeds: [0]")
        metrics = data.get("metrics")
        return cls(
            name=str(data.get("name", "suite")),
            pipelines=pipelines,
            entries=entries,
            prompts=_prompts(_mapping(data["prompts"], "prompts")),
            seeds=seeds,
            steps=_whole(data.get("steps", 20), "steps", 1),
            batch=_whole(data.get("batch", 16), "batch", 1),
            metrics=None if metrics is None else tuple(map(str, _list(metrics, "metrics"))),
            fid=_known(data.get("fid") or {}, ("real", "features"), "fid"),
            clip=_known(data.get("clip") or {}, ("model",), "clip"),
            timing={"repeats": _whole(_timing(data).get("repeats", 5), "timing: repeats", 0)},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with every default filled in; two suites that make the same run have equal ones."""
        data = asdict(self)
        data["pipelines"] = {row.pop("name"): row for row in data["pipelines"]}
        data["recipes"] = [entry for entry in data.pop("entries") if entry["name"] != FULL] or [FULL]
        return data | {name: list(data[name]) for name in ("seeds", "metrics") if data[name] is not None}

    def pipeline(self, name: str) -> Pipeline:
        return _named(self.pipelines, name, "pipeline")

    def entry(self, name: str) -> Entry:
        return _named(self.entries, name, "entry")


def _named(rows: Iterable, name: str, what: str):
    found = {row.name: row for row in rows}
    if name not in found:
        raise DQError(f"{what} {name!r} is not in the suite, {nearest(name, found)}")
    return found[name]


def _pipeline(name: str, given: Any) -> Pipeline:
    what = f"pipeline {name!r}"
    given = _known(given or {}, ("path", "dtype", "call"), what)
    path, dtype = str(given.get("path", name)), given.get("dtype", "float32")
    if dtype not in DTYPES:
        raise DQError(f"suite: {what}: dtype is {dtype!r}, {nearest(str(dtype), DTYPES)}")
    call = _mapping(given.get("call") or {}, f"{what}: call")
    for own in ("prompt", "generator", "num_inference_steps", "output_type"):
        if own in call:
            raise DQError(f"suite: {what}: call holds {own!r}, which the suite's prompts, seeds and steps decide")
    return Pipeline(_name(name), path, dtype, _usual(path) | call)


def _usual(path: str) -> dict[str, Any]:
    """Call arguments an embedded model is drawn with, none for others."""
    from pipelines import tiny

    return {key: value for key, value in tiny.CALL.get(path, {}).items() if key != "num_inference_steps"}


def _entry(given: Any) -> Entry:
    if isinstance(given, str):
        return Entry(FULL) if given == FULL else Entry(_name(given), recipe=given)
    known = ("name", "recipe", "plan", "folder", "calibration", "budget")
    given = {key: value for key, value in _known(given, known, "a recipe").items() if value is not None}
    sources = [key for key in ("recipe", "plan", "folder") if key in given]
    if len(sources) != 1:
        got = " and ".join(sources) or "none"
        raise DQError(f"suite: recipe {given.get('name', '')!r}: got {got}, expected one of recipe, plan and folder")
    (source,) = sources
    name = _name(given.get("name", given[source] if source == "recipe" else Path(str(given[source])).stem))
    if name == FULL:
        raise DQError(f"suite: the name {FULL!r} belongs to the model as it came; give this recipe another name")
    if source == "folder" and (given.get("budget") or given.get("calibration")):
        raise DQError(f"suite: recipe {name!r}: a saved folder takes neither budget nor calibration")
    budget = _mapping(given["budget"], f"recipe {name!r}: budget") if "budget" in given else None
    calibration = _known(given.get("calibration", {}), CALIBRATION, f"recipe {name!r}: calibration")
    return Entry(name, **{source: str(given[source])}, calibration=calibration, budget=budget)


def _prompts(given: dict[str, Any]) -> dict[str, Any]:
    """The scene grammar, or a file, with defaults filled in."""
    if ("scenes" in given) == ("file" in given):
        raise DQError(f"suite: prompts: got {', '.join(given)}, expected either scenes: COUNT or file: PATH")
    if "scenes" in given:
        _known(given, SCENES, "prompts")
        objects = given.get("objects")
        if objects not in (None, 1, 2, 3):
            raise DQError(f"suite: prompts: objects is {objects!r}, expected 1, 2 or 3")
        seed = _whole(given.get("seed", 0), "prompts: seed", 0)
        return {"scenes": _whole(given["scenes"], "prompts: scenes", 1), "seed": seed, "objects": objects}
    _known(given, LINES, "prompts")
    column, limit = given.get("column"), given.get("limit")
    limit = None if limit is None else _whole(limit, "prompts: limit", 1)
    return {"file": str(given["file"]), "column": None if column is None else str(column), "limit": limit}


def _timing(data: Mapping[str, Any]) -> dict[str, Any]:
    """`timing: null` times nothing."""
    given = data.get("timing", {"repeats": 5})
    return {"repeats": 0} if given is None else _known(given, ("repeats",), "timing")


def _name(text: Any) -> str:
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise DQError(f"suite: name {text!r}: expected letters, digits, spaces and .,+=-_, starting with a letter")
    return text


def _known(given: Any, keys: Iterable[str], what: str) -> dict[str, Any]:
    given = _mapping(given, what)
    for key in given:
        if key not in keys:
            raise DQError(f"suite: {what}: unknown key {str(key)!r}, {nearest(str(key), keys)}")
    return given


def _mapping(given: Any, what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise DQError(f"suite: {what} is a {type(given).__name__}, expected keys and values")
    return dict(given)


def _list(given: Any, what: str) -> list:
    if not isinstance(given, (list, tuple)):
        raise DQError(f"suite: {what} is a {type(given).__name__}, expected a list")
    return list(given)


def _whole(value: Any, what: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise DQError(f"suite: {what} is {value!r}, expected an integer of {least} or more")
    return value


def _distinct(values: Iterable, what: str) -> None:
    values = list(values)
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise DQError(f"suite: {what}: {twice!r} is there twice, expected each once")
