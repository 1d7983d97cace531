"""What a file may hold: the fields of every kind that dq reads, their types and bounds, checked by pydantic.

Only types and sizes stand here. What the values mean together is checked where they are used, and against the model
before anything of their size is made. Import this module where a file is read: pydantic costs a tenth of a second.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from dq.errors import DQError, nearest
from dq.plan import ATTENTION, COMPUTE, KINDS, ROLES, STATUS
from dq.surroundings import CORRECTIONS

MOST_LAYERS, MOST_STEPS, MOST_RANK, MOST_PHASES = 100_000, 1000, 2**20, 16

Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-1e30, lt=1e30)]
Text = Annotated[str, Field(strict=True, max_length=100_000)]
Name = Annotated[str, Field(strict=True, max_length=1000)]
Tensor = Annotated[str, Field(strict=True, max_length=100)]  # "int4/group:64"; `TensorPlan.parse` reads it
Wished, Status = Literal[ATTENTION], Literal[STATUS]  # pyright: ignore[reportInvalidTypeForm]
Crc32 = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{8}\z")]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Channels = Annotated[list[Number], Field(max_length=4096)]
Cache = Annotated[str, Field(strict=True, pattern=r"^(\w{1,60}(:[0-9.]{1,20})?)?\z")]
QUOTED = re.compile("'([^']*)'")
closed = with_config(ConfigDict(extra="forbid"))


@closed
class Layer(TypedDict):
    """A layer of a plan."""

    kind: Literal[KINDS]  # pyright: ignore[reportInvalidTypeForm]
    shape: Annotated[list[Size], Field(min_length=2, max_length=5)]
    weight: Tensor
    act: NotRequired[Tensor | None]
    smooth: NotRequired[Flag]
    rotate: NotRequired[Annotated[int, Field(strict=True, ge=0, le=2**15)]]
    permute: NotRequired[Flag]
    rank: NotRequired[Annotated[int, Field(strict=True, ge=0, le=MOST_RANK)]]
    splits: NotRequired[Annotated[list[Size], Field(max_length=256)]]
    steps: NotRequired[Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)]]
    start: NotRequired[Flag]
    late: NotRequired[Annotated[list[Tensor], Field(max_length=MOST_PHASES)]]
    route: NotRequired[Annotated[list[Number], Field(min_length=2, max_length=2)]]
    role: NotRequired[Literal[ROLES]]  # pyright: ignore[reportInvalidTypeForm]
    reason: NotRequired[Text]


@closed
class Attention(TypedDict, total=False):
    """What the attention of a module is rounded to; `dq.attentionplan` says what each means."""

    q: Tensor
    k: Tensor
    p: Tensor
    v: Tensor
    smooth: Annotated[str, Field(strict=True, max_length=2)]
    start: Flag
    reason: Text


@closed
class Correction(TypedDict):
    """A correction of a scheduler's steps; `dq.surroundings` has its kinds and what their values are."""

    kind: Literal[tuple(CORRECTIONS)]  # pyright: ignore[reportInvalidTypeForm]
    scheduler: Name
    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)]
    values: dict[Name, Annotated[list[Number | Channels], Field(max_length=MOST_STEPS)]]


@closed
class Plan(TypedDict):
    """A plan, without its version."""

    layers: Annotated[dict[Name, Layer], Field(max_length=MOST_LAYERS)]
    kept: NotRequired[Annotated[dict[Name, Text], Field(max_length=MOST_LAYERS)]]
    recipe: NotRequired[Name]
    family: NotRequired[Name]
    timestep: NotRequired[Name | None]
    edges: NotRequired[Annotated[list[Number], Field(max_length=MOST_STEPS)]]
    compute_dtype: NotRequired[Literal[COMPUTE] | None]  # pyright: ignore[reportInvalidTypeForm]
    attention: NotRequired[Annotated[dict[Name, Attention], Field(max_length=MOST_LAYERS)]]
    cache: NotRequired[Cache]
    sampler: NotRequired[Annotated[list[Correction], Field(max_length=100)]]
    switch: NotRequired[Annotated[list[Number], Field(max_length=MOST_PHASES)]]
    rising: NotRequired[Flag]
    route: NotRequired[Number]


Part = Annotated[str, Field(strict=True, max_length=20)]


