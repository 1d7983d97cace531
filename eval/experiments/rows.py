"""Result files: JSON rows that say when, where and with what each figure was measured.

A row holds its figures and the keys of `stamp`. Rows are written one by one, so that a run that stops goes on later.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dq.disk import write_json
from dq.errors import DQError
from eval import reading

FOLDER = Path(__file__).resolve().parents[1] / "results"
STAMP = FOLDER.parents[1] / ".commit"  # travels where .git does not
PACKAGES = ("torch", "diffusers", "transformers")


def read(path: Path) -> list[dict]:
    """The rows of a result file, none when there is no file. DQError for rows of a rehearsal: they measure nothing."""
    found = _read(path)
    if any(row.get("rehearsal") for row in found):
        raise DQError(
            f"result file {str(path)!r}: got rows of a rehearsal, expected measured ones. Take those of a visit"
        )
    return found


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    what = f"result file {str(path)!r}"
    found = reading.from_json(reading.text(path, what, reading.MOST_JSON), what)
    return reading.checked(dict[str, list[dict]], found, what).get("rows", [])


def add(path: Path, row: dict, keys: tuple[str, ...]) -> None:
    """Write `row` into a file in place of the one that agrees with it in `keys`, else at the end."""
    rows, mine = _read(path), [row.get(key) for key in keys]
    place = next((i for i, old in enumerate(rows) if [old.get(key) for key in keys] == mine), len(rows))
    rows[place : place + 1] = [row]
    write_json(path, {"rows": rows})


def kept(path: Path, keys: Mapping, version: str, measure: Callable[[], Mapping]) -> dict:
    """The row of `path` with `keys` and this version of the code behind it; measured and added if there is none."""
    asked = {**keys, "version": version}
    for row in read(path):
        if all(row.get(key) == value for key, value in asked.items()):
            return row
    row = asked | dict(measure()) | stamp()
    add(path, row, tuple(keys))
    return row


def stamp(device: str = "cpu", packages: tuple[str, ...] = ()) -> dict:
    """Commit (with `+` when files differ from it), versions and machine of the rows measured now on a device type.

    A machine with a card may have a copy of the files and little else: without git or a repository the commit is
    that of `carry_commit`, else "unknown+", and packages that are not installed have no version.
    """
    machine = _gpu() if device == "cuda" else _machine()
    return {"commit": _commit(), "versions": _versions((*PACKAGES, *packages)), "machine": machine}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def conditions(threads: int) -> dict:
    """What a time depends on beside the machine: the level of its kernels, threads, the load when it was measured."""
    from dq.bench import levels  # here: the command line answers without it

    return {"level": levels.shown(), "threads": threads, "load": round(os.getloadavg()[0], 2)}


def limited(row: dict) -> bool:
    """Whether a row was measured with higher levels of the processor hidden."""
    return "hidden" in row.get("level", "")


def there(path: Path, row: dict, stamp: dict) -> bool:
    """Whether a file has such a row of this commit, machine, level and threads; no while dq differs from it."""
    same = row | {key: stamp[key] for key in ("commit", "machine", "level", "threads")}
    fits = (all(old.get(key) == value for key, value in same.items()) for old in read(path))
    return not stamp["commit"].endswith("+") and any(fits)


def _gpu() -> str:
    """`NVIDIA H100 80GB HBM3 (sm_90)`: the support matrix looks for the architecture."""
    import torch  # here: the command line answers without it

    from dq import kernels

    return f"{torch.cuda.get_device_name()} ({kernels.architecture()})"


def _commit() -> str:
    def git(*args: str) -> str:
        try:
            found = subprocess.run(["git", *args], capture_output=True, text=True, cwd=FOLDER.parent, check=False)
        except OSError:  # not installed
            return ""
        return found.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    if not head:
        return STAMP.read_text().strip() if STAMP.exists() else "unknown+"
    return head + ("+" if git("status", "--porcelain", "--", "../dq") else "")


def carry_commit() -> Path:
    """Write the commit into a file that travels with a copy of the tree."""
    STAMP.write_text(_commit() + "\n")
    return STAMP


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    units = [flag for flag in ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if any(flag in x for x in lines)]
    return f"{os.cpu_count()} cores {name} ({', '.join(units) or 'no low-precision units'})"
