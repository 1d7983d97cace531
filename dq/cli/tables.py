"""What `dq bench` prints: timings, kernels against what the machine can do, and dq beside its peers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def timings(rows: list) -> None:
    """A line per layer shape or denoiser."""
    table = Table("", "device", f"{rows[0].dtype} ms", "quantized ms", "times as fast", "kernel")
    for row in rows:
        ratio = f"{row.speedup:.2f}"
        table.add_row(row.what, row.device, f"{row.full_ms:.2f}", f"{row.quantized_ms:.2f}", ratio, row.kernel)
    Console().print(table)


def roofline(named: list, peaks) -> None:
    """A line per kernel, and the peaks they are shares of."""
    table = Table("kernel", "calls", "ms", "MB", "G operations", "on", "share of the peak", title="Roofline")
    for name, line in named:
        work, share = line.work, f"{100 * peaks.share(line):.0f} %"
        sizes = (f"{line.ms:.2f}", f"{work.moved_bytes / 1e6:.1f}", f"{work.operations / 1e9:.2f}")
        table.add_row(name, str(line.calls), *sizes, work.unit, share)
    Console().print(table)
    print(peaks)


def race(found, title: str) -> None:
    """One model's contenders, those that were left out with the reason, and dq's kernels."""
    base, level = found.results[0].base, found.results[0].level
    table = Table("", "ms", f"times {base}", f"dB to {base}", "kernel", title=f"{title}; {level}")
    for row in found.results:
        decibels = "" if row.error_db is None else f"{row.error_db:.1f}"
        figures = ("", "", "", row.skipped) if row.skipped else None
        table.add_row(row.contender, *(figures or (f"{row.ms:.2f}", f"{row.times_base:.2f}", decibels, row.kernel)))
    Console().print(table)
    if found.peaks is not None:
        roofline([(line.kernel, line) for line in found.lines], found.peaks)
