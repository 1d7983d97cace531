"""Which instructions a benchmark may use: the level of dq's CPU kernels, and PyTorch limited to the same.

A level is the environment of a process, set before torch is imported there: dq hides its higher kernels, ATen, oneDNN
and MKL take theirs of that level. It shows what a smaller processor would run, at the clock and caches of this one.
"""

from __future__ import annotations

import os

import torch

from dq import kernels
from dq.errors import DQError, nearest
from dq.kernels.cpu import library

LIMITS = {  # by level of dq's kernels: ATen, oneDNN, MKL
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avxvnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512"),
}
VARIABLES = (library.VARIABLE, "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def environment(level: str) -> dict[str, str]:
    """Variables of a process limited to a level; none for "", all that the machine has. DQError for an unknown one."""
    if not level:
        return {}
    if level not in LIMITS:
        raise DQError(f"level {level!r} is unknown, {nearest(level, LIMITS)}")
    return dict(zip(VARIABLES, (level, *LIMITS[level]), strict=True))


def shown() -> str:
    """What this process runs on: `AVX2 (higher levels hidden, torch limited to AVX2)`."""
    level, found = library.level(), library.library()
    name = library.UNITS.get(level, "no kernels of dq")
    notes = []
    if found is not None and found.dq_cpu_levels() >> (library.LEVELS.index(level) + 1):
        notes.append("higher levels hidden")
    if "ATEN_CPU_CAPABILITY" in os.environ:
        notes.append(f"torch limited to {torch.backends.cpu.get_cpu_capability()}")
    return f"{name} ({', '.join(notes)})" if notes else name


def has_bf16(level: str = "") -> bool:
    """Whether the processor multiplies bf16 numbers itself, at a level or in this process."""
    return not level and kernels.bf16()  # every level one can be limited to hides them


def base(level: str = "") -> str:
    """The dtype full precision is fastest in: bf16 where there are units for it, else fp32."""
    return "bf16" if has_bf16(level) else "fp32"
