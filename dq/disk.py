"""The one writer and the one lock: what stands under a name is whole, new or old, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import sys
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


ASIDE, NEW, OLD, STALE = ".saving", "new", "old", "stale.json"  # of `replacing`: its folder, and what lies there
DAY = 86400.0  # seconds
MOST_JSON = 2**28  # bytes of a file that is read as JSON at once
MOST_DEEP = 200  # objects and arrays around a value in JSON of others
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[][{}]')


def parse(text: str | bytes) -> Any:
    """A JSON value; ValueError for text that is none or that `check_depth` refuses."""
    text = text.decode() if isinstance(text, bytes) else text
    check_depth(text)
    return json.loads(text)


def check_depth(text: str) -> None:
    """ValueError for JSON that nests more than `MOST_DEEP` objects and arrays.

    Python's own limit is no bound: libraries raise it for the whole process, as torch.compile does.
    """
    if text.count("[") + text.count("{") <= MOST_DEEP:
        return
    deep = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        deep += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if deep > MOST_DEEP:
            raise ValueError(f"more than {MOST_DEEP} objects and arrays inside each other")


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
        data = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DQError(f"file {str(path)!r} does not exist; give the path of a plan or recipe JSON") from None
    except DQError:
        raise
    except (OSError, ValueError) as error:
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
def replacing(folder: str | Path, keep: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """An empty folder to fill; when the block succeeds it takes the place of `folder`, in one step.

    keep  of the files of the old folder that the new one lacks, by their path inside: whether they stay
    A kill at any moment leaves the old folder or the new one; what else it leaves goes with the next `sweep`, which
    every `replacing` begins with. Raises OSError when it cannot be written; then nothing was changed.
    """
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    home = target if _stays(target) else target.parent
    with _aside(home, target.name) as aside:
        new = aside / NEW
        new.mkdir()
        yield new
        if home == target or not _carried(target, new, keep):
            _commit(aside, target, keep)
            return
        if not target.exists():
            new.rename(target)
        elif _exchange(new, target):
            for inside in _inside(new):  # came to the old folder since its files were linked
                if keep(inside) and not (target / inside).exists() and (target / inside).parent.is_dir():
                    (new / inside).rename(target / inside)
        else:
            target.rename(aside / OLD)
            new.rename(target)  # killed between the two, `sweep` puts the old one back


def sweep(folder: str | Path) -> None:
    """Remove what a killed `replacing` of a folder left, and end what it had begun to move. Never fails."""
    target = Path(folder).resolve()
    if not target.parent.is_dir():
        return
    for home in (target.parent, target):
        for aside in home.glob(f".{glob.escape(target.name)}-*{ASIDE}"):
            with contextlib.suppress(OSError, DQError, TypeError), _held(aside) as mine:
                if mine and (aside / STALE).exists():
                    _move_into(aside, target)
                if mine and (aside / OLD).exists() and not target.exists():
                    (aside / OLD).rename(target)
                if mine:
                    shutil.rmtree(aside)


def _stays(target: Path) -> bool:
    """Whether a folder cannot be exchanged for another: somebody stands in it, or its parent is not ours to write."""
    if not target.is_dir():
        return False
    here = Path.cwd()
    return here == target or target in here.parents or target.is_mount() or not os.access(target.parent, os.W_OK)


@contextlib.contextmanager
def _aside(home: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `home`, held against `sweep` of others while the block runs, gone after it."""
    while True:
        aside = home / f".{name}-{os.urandom(6).hex()}{ASIDE}"
        aside.mkdir()
        with _held(aside) as mine:
            if not mine or not aside.is_dir():  # swept before it was held
                continue
            try:
                yield aside
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder until the block or the process ends; False where another process has it.

    Without file locks (Windows) a folder counts as ours once it is a day old, or was made here.
    """
    if fcntl is None:
        yield not any(folder.iterdir()) or time.time() - folder.stat().st_mtime > DAY
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:  # no locks on this file system
        yield not any(folder.iterdir()) or time.time() - folder.stat().st_mtime > DAY
    else:
        yield True
    finally:
        os.close(opened)


def _carried(target: Path, new: Path, keep: Callable[[Path], bool]) -> bool:
    """Link the kept files of the old folder into the new one; False where the file system has no links."""
    if not target.is_dir():
        return True
    shutil.copymode(target, new)
    for inside in _inside(target):
        place = new / inside
        if place.exists() or place.is_symlink() or not keep(inside):
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(target / inside, place, follow_symlinks=False)
        except (OSError, NotImplementedError):
            return False
    return True


def _inside(folder: Path) -> list[Path]:
    """Every file and link below a folder, by its path inside."""
    found = []
    for home, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(home) / name).is_symlink()]
        folders[:] = [name for name in folders if not name.endswith(ASIDE)]
        found += [(Path(home) / name).relative_to(folder) for name in (*names, *links)]
    return found


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot (renameat2, renamex_np)."""
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            return libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0
        return sys.platform == "darwin" and libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0
    except (OSError, AttributeError):
        return False


def _commit(aside: Path, target: Path, keep: Callable[[Path], bool]) -> None:
    """Put the new files into a folder that must stay: from the note of what is stale on, `sweep` can end it."""
    new = {path.relative_to(aside / NEW) for path in (aside / NEW).rglob("*") if path.is_file()}
    stale = [str(path) for path in _inside(target) if path not in new and not keep(path)]
    write_json(aside / STALE, {"stale": stale})
    _move_into(aside, target)


def _below(target: Path, name: str) -> Path:
    """A place inside a folder by its path there. OSError for one that leads out of it."""
    place = target / name
    if not place.parent.resolve().is_relative_to(target):
        raise PermissionError(errno.EPERM, "leads out of the folder", name)
    return place


def _move_into(aside: Path, target: Path) -> None:
    """Rename every new file to its place; JSON, which makes a folder loadable, last. Then remove what is stale."""
    new = aside / NEW
    files = sorted((path for path in new.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
    for path in files:
        place = _below(target, str(path.relative_to(new)))
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for name in read_json(aside / STALE).get("stale", ()):
        _below(target, name).unlink(missing_ok=True)
    (aside / STALE).unlink()


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
