"""The one writer and the one lock: what stands under a name is whole, new or old, or not there at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dq.errors import DQError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt: Any = None


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

    Gives False, at once, where `wait` is False and another process holds it. Always True where there are no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            _lock(file, wait)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True


def _lock(file: IO, wait: bool) -> None:
    """BlockingIOError, of Windows PermissionError, when another process has it and `wait` is False."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    elif msvcrt is not None:
        file.seek(0)
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                if not wait:
                    raise
                time.sleep(0.1)
