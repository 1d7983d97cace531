"""Milliseconds per denoising step and peak memory of a pipeline that draws one picture (or video) at a time.

A step is the time between the ends of two scheduler steps: denoiser, guidance and scheduler together, without text
encoder and decoder. Peak memory is on CUDA what torch had allocated at most, weights included; elsewhere the weights
of all parts and the most bytes of tensors alive at once in a call, counted by torch's profiler, which does not see
what kernels take for themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def measure(pipe, draw: Callable[[int | None], object], repeats: int) -> dict[str, Any]:
    """Median over `repeats` calls after one unmeasured, with all cores; {} for no repeats.

    draw  makes one picture, in so many steps or in its own number
    """
    if repeats < 1:
        return {}
    peak = peak_bytes(pipe, lambda: draw(2))  # the unmeasured call, too
    with all_cores() as threads:
        times = [step_ms for _ in range(repeats) for step_ms in _steps_ms(pipe, draw)]
    figures = {"ms_per_step": round(statistics.median(times), 4), "ms_spread": _spread(times)} if times else {}
    return figures | {"peak_gib": round(peak / 2**30, 5), "threads": threads, "timed_on": _device(pipe).type}


@contextlib.contextmanager
def all_cores() -> Iterator[int]:
    """As many threads as this process may use cores: while one is timed, the others wait."""
    before = torch.get_num_threads()
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(most)
    try:
        yield most
    finally:
        torch.set_num_threads(before)


def _steps_ms(pipe, draw: Callable[[int | None], object]) -> list[float]:
    """Milliseconds between the ends of the scheduler steps of one call."""
    ends: list[float] = []
    scheduler, step, device = pipe.scheduler, pipe.scheduler.step, _device(pipe)

    @functools.wraps(step)  # pipelines read the signature of `step` to learn which arguments it takes
    def timed(*args, **kwargs):
        output = step(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(1e3 * time.perf_counter())
        return output

    scheduler.step = timed
    try:
        draw(None)
    finally:
        del scheduler.step
    return [after - before for before, after in pairwise(ends)]


def _spread(times: list[float]) -> list[float]:
    """First and third quartile."""
    if len(times) < 2:
        return [round(times[0], 4)] * 2
    low, _, high = statistics.quantiles(times, n=4)
    return [round(low, 4), round(high, 4)]


def peak_bytes(pipe, draw: Callable[[], object]) -> int:
    """Most bytes in use while `draw` runs, weights included; see the module docstring."""
    device = _device(pipe)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        draw()
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        draw()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return _weight_bytes(pipe) + max(accumulate(changes), default=0)


def _weight_bytes(pipe) -> int:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.state_dict().values())


def _device(pipe) -> torch.device:
    return torch.device(pipe.device)
