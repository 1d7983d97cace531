"""The shared object of native kernels, loaded once: where it is, whether it fits, and if not, why.

The environment variable DQ_CPU_LEVEL hides kernels that the processor could run. It is read when the library is first
asked for:

    none        none of dq's own CPU kernels; every layer they would run says "hidden by DQ_CPU_LEVEL=none"
    avx2        those of AVX2: integer linears and weight-only layers
    avxvnni     the same with AVX-VNNI
    avx512vnni  the same with AVX512 and VNNI
    avx512      all there are: those of AVX512 with VNNI and bf16, integer convolutions and attention, too

The highest level up to this one that the processor has runs. With `none` and `avx2` torch's int8 product is refused,
too, as on a processor without VNNI. ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 do the same to PyTorch; with
`avx2` beside them any machine behaves as one that has AVX2 only.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from dq import kernels
from dq.errors import DQError, nearest

BUILD = "run `python -m dq.kernels.cpu.compile`"
LEVELS = ("none", "avx2", "avxvnni", "avx512vnni", "avx512")  # by the bits of dq_cpu_levels
UNITS = {"avx2": "AVX2", "avxvnni": "AVX-VNNI", "avx512vnni": "AVX512-VNNI", "avx512": "AVX512 with VNNI and bf16"}
VARIABLE = "DQ_CPU_LEVEL"


def _allowed() -> str:
    """The highest of LEVELS that may run. Raises DQError for a value of the variable that is none of them."""
    asked = os.environ.get(VARIABLE) or LEVELS[-1]
    if asked not in LEVELS:
        raise DQError(f"{VARIABLE} is {asked!r}, {nearest(asked, LEVELS)}")
    return asked


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None, str]:
    """-> the library, why there is none, the level that runs."""
    from dq.kernels.cpu import compile as source  # here, so that `python -m` may run that file

    if _allowed() == "none":
        return None, f"dq's native kernels are hidden by {VARIABLE}=none", "none"
    path = Path(source.LIBRARY)
    if not path.is_file():
        return None, f"dq's native kernels are not built; {BUILD}", "none"
    import torch  # noqa: F401  its OpenMP runtime must be the one the library finds

    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"dq's native kernels do not load: {error}", "none"
    found.dq_fingerprint.restype = ctypes.c_char_p
    if source.sources() and found.dq_fingerprint().decode() != source.fingerprint():
        return None, f"dq's native kernels were built from other sources; {BUILD}", "none"
    mask = found.dq_cpu_levels()
    level = [name for i, name in enumerate(LEVELS[: LEVELS.index(_allowed()) + 1]) if mask >> i & 1][-1]
    if level == "none":
        return None, f"this {platform.machine()} processor lacks AVX2", "none"
    return found, None, level


def library() -> ctypes.CDLL | None:
    """The loaded library, None where there is none that runs here."""
    return _load()[0]


def level() -> str:
    """Which of LEVELS runs on the machine that is asked about."""
    asked = kernels.machine()
    if asked is None:
        return _load()[2]
    return asked.level if asked.cpu is None else "none"


def missing(least: str = LEVELS[1]) -> str | None:
    """Why kernels of a level do not run on the machine that is asked about, in one line; None where they do."""
    asked = kernels.machine()
    reason = _load()[1] if asked is None else asked.cpu
    if reason is None and LEVELS.index(level()) < LEVELS.index(least):
        return f"this one of dq's CPU kernels needs {UNITS[least]}"
    return reason
