"""Prompts of a suite: from a file (txt, csv, tsv, jsonl, json) or from the scene grammar of the embedded models.

    txt        a prompt a line                        jsonl   an object a line, or a text a line
    csv, tsv   a header, then a prompt a row          json    a list, or objects by name (MJHQ's meta_data.json), or
               (PartiPrompts.tsv)                             COCO's captions: the first caption of each image

The column is `prompt`, `caption` or `text` (upper and lower case alike) unless the suite names another.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from dq.errors import DQError, nearest
from eval.runs import Item
from eval.suite import Suite
from pipelines import tiny
from pipelines.tiny import scenes

COLUMNS = ("prompt", "caption", "text")
ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".json")
OTHERS, OTHERS_SEED = 32, 7  # prompts of the grammar for calibration, and where they come from


def items(suite: Suite) -> list[Item]:
    """Every picture a suite asks for: each prompt with each seed. DQError when its prompts cannot be read."""
    given = suite.prompts
    if "scenes" in given:
        drawn = tiny.prompts(given["scenes"], given["objects"], given["seed"])
        rows = [(caption, asdict(scene)) for caption, scene in drawn]
    else:
        rows = [(text, None) for text in read(given["file"], given["column"], given["limit"])]
    pairs = [(text, seed, scene) for text, scene in rows for seed in suite.seeds]
    return [Item(index, *pair) for index, pair in enumerate(pairs)]


def scene(row: Mapping[str, Any]) -> scenes.Scene:
    """The scene of an item, from the plain values it is kept as."""
    things = tuple(scenes.Item(**{**item, "fill": tuple(item["fill"])}) for item in row["items"])
    return scenes.Scene(**{**row, "items": things, "slope": tuple(row["slope"])})


def others(suite: Suite) -> list[str] | None:
    """Prompts to calibrate with that the suite does not ask for, not even by the same words; None: dq's own."""
    if "scenes" not in suite.prompts:
        return None
    asked = {item.prompt for item in items(suite)}
    seed = OTHERS_SEED + (suite.prompts["seed"] == OTHERS_SEED)
    drawn = dict.fromkeys(caption for caption, _ in tiny.prompts(20 * OTHERS, seed=seed))
    return [caption for caption in drawn if caption not in asked][:OTHERS]


def read(path: str | Path, column: str | None = None, limit: int | None = None) -> list[str]:
    """The first `limit` prompts of a file, blank ones left out. DQError for a file or column that is not there."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise DQError(f"prompts file {str(path)!r}: unknown ending {path.suffix!r}, expected {', '.join(ENDINGS)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DQError(f"prompts file {str(path)!r} cannot be read: {reason}; expected text in UTF-8") from None
    rows = _rows(text, path)
    texts = [text for text in (_text(row, column, path) for row in rows) if text]
    if not texts:
        raise DQError(f"prompts file {str(path)!r} holds no prompt, expected one or more")
    return list(islice(texts, limit))


def _rows(text: str, path: Path) -> Sequence[Any]:
    """Rows of a file: texts or mappings."""
    ending = path.suffix.lower()
    lines = text.split("\n")  # str.splitlines also cuts at characters that JSON leaves in a text
    if ending == ".txt":
        return lines
    try:
        if ending == ".jsonl":
            return [json.loads(line) for line in lines if line.strip()]
        if ending == ".json":
            return _records(json.loads(text), path)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ","))
    except (ValueError, csv.Error) as error:
        if isinstance(error, DQError):
            raise
        raise DQError(f"prompts file {str(path)!r} is damaged: {error}; expected {ending[1:]}") from None


def _records(data: Any, path: Path) -> list[Any]:
    """A list as it is, COCO's annotations one an image, else objects by name."""
    if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
        first: dict[Any, Any] = {}
        for number, row in enumerate(data["annotations"]):
            first.setdefault(row.get("image_id", number) if isinstance(row, Mapping) else number, row)
        return list(first.values())
    rows = list(data.values()) if isinstance(data, Mapping) else data
    if not isinstance(rows, list):
        raise DQError(f"prompts file {str(path)!r} holds a JSON {type(data).__name__}, expected a list or objects")
    return rows


def _text(row: Any, column: str | None, path: Path) -> str:
    """The prompt of one row."""
    if isinstance(row, str):
        if column is not None:
            raise DQError(f"prompts file {str(path)!r} has plain lines, got column {column!r}; leave column out")
        return row.strip()
    if not isinstance(row, Mapping):
        raise DQError(f"prompts file {str(path)!r}: a row is {row!r}, expected a text or an object")
    name = _column(row, column, path)
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise DQError(f"prompts file {str(path)!r}: column {name!r} holds {value!r}, expected text")
    return (value or "").strip()


def _column(row: Mapping[str, Any], column: str | None, path: Path) -> str:
    names: Iterable[str] = [name for name in row if isinstance(name, str)]
    if column is not None:
        if column not in row:
            raise DQError(f"prompts file {str(path)!r} has no column {column!r}, {nearest(column, names)}")
        return column
    for wanted in COLUMNS:
        for name in names:
            if name.strip().lower() == wanted:
                return name
    known = f"found {', '.join(names)}; name one of them as column"
    raise DQError(f"prompts file {str(path)!r} has no column {' or '.join(COLUMNS)}: {known}")
