"""Prompts of a suite: from a file (txt, csv, tsv, jsonl, json) or from the grammar of scenes, or of clips, that the
embedded models know.

    txt        a prompt a line                        jsonl   an object a line, or a text a line
    csv, tsv   a header, then a prompt a row          json    a list, or objects by name (MJHQ's meta_data.json), or
               (PartiPrompts.tsv)                             COCO's captions: the first caption of each image

The column is `prompt`, `caption` or `text` (upper and lower case alike) unless the suite names another. What a file
may hold is bounded, and of csv only one column is kept: short rows below a long header would fill the memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from dq.errors import DQError, nearest
from eval import reading
from eval.reading import shown
from eval.runs import Item
from eval.suite import MOST_PICTURES, Suite
from pipelines import tiny
from pipelines.tiny import motion, scenes

COLUMNS = ("prompt", "caption", "text")
ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".json")
MOST_BYTES, MOST_VALUES, MOST_LINES, LONGEST = 2**27, 5_000_000, 2_000_000, 10_000
OTHERS, OTHERS_SEED = 32, 7  # prompts of the grammar for calibration, and where they come from


def items(suite: Suite) -> list[Item]:
    """Every picture a suite asks for: each prompt with each seed. DQError when its prompts cannot be read."""
    given, draw = suite.prompts, _grammar(suite)
    if draw:
        drawn = draw(given.get("scenes") or given["clips"], given["objects"], given["seed"])
        rows = [(caption, asdict(label)) for caption, label in drawn]
    else:
        rows = [(text, None) for text in read(given["file"], given["column"], given["limit"])]
    if len(rows) * len(suite.seeds) > MOST_PICTURES:
        got = f"{len(rows)} prompts with {len(suite.seeds)} seeds each"
        raise DQError(f"suite: got {got}, expected at most {MOST_PICTURES} pictures; set prompts: limit")
    pairs = [(text, seed, scene) for text, scene in rows for seed in suite.seeds]
    return [Item(index, *pair) for index, pair in enumerate(pairs)]


def _grammar(suite: Suite) -> Callable | None:
    """What draws the prompts of a suite with their labels, None for a file."""
    return tiny.prompts if "scenes" in suite.prompts else tiny.motions if "clips" in suite.prompts else None


def moves(row: Mapping[str, Any]) -> bool:
    """Whether the label of an item is that of a clip."""
    return "motions" in row


def scene(row: Mapping[str, Any]) -> scenes.Scene:
    """The scene of an item, of a clip its first frame's, from the plain values it is kept as. DQError for others."""
    return clip(row).scene if moves(row) else reading.checked(scenes.Scene, row, "the scene of an item")


def clip(row: Mapping[str, Any]) -> motion.Clip:
    """The label of a clip, as `scene`."""
    return reading.checked(motion.Clip, row, "the clip of an item")


def others(suite: Suite) -> list[str] | None:
    """Prompts to calibrate with that the suite does not ask for, not even by the same words; None: dq's own."""
    draw = _grammar(suite)
    if draw is None:
        return None
    asked = {item.prompt for item in items(suite)}
    seed = OTHERS_SEED + (suite.prompts["seed"] == OTHERS_SEED)
    drawn = dict.fromkeys(caption for caption, _ in draw(20 * OTHERS, seed=seed))
    return [caption for caption in drawn if caption not in asked][:OTHERS]


def read(path: str | Path, column: str | None = None, limit: int | None = None) -> list[str]:
    """The first `limit` prompts of a file, blank ones left out. DQError for a file or column that is not there."""
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise DQError(f"prompts file {str(path)!r}: unknown ending {path.suffix!r}, expected {', '.join(ENDINGS)}")
    text = reading.text(path, f"prompts file {str(path)!r}", MOST_BYTES, encoding="utf-8-sig")
    texts = (text for text in (_text(row, column, path) for row in _rows(text, column, path)) if text)
    found = list(islice(texts, MOST_PICTURES + 1 if limit is None else limit))
    if not found:
        raise DQError(f"prompts file {str(path)!r} holds no prompt, expected one or more")
    if len(found) > MOST_PICTURES:
        raise DQError(f"prompts file {str(path)!r} holds more than {MOST_PICTURES} prompts; set prompts: limit")
    return found


def _rows(text: str, column: str | None, path: Path) -> Iterator[Any]:
    """Rows of a file: texts or mappings."""
    what, ending = f"prompts file {str(path)!r}", path.suffix.lower()
    hint = f"expected {ending[1:]}"
    if text.count("\n") > MOST_LINES or (ending == ".json" and sum(map(text.count, ",[{")) > MOST_VALUES):
        raise DQError(f"{what} holds more than {MOST_LINES} lines or {MOST_VALUES} values; {hint}")
    lines = io.StringIO(text, newline="\n")  # other newlines belong to a text
    if ending == ".txt":
        yield from lines
    elif ending == ".jsonl":
        yield from (reading.from_json(line, what, hint) for line in lines if line.strip())
    elif ending == ".json":
        yield from _records(reading.from_json(text, what, hint), path)
    else:
        yield from _cells(text, column, path)


def _cells(text: str, column: str | None, path: Path) -> Iterator[dict[str, str]]:
    """The cell of each row of a csv or tsv file that stands in the column."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        heads = next(table, None) or []
        name = _column(dict.fromkeys(heads), column, path) if heads else ""
        place = heads.index(name) if heads else 0
        for row in table:
            yield {name: row[place] if len(row) > place else ""}
    except csv.Error as error:
        raise DQError(f"prompts file {str(path)!r} is damaged: {error}; expected {path.suffix[1:]}") from None


def _records(data: Any, path: Path) -> list[Any]:
    """A list as it is, COCO's annotations one an image, else objects by name."""
    if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
        first: dict[Any, Any] = {}
        for number, row in enumerate(data["annotations"]):
            image = row.get("image_id") if isinstance(row, Mapping) else None
            first.setdefault(image if isinstance(image, str | int) else ("row", number), row)
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
        return _short(row.strip(), path)
    if not isinstance(row, Mapping):
        raise DQError(f"prompts file {str(path)!r}: a row is {shown(row)}, expected a text or an object")
    name = _column(row, column, path)
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise DQError(f"prompts file {str(path)!r}: column {shown(name)} holds {shown(value)}, expected text")
    return _short((value or "").strip(), path)


def _short(text: str, path: Path) -> str:
    """The text; DQError for one that is no prompt."""
    if len(text) > LONGEST or reading.surrogates(text):
        expected = f"expected texts of at most {LONGEST} characters"
        raise DQError(f"prompts file {str(path)!r} holds {shown(text)}, {expected}")
    return text


def _column(row: Mapping[str, Any], column: str | None, path: Path) -> str:
    names: Iterable[str] = [name for name in row if isinstance(name, str)]
    if column is not None:
        if column not in row:
            known = nearest(column, [name[: reading.SHOWN] for name in islice(names, 1000)])
            raise DQError(f"prompts file {str(path)!r} has no column {shown(column)}, {known}")
        return column
    for wanted in COLUMNS:
        for name in names:
            if name.strip().lower() == wanted:
                return name
    known = f"found {shown(', '.join(islice(names, 1000)), quotes=False)}; name one of them as column"
    raise DQError(f"prompts file {str(path)!r} has no column {' or '.join(COLUMNS)}: {known}")
