"""What each calibration run is called with: a prompt, or a prompt with pictures and other arguments of its own.

Edit, inpainting, ControlNet and image-to-video pipelines see pairs. In Python a pair is a mapping of call arguments:

    {"prompt": "make it red", "image": "cat.png"}        a path, a PIL picture or a tensor

As files: one prompt a line (`.txt`); a mapping a line (`.jsonl`); or a folder with a `metadata.jsonl`, or with
NAME.txt beside NAME.png, and NAME.KEY.png for a further argument KEY (`cat.mask_image.png`). Paths in files stay in
their folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dq.disk import parse
from dq.errors import DQError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".gif", ".mp4", ".webm", ".mov", ".avi", ".mkv")
PAIRS = "metadata.jsonl"
MOST_BYTES = 64 << 20  # of a file of prompts

Entry = str | Mapping[str, Any]


def read(path: Path) -> list[Entry]:
    """Entries of a text file, a .jsonl file or a folder. Raises DQError for what cannot be read as one."""
    if path.is_dir():
        return _pairs(path / PAIRS) if (path / PAIRS).exists() else _folder(path)
    return _pairs(path) if path.suffix == ".jsonl" else _lines(path)


def check(entries: Iterable[Entry], source: str) -> list[Entry]:
    """The entries as a list. Raises DQError for one that is neither text nor call arguments whose files are there."""
    found = list(entries)
    for entry in found:
        if isinstance(entry, Mapping):
            _check_arguments(entry)
        elif not isinstance(entry, str) or not entry.strip():
            raise DQError(f"calibration: a prompt is {entry!r}, expected text, or a dict of call arguments")
    if not found:
        raise DQError(f"calibration: {source} is empty, expected one prompt or more; leave it out for dq's own")
    return found


def arguments(entry: Entry) -> dict[str, Any]:
    """Call arguments of an entry, its pictures (PIL, RGB; masks L) and clips (lists of PIL) opened."""
    if isinstance(entry, str):
        return {"prompt": entry}
    return {name: _opened(name, value) for name, value in entry.items()}


def _check_arguments(entry: Mapping[str, Any]) -> None:
    odd = [name for name in entry if not isinstance(name, str)]
    if odd or not entry:
        raise DQError(f"calibration: call arguments of a run are {dict(entry)!r}, expected names and values")
    if isinstance(entry.get("prompt"), (list, tuple)):
        raise DQError('calibration: "prompt" of a run is a list, expected one text; give a dict for each prompt')
    for name, value in entry.items():
        for path in _files(name, value):
            if not path.exists():
                raise DQError(
                    f"calibration: {name} {str(path)!r} is not there, expected a picture or clip on this disk"
                )


def _files(name: str, value: Any) -> list[Path]:
    """Paths among the values of an argument: any Path, and text where pictures belong."""
    if isinstance(value, Path):
        return [value]
    if isinstance(value, str):
        return [Path(value)] if any(word in name for word in ("image", "mask", "video")) else []
    return [path for item in value for path in _files(name, item)] if isinstance(value, (list, tuple)) else []


def _opened(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and _files(name, value):
        return [_opened(name, item) for item in value]
    paths = _files(name, value)
    return _picture(paths[0], "mask" in name) if paths else value


def _picture(path: Path, mask: bool) -> Any:
    """A picture as PIL, a clip as a list of them."""
    from diffusers.utils import load_video  # here: what a user states is checked before torch is needed
    from PIL import Image

    try:
        if path.suffix.lower() in CLIPS:
            frames: Any = load_video(str(path))
            return [frame.convert("RGB") for frame in frames]
        with Image.open(path) as picture:
            return picture.convert("L" if mask else "RGB")
    except (OSError, ValueError, ImportError, SyntaxError, Image.DecompressionBombError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DQError(f"calibration: {str(path)!r} cannot be opened: {type(error).__name__}: {first}") from None


def _text(path: Path) -> str:
    """A file's text. Raises DQError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DQError(
                f"calibration: {str(path)!r} has more than {MOST_BYTES >> 20} MiB, expected a file of prompts"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        what = f"cannot read the prompts file {str(path)!r}: {type(error).__name__}"
        wanted = "expected a text file with one prompt a line, a .jsonl, a folder of pairs, or a list of prompts"
        raise DQError(f"calibration: {what}; {wanted}") from None


def _lines(path: Path) -> list[Entry]:
    """Lines that hold text."""
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _pairs(path: Path) -> list[Entry]:
    """A mapping of call arguments a line; `file_name` and `text` are read as `image` and `prompt`."""
    found: list[Entry] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = parse(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            example = '{"prompt": "make it red", "image": "cat.png"}'
            raise DQError(
                f"calibration: line {number} of {str(path)!r} is no JSON object, expected for example {example}"
            )
        names = {"file_name": "image", "text": "prompt"}
        named: dict[str, Any] = {str(names.get(name, name)): value for name, value in entry.items()}
        found.append({name: _placed(path, number, name, value) for name, value in named.items()})
    return found


def _placed(path: Path, number: int, name: str, value: Any) -> Any:
    """Paths of pictures from the folder of the file that names them. Raises DQError for those that lead out of it."""
    if isinstance(value, list) and _files(name, value):
        return [_placed(path, number, name, item) for item in value]
    if not (isinstance(value, str) and _files(name, value)):
        return value
    place = path.parent / value
    if "\0" in value or not place.resolve().is_relative_to(path.parent.resolve()):
        raise DQError(
            f"calibration: line {number} of {str(path)!r}: {name} {value!r} is not inside of the file's folder"
        )
    return place


def _folder(path: Path) -> list[Entry]:
    """NAME.txt beside its pictures, in order of the names."""
    texts = sorted(item for item in path.iterdir() if item.suffix == ".txt")
    if not texts:
        raise DQError(
            f"calibration: {str(path)!r} holds no NAME.txt and no {PAIRS}, expected pairs NAME.txt, NAME.png"
        )
    beside = sorted(item for item in path.iterdir() if item.suffix.lower() in PICTURES + CLIPS)
    found: list[Entry] = []
    for text in texts:
        entry: dict[str, Any] = {"prompt": _text(text).strip()}
        for item in beside:
            if item.stem == text.stem:
                entry["video" if item.suffix.lower() in CLIPS else "image"] = item
            elif item.stem.startswith(f"{text.stem}.") and item.stem[len(text.stem) + 1 :].isidentifier():
                entry[item.stem[len(text.stem) + 1 :]] = item
        found.append(entry if len(entry) > 1 else entry["prompt"])
    return found