@closed
class Stage(TypedDict):
    """A share of a tuning's updates and the parts that move in it, by pattern of layer names."""

    share: Annotated[Number, Field(gt=0, le=1)]
    moves: Annotated[dict[Annotated[str, Field(strict=True, max_length=1000)], list[Part]], Field(max_length=100)]


@closed
class Tuning(TypedDict, total=False):
    """The tuning that a recipe brings along; `dq.fit.tune.Tune` says what each means, and what it may be."""

    minutes: Number
    parts: list[Part]
    layers: list[Annotated[str, Field(strict=True, max_length=1000)]]
    rank: Annotated[int, Field(strict=True, ge=1, le=4096)]
    aware: Flag
    full: Flag
    stages: Annotated[list[Stage], Field(max_length=100)]
    local: Annotated[Number, Field(ge=0)]
    loss: Annotated[str, Field(strict=True, max_length=20)]
    rate: Number
    batch: Annotated[int, Field(strict=True, ge=1, le=4096)]


@closed
class Options(TypedDict, total=False):
    """Arguments of all methods; each says in its file which are its own."""

    tune: Tuning
    rank: Annotated[int, Field(strict=True, ge=0, le=2**15)] | None
    share: Annotated[Number, Field(ge=0, le=1)]
    bits: Annotated[Number, Field(ge=1, le=32)]
    choices: Annotated[list[Tensor], Field(min_length=1, max_length=32)]
    acts: Annotated[list[Tensor], Field(min_length=1, max_length=8)]
    act_bits: Annotated[Number, Field(ge=1, le=16)]
    thirds: Flag
    steps: Annotated[int, Field(strict=True, ge=0, le=10**6)]
    sweeps: Annotated[int, Field(strict=True, ge=0, le=100)]
    multiple: Annotated[int, Field(strict=True, ge=1, le=1024)]
    batch: Annotated[int, Field(strict=True, ge=1, le=4096)]
    strength: Number
    lr: Number
    power: Number
    margins: Annotated[list[Number], Field(min_length=1, max_length=32)]
    start: Literal["gptq", "nearest"]
    round: Literal["gptq", "nearest"]
    ranges: Literal["minmax", "search", "network"]
    splits: Flag
    groups: Annotated[int, Field(strict=True, ge=1, le=256)]
    permute: Flag
    static: Flag
    temporal: Flag
    plain: Flag
    smooth: Flag
    shift: Flag
    rotate: Flag
    clip: Flag
    noise: Flag
    follow: Flag


@closed
class Recipe(TypedDict):
    """A recipe: pairs are (weight, activation or null)."""

    name: Name
    linear: Annotated[list[Tensor | None], Field(min_length=2, max_length=2)]
    conv: Annotated[list[Tensor | None], Field(min_length=2, max_length=2)]
    modulation: NotRequired[Tensor]
    edge: NotRequired[Tensor]
    keep: NotRequired[Annotated[list[Name], Field(max_length=1000)]]
    attention: NotRequired[Wished]  # pyright: ignore[reportInvalidTypeForm]
    cache: NotRequired[Cache]
    sampler: NotRequired[Annotated[str, Field(strict=True, pattern=r"^\w{0,60}\z")]]
    late: NotRequired[Annotated[list[Tensor], Field(max_length=MOST_PHASES)]]
    switch: NotRequired[Annotated[list[Number], Field(max_length=MOST_PHASES)]]
    route: NotRequired[Annotated[Number, Field(ge=0, le=16)]]
    method: NotRequired[Annotated[str, Field(strict=True, pattern=r"^\w{0,60}\z")]]
    options: NotRequired[Options]
    status: NotRequired[Status]  # pyright: ignore[reportInvalidTypeForm]


