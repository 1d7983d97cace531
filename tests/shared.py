"""Work that several processes share, started and waited for."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable

import torch


def ran(work: Callable, size: int, folder) -> list[dict]:
    """-> what each of some processes left in `folder`/out{rank} after `work(rank, size, port, folder)`."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=work, args=(rank, size, port, folder)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(folder / f"out{rank}") for rank in range(size)]
