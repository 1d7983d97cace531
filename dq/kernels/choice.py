"""The fastest right backend of a layer, by what was measured on the machine at hand.

Backends whose `why_not` accepts a layer prove themselves on a small problem (`proof`), then take turns with each other
and with the full-precision layer on the layer's own tensors. Both happen once for a machine (`times`): verdicts for a
backend, formats and dtype, milliseconds for a layer's formats, sizes, dtype and class of rows. A backend preferred by
rank keeps a layer unless another is more than 5 % faster.

Nothing is measured while a call is traced, captured, transformed or differentiated, on tensors without data, or for a
machine that is not there; such calls use what is known, else ranks. A process measures for SECONDS_IN_ALL at first,
then for a share of its time. DQ_CHOICE=static leaves everything to ranks, so that every machine chooses the same.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from dq import kernels, timing
from dq.errors import DQError, nearest
from dq.kernels import Choice, Conv, Tensors, proof, reference, times
from dq.plan import LayerPlan

VARIABLE, MODES = "DQ_CHOICE", ("measured", "static")
ENDS = (16, 128, 1024)  # most rows (pixels) of a class; the last class has no end
TYPICAL = (8, 64, 512, 2048)  # rows of a class that are timed, fewer where a layer is so large that one call is long:
MOST_MACS = 2**30  # of a timed call on one thread of a processor ...
LEAST_ROWS = 128  # ... but as many rows, below which the time says nothing about many
MARGIN = 1.05
SECONDS = 0.12  # of taking turns for one problem
FIRST_ROUNDS, MOST_ROUNDS = 5, 25
SECONDS_IN_ALL, SHARE = 10.0, 0.05
FULL = "full"  # the full-precision layer among backends

_measuring = threading.RLock()
_began, _spent = time.monotonic(), 0.0


@dataclass(frozen=True)
class Problem:
    """A layer and the inputs that it is asked to run.

    klass  class of rows, of inputs or of pixels: an index of TYPICAL
    """

    op: str
    plan: LayerPlan
    conv: Conv | None
    device: torch.device
    dtype: torch.dtype
    klass: int

    @cached_property
    def rows(self) -> int:
        """Rows that are timed."""
        wanted = TYPICAL[self.klass]
        if self.device.type != "cpu":
            return wanted
        most = MOST_MACS * torch.get_num_threads() // (self.plan.rows * self.plan.columns)
        return min(wanted, max(most, LEAST_ROWS))

    @cached_property
    def formats(self) -> str:
        """What a backend's verdict is about."""
        plan, conv = self.plan, self.conv
        sizes = plan.rows % 16, [(b - a) % proof.UNIT for a, b in plan.parts], min(plan.rank, proof.MOST_RANK)
        geometry = None if conv is None else (plan.shape[2:], *conv[:3], min(conv.groups, 4))
        return f"{self.op} {plan.weight} x {plan.act}, sizes {sizes}, {geometry}, {self.dtype}"

    @cached_property
    def key(self) -> str:
        """What milliseconds are about."""
        plan = self.plan
        made = f"{self.op} {plan.weight} x {plan.act}, {plan.shape} split {plan.splits} rank {plan.rank}"
        geometry = None if self.conv is None else tuple(self.conv)
        return f"{made}, {geometry}, {self.dtype}, {self.rows} rows"


def mode() -> str:
    """ "measured" or "static", by the environment. DQError for another value."""
    asked = os.environ.get(VARIABLE) or MODES[0]
    if asked not in MODES:
        raise DQError(f"{VARIABLE} is {asked!r}, {nearest(asked, MODES)}")
    return asked


def klass_of(x: torch.Tensor, op: str) -> int:
    """Class of the rows of x (..., in), or of the pixels of x (batch, in, *space). Plain code that can be traced."""
    rows = x.numel() // max(1, x.shape[1 if op == "conv" else -1])
    return 3 if rows > ENDS[2] else 2 if rows > ENDS[1] else 1 if rows > ENDS[0] else 0


def typical_klass(plan: LayerPlan) -> int:
    """Class of the rows that a layer sees in a typical call."""
    return 0 if plan.role == "time" else 2


