"""Milliseconds and verdicts of this machine, kept in the user's cache (`DQ_CACHE`, else `~/.cache/dq`).

One file for every device, library versions, dq's native kernels, instruction level and thread count: what was
measured under one says nothing about another. The choice of kernels (`choice`) and the costs of a budget read and
write the same table, from several threads and processes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dq import kernels
from dq.disk import locked, read_json, write_json
from dq.errors import DQError
from dq.version import __version__

_guard = threading.RLock()


class Table:
    """What is known under `what`, in memory and in the file `path`.

    ms        milliseconds by problem, then by what solved it
    verdicts  by problem, then by backend: why it must not run, "" where it proved right
    """

    def __init__(self, path: Path, what: Mapping[str, Any]):
        self.path, self.what = path, dict(what)
        self.ms: dict[str, dict[str, float]] = {}
        self.verdicts: dict[str, dict[str, str]] = {}
        self._read()

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the milliseconds of (problem, what solved it) are there."""
        return key[1] in self.ms.get(key[0], {})

    def __getitem__(self, key: tuple[str, str]) -> float:
        return self.ms[key[0]][key[1]]

    def add(self, problem: str, found: Mapping[str, float]) -> None:
        """Keep milliseconds of one problem beside those that are there."""
        self._keep("ms", problem, found)

    def judge(self, problem: str, found: Mapping[str, str]) -> None:
        """Keep verdicts on one problem beside those that are there."""
        self._keep("verdicts", problem, found)

    def _keep(self, kind: str, problem: str, found: Mapping) -> None:
        """A cache that cannot be written costs the next process its measurements, and nothing else."""
        with _guard:
            _merge(getattr(self, kind), {problem: found})
            with contextlib.suppress(DQError, OSError), locked(self.path.with_suffix(".lock")):
                self._read()  # another process may have written meanwhile
                _merge(getattr(self, kind), {problem: found})
                write_json(self.path, {"machine": self.what, "ms": self.ms, "verdicts": self.verdicts})

    def _read(self) -> None:
        """Take over what the file holds. A damaged one is measured anew."""
        with contextlib.suppress(DQError):
            if self.path.exists():
                from dq import schema  # which takes its time to import

                found: Any = read_json(self.path)
                for kind, known in (("times", self.ms), ("verdicts", self.verdicts)):
                    rows = found.get("ms" if kind == "times" else kind)
                    schema.check(kind, rows, f"file {str(self.path)!r}")
                    _merge(known, rows)


def _merge(known: dict[str, dict], found: Mapping[str, Mapping]) -> None:
    for problem, values in found.items():
        known[problem] = {**known.get(problem, {}), **values}  # a new dict: readers take no lock


def table(device: torch.device) -> Table:
    """The table of a device as this process uses it now."""
    name = _name(kernels.placed(device))  # two cards of one model share what is known
    return _table(name, torch.get_num_threads(), os.environ.get("DQ_CACHE"))


@cache
def _table(name: str, threads: int, home: str | None) -> Table:
    what = _machine() | {"device": name, "threads": threads}
    file = f"ms-{zlib.crc32(json.dumps(what, sort_keys=True).encode()):08x}.json"
    return Table((Path(home) if home else Path.home() / ".cache" / "dq") / file, what)


@cache
def _machine() -> dict[str, str]:
    """What holds for a whole process."""
    from dq.kernels.cpu import library  # which asks dq.kernels for its machine

    native = library.library()
    found = {"torch": torch.__version__, "dq": __version__, "level": library.level()}
    found |= {"native": "" if native is None else native.dq_fingerprint().decode()}
    return found | {"isa": f"{torch.backends.cpu.get_cpu_capability()} {os.environ.get('ONEDNN_MAX_CPU_ISA', '')}"}


@cache
def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    with contextlib.suppress(OSError):  # not there but on Linux
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for row in rows:
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    return platform.processor() or platform.machine()
