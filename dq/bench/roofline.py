"""How near a kernel comes to what the machine can do: its time beside its bytes and operations.

    bound = max(bytes / bandwidth, operations / rate),   share = bound / time

(S. Williams, A. Waterman and D. Patterson, Roofline, CACM 2009.) Bytes are those that have to move once: inputs,
weights and outputs, each read or written a single time; whatever a kernel moves beyond them counts against it. An
operation is a multiplication or an addition. Peaks are measured where and when the kernels are, as the best of several
large shapes, and raised to what a kernel of the same run reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dq.formats.integer import Integer
from dq.plan import LayerPlan

PRODUCTS = ((2048, 2048, 2048), (1024, 4096, 4096), (4096, 4096, 1024))  # rows, inputs, outputs
STREAM = 1 << 26  # bytes of each array of the bandwidth test, above any cache
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Work:
    """What a call has to do. unit: the matrix unit that does it, "int8", "fp8", "bf16", "fp16" or "fp32"."""

    moved_bytes: int
    operations: int
    unit: str

    def __add__(self, other: Work) -> Work:
        return replace(
            self, moved_bytes=self.moved_bytes + other.moved_bytes, operations=self.operations + other.operations
        )


@dataclass(frozen=True)
class Line:
    """One kernel: calls and time of one pass, and the work of all these calls."""

    kernel: str
    calls: int
    ms: float
    work: Work


@dataclass(frozen=True)
class Peaks:
    """rates: operations a second by unit. bandwidth: bytes a second."""

    rates: Mapping[str, float]
    bandwidth: float

    def bound_ms(self, work: Work) -> float:
        """The least milliseconds the work can take; a unit that was not measured does not bound it."""
        rate = self.rates.get(work.unit)
        return 1000 * max(work.moved_bytes / self.bandwidth, work.operations / rate if rate else 0.0)

    def share(self, line: Line) -> float:
        """Share of the peak that a line reached; above 1 only where what it moves is in a cache already."""
        return self.bound_ms(line.work) / line.ms

    def raised(self, lines: Iterable[Line]) -> Peaks:
        """Rates that no line exceeds: a kernel that beats the measured peak is the peak."""
        rates = dict(self.rates)
        for line in lines:
            if line.work.unit in rates:
                rates[line.work.unit] = max(rates[line.work.unit], 1000 * line.work.operations / line.ms)
        return replace(self, rates=rates)

    def __str__(self) -> str:
        rates = ", ".join(f"{unit} {rate / 1e12:.2f} T operations/s" for unit, rate in self.rates.items())
        return f"peaks measured now: {rates}, memory {self.bandwidth / 1e9:.0f} GB/s"


def linear(plan: LayerPlan, rows: int, unit: str, width: int = 2, bias: bool = True) -> Work:
    """x (rows, inputs) -> (rows, outputs). width: bytes of an activation."""
    outputs, columns = plan.rows, plan.columns
    moved = width * rows * (columns + outputs) + plan.packed_bytes + width * outputs * bias
    return Work(moved, 2 * rows * (columns * outputs + plan.rank * (columns + outputs)), unit)


def convolution(plan: LayerPlan, x: torch.Size, y: torch.Size, unit: str, width: int = 2, bias: bool = True) -> Work:
    """x (batch, in, *space) -> y (batch, out, *space), one product of `columns` numbers for each number of y."""
    moved = width * (x.numel() + y.numel()) + plan.packed_bytes + width * plan.rows * bias
    pixels = y.numel() // plan.rows
    return Work(moved, 2 * pixels * (plan.columns * plan.rows + plan.rank * (plan.columns + plan.rows)), unit)


def attention(batch: int, heads: int, queries: int, keys: int, size: int, unit: str, width: int = 2) -> Work:
    """softmax(q k^T) v with heads of `size` numbers: two products, scores never in memory."""
    moved = width * batch * heads * size * 2 * (queries + keys)
    return Work(moved, 4 * batch * heads * queries * keys * size, unit)


def dense(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Work:
    """A linear in full precision, bias included."""
    width = dtype.itemsize
    moved = width * (rows * (inputs + outputs) + (inputs + 1) * outputs)
    return Work(moved, 2 * rows * inputs * outputs, NAMES.get(dtype, str(dtype)))


def unit_of(plan: LayerPlan, emulated: bool, dtype: torch.dtype) -> str:
    """The matrix unit a packed layer's kernel runs on, by its plan and whether activations are only emulated."""
    if plan.act is None or emulated:
        return NAMES.get(dtype, str(dtype))
    return "int8" if isinstance(plan.act.spec, Integer) else plan.act.format


def measure(device: str, units: Iterable[str], rounds: int = 4) -> Peaks:
    """Peaks of a device: for each unit the best rate over PRODUCTS and rounds, and the best of a copy and a sum."""
    rates = {}
    for unit in dict.fromkeys(units):
        found = [_rate(unit, shape, device, rounds) for shape in PRODUCTS if unit in ("int8", *DTYPES)]
        if found:
            rates[unit] = max(found)
    return Peaks(rates, _bandwidth(device, rounds))


def _rate(unit: str, shape: tuple[int, int, int], device: str, rounds: int) -> float:
    rows, inputs, outputs = shape
    if unit == "int8":
        x, w = (torch.randint(-127, 128, (n, inputs), dtype=torch.int8, device=device) for n in (rows, outputs))
        seconds = _best(lambda: torch._int_mm(x, w.t()), device, rounds)
    else:
        x, w = (torch.randn(n, inputs, device=device).to(DTYPES[unit]) for n in (rows, outputs))
        seconds = _best(lambda: F.linear(x, w), device, rounds)
    return 2 * rows * inputs * outputs / seconds


def _bandwidth(device: str, rounds: int) -> float:
    a, b, c = (torch.ones(STREAM // 4, device=device) for _ in range(3))
    copied = 2 * STREAM / _best(lambda: b.copy_(a), device, rounds)
    return max(copied, 3 * STREAM / _best(lambda: torch.add(a, b, out=c), device, rounds))


@torch.no_grad()
def _best(call: Callable[[], object], device: str, rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls, after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
