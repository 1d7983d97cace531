"""The shared object of native kernels, loaded once: where it is, whether it fits, and if not, why."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

BUILD = "run `python -m dq.kernels.cpu.compile`"
AVX512 = 2  # dq_cpu_level of a processor that runs everything


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    from dq.kernels.cpu import compile as source  # here, so that `python -m` may run that file

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
    if found.dq_cpu_level() < AVX512:
        return None, f"this {platform.machine()} processor lacks AVX512 with VNNI and bf16"
    return found, None


def library() -> ctypes.CDLL | None:
    """The loaded library, None where there is none that runs here."""
    return _load()[0]


def missing() -> str | None:
    """Why there is no library, in one line; None when there is one."""
    return _load()[1]
