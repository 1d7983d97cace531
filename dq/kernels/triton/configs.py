"""Which tile sizes a kernel runs with: per architecture, from JSON files, without measuring anything unasked.

A file `configs/<arch>.json` holds for each kernel the candidates that compile there without register spills, largest
tile first, and `best`: the fastest one per problem where somebody has measured it. A file of the same form in the
user's cache folder ($DQ_CACHE, else $XDG_CACHE_HOME/dq, else ~/.cache/dq) comes first; `tune` writes it, one for each
model of card and release of Triton, because neither an H20 nor another compiler has an H100's fastest tiles. A problem
without a measured entry takes the candidate of the least estimated time, waves x time of a tile (`suited`). A kernel
that is timed apart by its operands has a name of its own behind a colon, "gemm:fp8", and the candidates of "gemm".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from dq import kernels
from dq.disk import write_json
from dq.errors import DQError
from dq.kernels.triton import chips

FOLDER = Path(__file__).parent / "configs"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# chips without a file of their own take that of the nearest one: same instructions, at least its shared memory
NEAREST = {"sm_86": "sm_89", "sm_87": "sm_89", "sm_103": "sm_100", "sm_121": "sm_120"}
ROUNDED_UP = 64  # rows of a problem are told apart in powers of two from here on
# of the estimate; from Hopper's rates for 8 bits, 4096 products and 64 bytes from L2 a clock of a multiprocessor
PER_BYTE = 64  # products in the time of a byte
IDLE = 512  # columns in whose time a tile starts and ends, half of it beside another program of its multiprocessor

Config = Mapping[str, int]


def cache_folder() -> Path:
    """Where measured configurations of this machine live."""
    home = os.environ.get("DQ_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if os.environ.get("DQ_CACHE"):
        return Path(home)
    return (Path(home) if home else Path.home() / ".cache") / "dq"


def card() -> str:
    """Model of the current GPU as a part of a file's name: "nvidia-h100-80gb-hbm3"; "no-gpu" without one."""
    return _card(torch.cuda.current_device()) if torch.cuda.is_available() else "no-gpu"


@cache
def _card(device: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def cache_file(arch: str) -> Path:
    """Of the current GPU and the Triton at hand."""
    import triton  # here: the plain data of this module needs none

    return cache_folder() / f"triton_{arch}_{card()}_{chips.dotted(chips.release(triton.__version__))}.json"


def nearest(chip: str) -> str:
    """Whose tile sizes a chip takes: its own, or those of the nearest one that has a file."""
    return NEAREST.get(chip, chip)


def architecture() -> str:
    """Whose tile sizes the running GPU takes; without one (interpreter) those of "sm_100", which has every kernel."""
    return nearest(kernels.architecture() or "sm_100")


def multiprocessors() -> int:
    """Of the current GPU; 4 in the interpreter."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 4


@cache
def shipped(arch: str) -> dict:
    """The file of an architecture. DQError for one that has none."""
    path = FOLDER / f"{arch}.json"
    if not path.exists():
        raise DQError(f"Triton kernels: no configurations for {arch}, expected one of {', '.join(ARCHITECTURES)}")
    return json.loads(path.read_text())


def measured(arch: str) -> bool:
    """Whether the shipped tile sizes of an architecture ("sm_90") were timed on one; False for one without a file."""
    return arch in ARCHITECTURES and shipped(arch)["measured"]


def kept(arch: str) -> dict[str, Config]:
    """The user's fastest configurations by problem, {} without a readable file."""
    return _kept(cache_file(arch))


@cache
def _kept(path: Path) -> dict[str, Config]:
    try:
        return json.loads(path.read_text())["best"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError):
        return {}  # somebody else's or a broken file: the shipped configurations still work


def candidates(kernel: str, arch: str) -> list[Config]:
    """Configurations of a kernel on an architecture, [] when it does not run there."""
    return shipped(arch)["candidates"].get(kernel.partition(":")[0], [])


def problem(kernel: str, m: int, n: int, k: int) -> str:
    """Key of a problem: rows rounded up to a power of two, because batch and picture sizes vary."""
    rows = max(ROUNDED_UP, 1 << (m - 1).bit_length())
    return f"{kernel} {rows}x{n}x{k}"


def pick(kernel: str, m: int, n: int, k: int, arch: str | None = None) -> Config:
    """The configuration for a product of (m, k) and (n, k)."""
    arch = arch or architecture()
    key = problem(kernel, m, n, k)
    found = kept(arch).get(key) or shipped(arch)["best"].get(key)
    return found or suited(candidates(kernel, arch), (m, n, k), multiprocessors())


def estimate(config: Config, shape: tuple[int, int, int], processors: int) -> int:
    """Waves x time of a tile of a product (m, n, k), in products of one multiprocessor: compares tiles, says no ms.

    A tile takes as long as its products or its operands, whichever is slower, and a wave as long as a tile: programs
    that share a multiprocessor ("resident") share its rate.
    """
    (m, n, k), bm, bn = shape, config["BM"], config["BN"]
    waves = -(-(-(-m // bm) * -(-n // bn)) // processors)
    return waves * max(bm * bn, PER_BYTE * (bm + bn)) * (k + IDLE // config.get("resident", 1))


def suited(choices: list[Config], shape: tuple[int, int, int], processors: int) -> Config:
    """The candidate with the least `estimate`, the larger one of equals."""
    return min(choices, key=lambda config: estimate(config, shape, processors))


def tune(kernel: str, m: int, n: int, k: int, time_ms: Callable[[Config], float]) -> tuple[Config, float]:
    """Time every candidate, keep the fastest in the user's cache -> (configuration, milliseconds).

    time_ms  runs one configuration; one that cannot run there (shared memory, compiler) may raise and is passed over
    """
    arch, timed, failed = architecture(), [], []
    for config in candidates(kernel, arch):
        try:
            timed.append((time_ms(config), config))
        except Exception as error:  # whatever the compiler or driver says: the next candidate may do
            failed.append(f"{dict(config)}: {error}")
    if not timed:
        raise DQError(
            f"Triton kernel {kernel}: no configuration ran on {arch}: {'; '.join(failed) or 'none is listed'}"
        )
    best_ms, best = min(timed, key=lambda pair: pair[0])
    keep(arch, {problem(kernel, m, n, k): dict(best)})
    return best, best_ms


def keep(arch: str, best: Mapping[str, Config]) -> None:
    """Add entries to the user's cache file, whole or not at all."""
    path = cache_file(arch)
    write_json(path, {"arch": arch, "best": {**kept(arch), **best}})
    _kept.cache_clear()
