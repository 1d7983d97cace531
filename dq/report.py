"""What happened to each layer: the rows behind `dq.quantize` and `dq.explain`, printable and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One layer.

    weight    format and granularity, None for a layer kept in full precision
    act       format and granularity of the activations, None when they stay in the compute dtype
    bytes     stored parameters
    error_db  SQNR of the rounded weight in dB, None when not measured
    backend   what runs the layer: a kernel backend's name, "" for a layer kept in full precision
    kernel    the backend's name for its kernel
    weight_only  the plan rounds activations, the kernel leaves them in floating point
    emulated  the kernel rounds activations but multiplies in floating point: its time is not the format's
    why_not   (backend, reason) of every preferred kernel that refused, was wrong or slower
    speedup   milliseconds of the full-precision layer over those of this one here, None when not measured
    late      activations of the later phases of a run, where the plan switches; late_kernels: what runs them. backend
              and speedup are the first's
    """

    name: str
    kind: str
    weight: str | None
    act: str | None
    rank: int
    bytes: int
    error_db: float | None
    reason: str
    backend: str = ""
    kernel: str = ""
    emulated: bool = False
    why_not: tuple[tuple[str, str], ...] = ()
    speedup: float | None = None
    weight_only: bool = False
    late: tuple[str, ...] = ()
    late_kernels: tuple[str, ...] = ()


@dataclass
class Report:
    """Rows of a quantized model or pipeline, with its parameter bytes before and after and the seconds it took.

    candidates   mean number of candidates that a method tried for a layer, None where nothing was fitted
    empty        the model has shapes only (it is on the meta device): its layers are planned, nothing was rounded
    tuned        by denoiser: held-out decibels before and after a tuning, its updates and seconds
    """

    layers: list[Row]
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    recipe: str = ""
    notes: list[str] = field(default_factory=list)
    candidates: float | None = None
    empty: bool = False
    tuned: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The whole report as a JSON object; an infinite error_db (an exact weight) becomes null."""
        data = asdict(self)
        for row in data["layers"]:
            if row["error_db"] == float("inf"):
                row["error_db"] = None
        return json.dumps(data, indent=1, allow_nan=False)

    def __str__(self) -> str:
        quantized = [row for row in self.layers if row.weight is not None]
        done = "planned, without weights" if self.empty else "quantized"
        lines = [
            f"{self.recipe or 'dq'}: {len(quantized)} layers {done}, {len(self.layers) - len(quantized)} kept, "
            f"{_mib(self.bytes_before)} -> {_mib(self.bytes_after)} MiB "
            f"({self.bytes_after / max(self.bytes_before, 1):.2f}x) in {self.seconds:.1f} s"
        ]
        for name, rows in self._grouped():
            row, count = rows[0], len(rows)
            decibels = min((each.error_db for each in rows if each.error_db is not None), default=None)
            act = " x " + ", then ".join((row.act, *row.late)) if row.act else ""
            rank = f" + rank {row.rank}" if row.rank else ""
            parts = [f"  {name}" + (f" ({count} layers)" if count > 1 else ""), f"{row.weight or 'kept'}{act}{rank}"]
            later = "".join(f"; then {kernel}" for kernel in row.late_kernels)
            parts += [f"{row.backend}: {with_speed(row.kernel, rows)}{later}"] if row.kernel else []
            parts += [f"{decibels:.1f} dB"] if decibels is not None else []
            parts += [row.reason] if row.reason else []
            parts += [f"not {backend}: {reason}" for backend, reason in row.why_not]
            lines.append(" | ".join(parts))
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _grouped(self) -> Iterator[tuple[str, list[Row]]]:
        """Rows alike but for block numbers, as one: (name with [first-last], rows)."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.layers:
            shape = re.sub(r"\d+", "#", row.name)
            act, kernels = (row.act, row.late), (row.backend, row.kernel, row.late_kernels)
            groups.setdefault((shape, row.weight, act, row.rank, kernels, row.reason), []).append(row)
        for rows in groups.values():
            yield _span([row.name for row in rows]), rows


def with_speed(kernel: str, rows: Sequence[Row]) -> str:
    """A kernel's name, and how fast it is where it was measured: "int8 x int8, 1.7-1.9x full precision"."""
    found = sorted(row.speedup for row in rows if row.speedup is not None)
    span = dict.fromkeys(f"{speedup:.1f}" for speedup in (*found[:1], *found[-1:]))
    return f"{kernel}, {'-'.join(span)}x full precision" if found else kernel


def _span(names: list[str]) -> str:
    """`blocks.0.to_q`, `blocks.1.to_q` -> `blocks.[0-1].to_q`."""
    if len(names) == 1:
        return names[0]
    numbers = [re.findall(r"\d+", name) for name in names]
    spans = []
    for column in zip(*numbers, strict=True):
        low, high = min(column, key=int), max(column, key=int)
        spans.append(low if low == high else f"[{low}-{high}]")
    parts = re.split(r"\d+", names[0])
    return "".join(part + span for part, span in zip(parts, [*spans, ""], strict=True))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
