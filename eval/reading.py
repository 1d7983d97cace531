"""Files that others wrote or that were damaged, read by evaluation runs: bounded text, JSON and YAML, and typed forms.

Whatever is wrong is one DQError: file, field, what was got, what was expected. A `Form` is a pydantic model without
conversions: a number in quotes is no number. Bounds are checked before anything is built, since a few bytes of YAML or
of CSV can stand for gigabytes.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from PIL import Image, UnidentifiedImageError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from dq.errors import DQError, nearest

MOST_DEPTH, MOST_VALUES = 32, 20_000  # of a YAML file, aliases counted as what they stand for
MOST_YAML, MOST_JSON = 2**18, 2**26  # bytes
MOST_TEXT, MOST_INTEGER = 4096, 2**63 - 1
SPOKEN = {  # what pydantic expected, in words of files
    "string_type": "text",
    "int_type": "an integer",
    "dict_type": "keys and values",
    "model_type": "keys and values",
}
SHOWN = 60  # characters of a value in an error

Text = Annotated[str, StringConstraints(max_length=MOST_TEXT, pattern=r"^[^\x00]*$")]
T = TypeVar("T")


class Form(BaseModel):
    """A mapping with these keys and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, data: Any) -> Any:
        known = list(cls.model_fields)
        for key in data if isinstance(data, Mapping) and cls.model_config.get("extra") == "forbid" else ():
            if key not in known:
                raise ValueError(f"unknown key {shown(key)}, {nearest(str(key)[:SHOWN], known)}")
        return data


class Open(Form):
    """A mapping with these keys and any others beside."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


def text(path: str | Path, what: str, most: int, hint: str = "", encoding: str = "utf-8") -> str:
    """The text of a file of at most `most` bytes; errors begin with `what`, `suite 'x.yaml'`, and end with `hint`."""
    path, room = Path(path), hint or f"expected a text file in UTF-8 of at most {most >> 10} KiB"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
            raise DQError(f"{what} cannot be read: it is a folder or a device; {room}")
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise DQError(f"{what} has more than {most >> 10} KiB; {room}")
        found = data.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DQError(f"{what} cannot be read: {reason}; {room}") from None
    except ValueError as error:  # a NUL in the name
        raise DQError(f"{what} cannot be read: {error}; {room}") from None
    if "\0" in found:
        raise DQError(f"{what} holds a NUL byte; {room}")
    return found


def picture(path: Path, hint: str) -> Image.Image:
    """A picture, decoded; errors end with `hint`."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except Exception as error:  # decoders raise what they please on damaged bytes
        reason = "it is no picture" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise DQError(f"picture {str(path)!r} cannot be read: {reason or type(error).__name__}; {hint}") from None


def from_json(given: str, what: str, hint: str = "expected JSON") -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(given)
    except RecursionError:
        raise DQError(f"{what} is damaged: nested too deep; {hint}") from None
    except ValueError as error:
        raise DQError(f"{what} is damaged: {str(error)[:200]}; {hint}") from None


def from_yaml(given: str, what: str) -> Any:
    """The value of a YAML text with at most MOST_VALUES values, MOST_DEPTH deep; aliases are followed."""
    try:
        return yaml.load(given, Loader=_Bounded)
    except _OutOfBounds as error:
        raise DQError(f"{what} {error}") from None
    except Exception as error:  # of a wrong integer, date or tag PyYAML lets the error of whatever reads it through
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DQError(f"{what} is not YAML: {reason}") from None


class _OutOfBounds(Exception):
    """More than a YAML file may hold."""