def may_measure(x: torch.Tensor) -> bool:
    """Whether a call with x is an ordinary one, beside which something may be measured."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or functorch.peek_interpreter_stack() is not None:
        return False
    return kernels.machine() is None and not captured(x)


def captured(x: torch.Tensor) -> bool:
    """Whether a call with x goes into a graph of its card, which from then on reads tensors where they lie."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_known(problem: Problem, backend: str | None = None) -> bool:
    """Whether the problem was measured before, and measurements decide."""
    return measures(problem.device.type, backend) and problem.key in times.table(problem.device).ms


def known(problem: Problem, backend: str | None = None) -> Choice:
    """The best choice by what was measured before, else by rank; measures nothing. backend: as of `kernels.choose`."""
    return _chosen(problem, backend, None)


def meet(problem: Problem, tensors: Tensors, backend: str | None = None) -> Choice:
    """The best choice; measures what was not measured before, on the layer's own tensors."""
    if not measures(problem.device.type, backend):
        return _chosen(problem, backend, None)
    with _measuring, _plain(problem.device):
        return _chosen(problem, backend, tensors)


def measures(device: str, backend: str | None = None) -> bool:
    """Whether measurements decide there: backends that the user named, and ranks, need none."""
    if kernels.machine() is not None or device == "meta" or (device == "cuda" and not torch.cuda.is_available()):
        return False
    return mode() == "measured" and (backend or kernels.selected()) == "auto"


def allowance() -> float:
    """Seconds that this process may still measure."""
    return SECONDS_IN_ALL + SHARE * (time.monotonic() - _began) - _spent


def _chosen(problem: Problem, backend: str | None, tensors: Tensors | None) -> Choice:
    """Asks for verdicts and times that are missing where there are tensors to measure with."""
    with kernels.current(problem.device):
        return _chosen_there(problem, backend, tensors)


def _chosen_there(problem: Problem, backend: str | None, tensors: Tensors | None) -> Choice:
    op, plan, conv, device = problem.op, problem.plan, problem.conv, problem.device
    said = kernels.asked(op, plan, device.type, conv, backend)
    emulating = {name for name in said if kernels.emulates(name, op, plan)}
    if not measures(device.type, backend):
        return kernels.built(*_decide(said, {}, {}, emulating), op, plan, conv)
    table, unmeasured = times.table(device), ""
    able = [name for name, reason in said.items() if reason is None and name != "reference"]
    if tensors is not None:
        unmeasured = _fill(problem, tensors, able, table)
    wrong = {name: reason for name, reason in _verdicts(problem, table).items() if reason and name in able}
    ms = table.ms.get(problem.key, {})
    name, refusals = _decide(said, wrong, ms, emulating)
    found = kernels.built(name, refusals, op, plan, conv)
    return replace(found, ms=ms.get(name), full_ms=ms.get(FULL), unmeasured=unmeasured)


def _verdicts(problem: Problem, table: times.Table) -> dict[str, str]:
    """By backend, on the problem's formats and on its sizes."""
    return {**table.verdicts.get(problem.formats, {}), **table.verdicts.get(problem.key, {})}


def _decide(
    said: Mapping[str, str | None], wrong: Mapping[str, str], ms: Mapping[str, float], emulating: Set[str]
) -> tuple[str, kernels.Refusals]:
    """The backend, why each one preferred to it does not serve, and all that are wrong.

    One that emulates serves only where no other does: its arithmetic is not the plan's.
    """
    able = [name for name, reason in said.items() if reason is None and name not in wrong]
    right, able = able, [name for name in able if name not in emulating] or able
    best = min((ms[name] for name in able if name in ms), default=0.0)
    name = next((name for name in able if name in ms and ms[name] <= MARGIN * best), able[0])
    preferred = list(said)[: list(said).index(name)]
    reasons = {other: reason for other, reason in said.items() if reason and other in preferred}
    timed = {other: ms[other] for other in preferred if other in right and other in ms and name in ms}
    reasons |= {
        other: f"slower here: {took:.3g} ms where {name} takes {ms[name]:.3g}"
        if took > ms[name] or other not in emulating
        else f"it emulates what {name} multiplies"
        for other, took in timed.items()
    }
    reasons |= wrong
    return name, tuple((other, reasons[other]) for other in said if other in reasons)


