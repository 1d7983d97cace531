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
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dq.errors import DQError, nearest
from eval import reading
from eval.reading import Form, Plain, Text, Texts, whole

FULL = "full"
NAME = re.compile(r"\w[\w .,+=-]*")  # names are folder names too
LONGEST_NAME = 200  # bytes
MOST_SEED, MOST_STEPS, MOST_SCENES, MOST_PICTURES = 2**32 - 1, 10_000, 20_000, 200_000
DECIDED = ("prompt", "generator", "num_inference_steps", "output_type")  # of a call, by other keys of the suite
SOURCES = ("recipe", "plan", "folder")
SCENES, CLIPS, LINES = ("scenes", "seed", "objects"), ("clips", "seed", "objects"), ("file", "column", "limit")


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
    subject  model: the network that subject consistency looks through
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
    subject: Mapping[str, str] = field(default_factory=dict)
    timing: Mapping[str, int] = field(default_factory=lambda: {"repeats": 5})

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """The suite of a YAML file; DQError in one line for whatever is wrong with it."""
        what = f"suite {str(path)!r}"
        data = reading.from_yaml(reading.text(path, what, reading.MOST_YAML), what)
        given = {"name": Path(path).stem} | data if isinstance(data, Mapping) else data
        return cls.from_dict(given, what)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], what: str = "suite") -> Suite:
        """A suite from what a YAML file or a manifest holds; DQErrors begin with `what`."""
        for key in ("pipelines", "recipes", "prompts"):
            if isinstance(data, Mapping) and not data.get(key):
                raise DQError(f"{what}: {key} is missing; eval/suites/tiny.yaml shows what a suite looks like")
        given = reading.checked(SuiteForm, data, what)
        try:
            return _suite(given)
        except DQError as error:
            raise DQError(f"{what}: {error}") from None

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


class PipelineForm(Form):
    """A pipeline as a suite writes it, as the forms below are of its other parts."""

    path: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    call: Plain | None = None


class CalibrationForm(Form):
    prompts: Texts | None = None
    samples: whole(1, 10**6) = 64
    steps: whole(1, MOST_STEPS) = 20
    seed: whole(0, MOST_SEED) = 0
    policy: Text = "stratified"


class EntryForm(Form):
    name: Text | None = None
    recipe: Text | None = None
    plan: Text | None = None
    folder: Text | None = None
    calibration: CalibrationForm | None = None
    budget: Plain | None = None


class PromptsForm(Form):
    """The grammar of scenes or of clips, or a file."""

    scenes: whole(1, MOST_SCENES) | None = None
    clips: whole(1, MOST_SCENES) | None = None
    seed: whole(0, MOST_SEED) = 0
    objects: whole(1, 3) | None = None
    file: Text | None = None
    column: Text | None = None
    limit: whole(1, MOST_PICTURES) | None = None


class FidForm(Form):
    real: Text = ""
    features: Text = ""


class ModelForm(Form):
    model: Text = ""


class TimingForm(Form):
    repeats: whole(0, 1000) = 5


def _named_by_recipe(given: Any) -> Any:
    """A recipe's name alone stands for itself."""
    return {"recipe": given} if isinstance(given, str) else given


Named = Annotated[EntryForm, BeforeValidator(_named_by_recipe)]


class SuiteForm(Form):
    name: Text = "suite"
    pipelines: Annotated[dict[str, PipelineForm | None], Field(max_length=100)]
    recipes: Annotated[list[Named], Field(max_length=1000)]
    prompts: PromptsForm
    seeds: Annotated[list[whole(0, MOST_SEED)], Field(max_length=10_000)] = [0]  # noqa: RUF012
    steps: whole(1, MOST_STEPS) = 20
    batch: whole(1, 4096) = 16
    metrics: Annotated[list[Text], Field(max_length=100)] | None = None
    fid: FidForm | None = None
    clip: ModelForm | None = None
    subject: ModelForm | None = None
    timing: TimingForm | None = TimingForm()