class _Bounded(yaml.SafeLoader):
    """Counts values while they are only nodes, so that nothing is built of aliases that stand for billions."""

    depth = values = 0

    def __init__(self, stream):
        super().__init__(stream)
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent, index):
        alias, before = self.check_event(yaml.AliasEvent), self.values
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > MOST_DEPTH:
            raise _OutOfBounds(f"is nested too deep, expected at most {MOST_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise _OutOfBounds("has an anchor that holds itself; write the values out")
        self.values += self.sizes[id(node)] if alias else 0
        if self.values > MOST_VALUES:
            raise _OutOfBounds(f"holds more than {MOST_VALUES} values (aliases count as what they stand for)")
        self.sizes.setdefault(id(node), self.values - before)
        return node

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise _OutOfBounds(f"has the key {shown(twice)} twice in one place (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def checked(form: type[T], data: Any, what: str, hint: str = "") -> T:
    """`data` as a form, or as any type pydantic knows. The first thing that is wrong with it is a DQError."""
    try:
        return _adapter(form).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise DQError(f"{what}: {_said(first)}{hint and '; '}{hint}")


_adapter = cache(TypeAdapter)


def _said(error: Mapping[str, Any]) -> str:
    """One error of pydantic: where, what was got, what was expected."""
    place = ": ".join(shown(part, quotes=False) for part in error["loc"])
    if error["type"] == "value_error":  # raised by our own checks: a sentence
        return f"{place}{place and ': '}{error['ctx']['error']}"
    if error["type"] == "missing":
        return f"{place} is missing"
    expected = SPOKEN.get(error["type"]) or error["msg"].replace("Input should be ", "").replace("valid ", "")
    for bound, words in (("ge", "{} or more"), ("le", "at most {}")):
        expected = words.format(error["ctx"][bound]) if bound in error.get("ctx", ()) else expected
    return f"{place or 'it'} is {shown(error['input'])}, expected {expected}"


def shown(value: Any, quotes: bool = True) -> str:
    """A value as an error shows it, on one line and short whatever it is."""
    if isinstance(value, Mapping | list | tuple | set):
        return f"a {type(value).__name__} of {len(value)}" if value else repr(value)
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    found = value if isinstance(value, str) else repr(value)
    found = found[:SHOWN] + "..." if len(found) > SHOWN else found
    return repr(found) if isinstance(value, str) and quotes else " ".join(found.split())


def plain(value: Any) -> Any:
    """Plain JSON types, finite numbers of at most 64 bits and texts that can be written; ValueError for others."""
    for part in _parts(value, 0):
        if isinstance(part, str):
            if "\0" in part or len(part) > MOST_TEXT or surrogates(part):
                raise ValueError(f"holds {shown(part)}, expected text of at most {MOST_TEXT} characters")
        elif isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"holds {part}, expected finite numbers")
        elif isinstance(part, int) and abs(part) > MOST_INTEGER:
            raise ValueError(f"holds {shown(part)}, expected at most 64 bits")
        elif not isinstance(part, str | int | float | None):
            raise ValueError(f"holds a {type(part).__name__}, expected texts, numbers, true, false, null, lists, keys")
    return value


def _parts(value: Any, depth: int) -> Iterator[Any]:
    """Every key and every value that is no container."""
    if depth > MOST_DEPTH:
        raise ValueError(f"is nested too deep, expected at most {MOST_DEPTH} levels")
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"has the key {shown(key)}, expected text; put it in quotes")
            yield key
            yield from _parts(part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part, depth + 1)
    else:
        yield value


def surrogates(part: str) -> bool:
    """Whether a text holds half characters, which no file can be written with."""
    return not part.isascii() and any("\ud800" <= sign <= "\udfff" for sign in part)


def _texts(value: Any) -> Any:
    """A text or a list of texts; ValueError for anything else."""
    if not (isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(x, str) for x in value))):
        raise ValueError(f"is {shown(value)}, expected a list of texts, or the path of a file")
    return plain(value)


Plain = Annotated[dict[str, Any], AfterValidator(plain)]
Texts = Annotated[Any, AfterValidator(_texts)]


def whole(least: int, most: int = MOST_INTEGER):
    """The type of an integer within bounds."""
    return Annotated[int, Field(ge=least, le=most)]
