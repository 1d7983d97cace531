"""Where weights lie in memory: two files, or two processes, give the same picture to the bit.

Weights mapped from a file begin wherever its header ends, others begin at multiples of ALIGNMENT. Matrix libraries sum
in another order for each, so that the same model would give other bits by the way it came into memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable, Iterator
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import nn

ALIGNMENT = 64  # bytes; torch's own allocations begin at multiples of it
MADV_PAGEOUT = 21  # of Linux 5.4 and later; older ones answer that they do not know it


def align(modules: Iterable[nn.Module]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copy CPU weights at odd addresses into memory of torch's own, one by one; each with what it held before."""
    for value in [value for module in modules for value in (*module.parameters(), *module.buffers())]:
        if _is_odd(value):
            before = value.data
            value.data = before.clone()
            yield value, before


def _is_odd(value: torch.Tensor) -> bool:
    plain = value.device.type == "cpu" and value.layout is torch.strided and type(value.data) is torch.Tensor
    return plain and value.data_ptr() % ALIGNMENT > 0


@contextlib.contextmanager
def aligned(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, weights as `align` puts them; afterwards where they were, except what has gone to another device."""
    moved = list(align(modules))
    try:
        yield
    finally:
        for value, before in moved:
            if value.device == before.device:
                value.data = before


def page_out(tensor: torch.Tensor) -> None:
    """Let the system take back the whole pages of a tensor that was copied from a mapped file.

    They would stay in the process's memory beside the copy. Nothing is lost: the advice drops clean file pages only.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = tensor.data_ptr()
    start, stop = -(-first // PAGESIZE) * PAGESIZE, (first + tensor.nbytes) // PAGESIZE * PAGESIZE
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_PAGEOUT)


def peak_bytes() -> int | None:
    """Most memory that this process ever held, None where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include that of the process it was forked from
        return 1024 * next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith("VmHWM"))
    try:
        import resource  # not there on Windows
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available if device.type == "cpu" else None
