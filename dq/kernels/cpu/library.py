"""The shared object of native kernels, loaded once: where it is, whether it fits, and if not, why.

The environment variable DQ_CPU_LEVEL hides kernels that the processor could run. It is read when the library is first
asked for:

    none      none of dq's own CPU kernels; every layer they would run says "hidden by DQ_CPU_LEVEL=none"; torch's int8
              product is refused, too, as on a processor without VNNI
    avx512    those of AVX512 with VNNI and bf16, where the processor has these: all there are, as without the variable

ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 do the same to PyTorch; with `none` beside them any machine
behaves as one that has AVX2 only.
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
LEVELS = ("none", "avx512")  # by what dq_cpu_level returns
VARIABLE = "DQ_CPU_LEVEL"


def _allowed() -> str:
    """The highest of LEVELS that may run. Raises DQError for a value of the variable that is none of them."""
    asked = os.environ.get(VARIABLE) or LEVELS[-1]
    if asked not in LEVELS:
        raise DQError(f"{VARIABLE} is {asked!r}, {nearest(asked, LEVELS)}")
    return asked


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    from dq.kernels.cpu import compile as source  # here, so that `python -m` may run that file

    if _allowed() == "none":
        return None, f"dq's native kernels are hidden by {VARIABLE}=none"
    path = Path(source.LIBRARY)
    if not path.is_file():
        return None, f"dq's native kernels are not built; {BUILD}"
    import torch  # noqa: F401  its OpenMP runtime must be the one the library finds

    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"dq's native kernels do not load: {error}"
    found.dq_fingerprint.restype = ctypes.c_char_p
    if source.sources() and found.dq_fingerprint().decode() != source.fingerprint():
        return None, f"dq's native kernels were built from other sources; {BUILD}"
    if LEVELS[found.dq_cpu_level()] == "none":
        return None, f"this {platform.machine()} processor lacks AVX512 with VNNI and bf16"
    return found, None


def library() -> ctypes.CDLL | None:
    """The loaded library, None where there is none that runs here."""
    return _load()[0]


def missing() -> str | None:
    """Why there is no library on the machine that is asked about, in one line; None when there is one."""
    asked = kernels.machine()
    return _load()[1] if asked is None else asked.cpu