def _suite(given: SuiteForm) -> Suite:
    """The suite of a form: what its fields mean together."""
    entries = (Entry(FULL), *(entry for entry in map(_entry, given.recipes) if entry.name != FULL))
    _distinct([entry.name for entry in entries], "recipes")
    _distinct(given.seeds, "seeds")
    if not given.seeds:
        raise DQError("seeds is empty, expected one seed or more, for example seeds: [0]")
    count = given.prompts.scenes or given.prompts.clips or 0
    if count * len(given.seeds) > MOST_PICTURES:
        asked = f"{count} scenes with {len(given.seeds)} seeds each"
        raise DQError(f"prompts: got {asked}, expected at most {MOST_PICTURES} pictures")
    return Suite(
        name=given.name,
        pipelines=tuple(_pipeline(name, form or PipelineForm()) for name, form in given.pipelines.items()),
        entries=entries,
        prompts=_prompts(given.prompts),
        seeds=tuple(given.seeds),
        steps=given.steps,
        batch=given.batch,
        metrics=None if given.metrics is None else tuple(given.metrics),
        fid=_given(given.fid),
        clip=_given(given.clip),
        subject=_given(given.subject),
        timing={"repeats": given.timing.repeats if given.timing else 0},  # null times nothing
    )


def _given(form: Form | None) -> dict[str, Any]:
    """What somebody wrote of a form."""
    return form.model_dump(exclude_unset=True) if form else {}


def _pipeline(name: str, given: PipelineForm) -> Pipeline:
    for own in DECIDED:
        if own in (given.call or {}):
            raise DQError(f"pipeline {name!r}: call holds {own!r}, which the suite's prompts, seeds and steps decide")
    path = name if given.path is None else given.path
    return Pipeline(_name(name), path, given.dtype, _usual(path) | (given.call or {}))


def _usual(path: str) -> dict[str, Any]:
    """Call arguments an embedded model is drawn with, none for others."""
    from pipelines import tiny

    return {key: value for key, value in tiny.CALL.get(path, {}).items() if key != "num_inference_steps"}


def _entry(given: EntryForm) -> Entry:
    sources = [key for key in SOURCES if getattr(given, key) is not None]
    if len(sources) != 1:
        got = " and ".join(sources) or "none"
        raise DQError(f"recipe {given.name or ''!r}: got {got}, expected one of recipe, plan and folder")
    (source,) = sources
    value = getattr(given, source)
    if given.model_fields_set == {"recipe"} and value == FULL:
        return Entry(FULL)
    name = _name(given.name or (value if source == "recipe" else Path(value).stem))
    if name == FULL:
        raise DQError(f"the name {FULL!r} belongs to the model as it came; give this recipe another name")
    calibration = _given(given.calibration)
    if source == "folder" and (given.budget or calibration):
        raise DQError(f"recipe {name!r}: a saved folder takes neither budget nor calibration")
    return Entry(name, **{source: value}, calibration=calibration, budget=given.budget)


def _prompts(given: PromptsForm) -> dict[str, Any]:
    """One of the grammars, or a file, with defaults filled in."""
    named = [keys for keys in (SCENES, CLIPS, LINES) if getattr(given, keys[0]) is not None]
    if len(named) != 1:
        got = ", ".join(_given(given))
        raise DQError(f"prompts: got {got}, expected either scenes: COUNT, clips: COUNT or file: PATH")
    (mine,) = named
    for key in given.model_fields_set.difference(mine):
        raise DQError(f"prompts: {key} does not go with {mine[0]}, expected one of {', '.join(mine)}")
    if given.clips is not None and given.objects == 3:
        raise DQError("prompts: objects is 3, expected 1 or 2 with clips")
    return {key: getattr(given, key) for key in mine}


def _name(text: str) -> str:
    if not NAME.fullmatch(text) or len(text.encode()) > LONGEST_NAME:
        expected = f"letters, digits, spaces and .,+=-_, starting with a letter, at most {LONGEST_NAME} bytes"
        raise DQError(f"name {reading.shown(text)}: expected {expected}")
    return text


def _distinct(values: Iterable, what: str) -> None:
    seen: set = set()
    for value in values:
        if value in seen:
            raise DQError(f"{what}: {value!r} is there twice, expected each once")
        seen.add(value)