def _fill(problem: Problem, tensors: Tensors, able: list[str], table: times.Table) -> str:
    """Judge and time what the table lacks; -> why not, "" where it lacks nothing now."""
    new = [name for name in able if name not in table.verdicts.get(problem.formats, {})]
    bad = {name for name, reason in _verdicts(problem, table).items() if reason}
    ms = table.ms.get(problem.key, {})
    if not new and all(name in ms for name in (*able, FULL) if name not in bad):
        return ""
    if allowance() <= 0:
        return f"{_spent:.0f} s of measuring are spent"
    with _accounted():
        x = torch.empty(0, dtype=problem.dtype, device=problem.device)
        found = {name: proof.why_wrong(name, problem.op, problem.plan, problem.conv, x) or "" for name in new}
        if found:
            table.judge(problem.formats, found)
        right = [name for name in able if name not in bad and not found.get(name)]
        _time(problem, tensors, right, table)
    return ""


def _time(problem: Problem, tensors: Tensors, names: list[str], table: times.Table) -> None:
    """Time backends beside the full-precision layer; what fails at this size is refused for it."""
    x = inputs(problem)
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        run = kernels.backends()[name].build(problem.op, problem.plan, problem.conv)
        try:
            given = kernels.laid(name, tensors)
            run(x, given)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            table.judge(problem.key, {name: proof.failed(error)})
        else:
            runs[name] = lambda run=run, given=given: run(x, given)
    runs[FULL] = _full(problem, x)
    table.add(problem.key, clocked(runs))


def clocked(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each; what takes more than twice as long as the fastest gets few calls."""
    first = {name: min(found) for name, found in timing.in_turn(runs, SECONDS / 10, 2, FIRST_ROUNDS).items()}
    best = min(ms for name, ms in first.items() if name != FULL or len(first) == 1)
    near = {name: run for name, run in runs.items() if first[name] <= 2 * best}
    again = timing.in_turn(near, SECONDS, 3, MOST_ROUNDS)
    return first | {name: statistics.median(found) for name, found in again.items()}


def inputs(problem: Problem) -> torch.Tensor:
    """Random x of the problem's rows: (rows, in), or (1, in, *space) with about as many pixels."""
    plan, conv, dice = problem.plan, problem.conv, torch.Generator(problem.device).manual_seed(0)
    if conv is None:
        shape: tuple[int, ...] = (problem.rows, plan.shape[1])
    else:
        side = max(1, round(problem.rows ** (1 / len(plan.shape[2:]))))
        space = [max(side, gap * (taps - 1) + 1) for taps, gap in zip(plan.shape[2:], conv.dilation, strict=True)]
        shape = (1, plan.shape[1] * conv.groups, *space)
    return torch.randn(shape, generator=dice, device=problem.device).to(problem.dtype)


def _full(problem: Problem, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A full-precision layer of the problem's sizes: its time depends on them alone."""
    weight = torch.full(problem.plan.shape, 0.01, dtype=x.dtype, device=x.device)
    bias = weight.new_zeros(problem.plan.shape[0])
    if problem.conv is None:
        return lambda: F.linear(x, weight, bias)
    run, geometry = reference.CONVS[len(problem.plan.shape) - 2], problem.conv
    return lambda: run(x, weight, bias, *geometry)


def full_ms(problem: Problem, dtype: torch.dtype) -> float | None:
    """Milliseconds of the problem's full-precision layer in another dtype; None where they may not be measured."""
    asked, table = replace(problem, dtype=dtype), times.table(problem.device)
    key = f"{FULL} {asked.key}"
    with _measuring, _plain(problem.device):
        if (key, FULL) not in table:
            if allowance() <= 0:
                return None
            with _accounted():
                table.add(key, clocked({FULL: _full(asked, inputs(asked))}))
        return table[key, FULL]


@contextmanager
def _accounted() -> Iterator[None]:
    global _spent
    start = time.monotonic()
    try:
        yield
    finally:
        _spent += time.monotonic() - start


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and nobody's function mode around what is measured."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch._C.DisableTorchFunction():
        with kernels.current(device):
            yield
