"""The one writer and the one lock: what stands under a name is whole, new or old, or not there at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dq.errors import DQError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


MOST_JSON = 2**28  # bytes of a file that is read as JSON at once


def read_json(path: str | Path) -> dict:
    """Read a JSON object; DQError when the file is missing, no plain file, too large, not JSON or not an object."""
    path = Path(path)
    try:
        if not path.is_file() and path.exists():  # a pipe or a device might never end
            raise DQError(f"file {str(path)!r} is no plain file, expected JSON")
        if path.stat().st_size > MOST_JSON:
            raise DQError(
                f"file {str(path)!r} holds {path.stat().st_size} bytes, expected at most {MOST_JSON} of JSON"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DQError(f"file {str(path)!r} does not exist; give the path of a plan or recipe JSON") from None
    except DQError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DQError(f"file {str(path)!r} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise DQError(f"file {str(path)!r} holds a JSON {type(data).__name__}, expected an object")
    return data


def write(path: Path, save: Callable[[Path], object]) -> None:
    """`save(fresh path)`, a file or a folder, then all of it under its name. DQError when it cannot be written."""
    fresh = path.with_name(f".{path.name}.part")  # one name, so that a restart after a kill writes over it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(fresh)
        save(fresh)
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(fresh)
        raise DQError(f"cannot write {str(path)!r}: {error}; free space or choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    """A value as JSON in UTF-8, one space an indent. DQError when it cannot be written."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to write a new one to; it takes the folder's place when the block succeeds.

    Raises OSError when nothing can be written there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside / "new"
        if folder.exists():
            folder.rename(aside / "old")
        (aside / "new").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file against other processes until the block or the process ends.

    Gives False, at once, where `wait` is False and another process holds it. Without file locks (Windows) always True.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