@closed
class HeaderRow(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: Annotated[str, Field(strict=True, pattern=r"^[A-Z0-9_]{1,20}\z")]
    shape: Annotated[list[Count], Field(max_length=64)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


@closed
class RecordRow(TypedDict):
    """A tensor of an entry of a records folder; file: sha1 of the bytes where it lies beside the entry."""

    dtype: Annotated[str, Field(strict=True, pattern=r"^\w{1,30}\z")]
    shape: Annotated[list[Count], Field(max_length=64)]
    crc32: Crc32
    cpu: Flag
    file: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{40}\z")] | None


@closed
class RecordHead(TypedDict):
    """What stands of an entry of a records folder in its metadata."""

    tree: str
    tensors: list[RecordRow]


@closed
class CallInfo(TypedDict):
    """Where a recorded call stood."""

    run: NotRequired[int]
    step: NotRequired[int]
    timestep: NotRequired[Number | None]
    branches: NotRequired[list[Count]]


@closed
class Call(TypedDict):
    """A recorded call of a denoiser."""

    info: CallInfo
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@closed
class Walk(TypedDict):
    """Where a walk through the units stands."""

    identity: int
    finished: Count
    observed: Count
    differs: list[Flag]


@closed
class Note(TypedDict):
    """What is known of a fitted unit; `LayerPlan.from_dict` reads the layers."""

    layers: dict[Name, Any]
    error_db: dict[Name, float]
    tried: Count


@closed
class Fitted(TypedDict):
    """What was kept of a unit, and what whoever kept it notes, for example a `Note`."""

    tensors: dict[Name, Any]
    note: dict[Name, Any]


@closed
class Piece(TypedDict):
    """What one process saw of its share of the calls."""

    sums: dict[Name, Any]
    torn: list[Name]
    shapes: dict[int, Any]


@closed
class Pool(TypedDict):
    """Sketches of the latents of a run."""

    steps: list[int]
    sketches: list[list[Number]]


@closed
class Gathered(TypedDict):
    """An interrupted measurement."""

    identity: int
    margins: dict[str, Any]
    done: Count
    seconds: Number


TYPES: Mapping[str, Any] = {
    "layer": Layer,
    "plan": Plan,
    "recipe": Recipe,
    "header": dict[str, HeaderRow],
    "texts": dict[str, Annotated[str, Field(strict=True)]],
    "checksums": dict[str, Crc32],
    "record": RecordHead,
    "counts": dict[str, Count],
    "call": Call,
    "walk": Walk,
    "shapes": dict[int, Any],
    "fitted": Fitted,
    "note": Note,
    "piece": Piece,
    "pool": Pool,
    "gathered": Gathered,
    "error": dict[Literal["error"], list[Number]],
    "errors": dict[Literal["errors"], list[list[Number]]],
    "times": dict[str, dict[str, Number]],
    "verdicts": dict[str, dict[str, str]],
}


NAMED = {"layers": ("layer", Layer), "attention": ("attention of", Attention)}  # what a plan has by name
INSIDE = {"recipe": Options, "header": HeaderRow, "record": RecordRow, "call": CallInfo}  # what stands in a field


@cache
def _adapter(kind: str) -> TypeAdapter:
    return TypeAdapter(TYPES[kind])


def check(kind: str, data: Any, what: str) -> None:
    """DQError in one line, field, got and expected, unless `data` is of a kind of `TYPES`. The data stay as they are.

    what  names the thing and, where there is one, its file: "plan 'a.json'"
    """
    try:
        _adapter(kind).validate_python(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        first = next(
            (each for each in found if each["type"] == "extra_forbidden"), found[0]
        )  # often explains the rest
        raise DQError(_line(first, kind, what)) from None


def _line(found: Mapping[str, Any], kind: str, what: str) -> str:
    """One line about the first thing that is wrong."""
    place, home = [str(step) for step in found["loc"] if step != "[key]"], TYPES[kind]
    if kind == "plan" and len(place) > 1 and place[0] in NAMED:
        named, home = NAMED[place[0]]
        what, place = f"{what}: {named} {shown(place[1])}", place[2:]
    elif len(place) > 1:
        home = INSIDE.get(kind)
    field = ".".join(step if step.isidentifier() or step.isdigit() else shown(step) for step in place)
    if found["type"] == "missing":
        return f"{what}: field {field!r} is missing, write it or make the file anew"
    if found["type"] == "extra_forbidden":
        return f"{what}: unknown field {shown(place[-1])}, {nearest(place[-1][:100], _names(home))}"
    expected = re.sub(r"^.*?should (be |have )?", "", found["msg"])
    got = f"{field} is" if field else "got"
    if found["type"] == "literal_error" and isinstance(found["input"], str):
        return f"{what}: {got} {shown(found['input'])}, {nearest(found['input'][:100], QUOTED.findall(found['msg']))}"
    return f"{what}: {got} {shown(found['input'])}, expected {expected}"


def _names(home: Any) -> list[str]:
    return list(getattr(home, "__annotations__", ()))


def shown(value: Any) -> str:
    """A value from a file as an error shows it: short, whatever it is."""
    try:
        return reprlib.repr(value)[:100].encode("ascii", "backslashreplace").decode()
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} of many digits"
