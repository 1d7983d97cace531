"""Contenders timed in turn, each lane of them in a process: `dq bench --peers`, `eval.experiments.speed --peers`.

A round asks every lane in order for one turn of its base, which is full precision, and of each of its contenders (a,
b, c, a, b, c, ...), so that a machine that slows down slows all of them; only one process computes at a time. A
contender's figure is the median of its calls over the median of its own lane's base.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dq.bench import levels, peers, widths
from dq.bench.peers import BASE, REST, Contender
from dq.bench.roofline import Line, Peaks

SHAPES = ((256, 1152, 1152), (1024, 1152, 4608), (4096, 1152, 1152), (1024, 3072, 3072))  # rows, inputs, outputs
LINEARS = tuple(f"linear {rows} x {inputs} -> {outputs}" for rows, inputs, outputs in SHAPES)
MODELS = ("linears", "pixart", "flux", "unet")
TURN_MS = 40.0  # least time of a turn of a single layer; a model's turn is one call
PREPARING = 2  # lanes that quantize and compile at once


class LaneLost(RuntimeError):
    """The process of a lane died or took too long."""


@dataclass(frozen=True)
class Setting:
    """seconds: of a model's rounds. rounds: the least of them. patience: seconds until a contender must be ready.

    folder: where the peers are installed when not beside dq. say: called with a line of progress. dtype: of the models
    and of full precision, "bf16" or "fp32". level: of `levels` that the processes are limited to, "" for none.
    """

    seconds: float = 30.0
    rounds: int = 5
    threads: int = 2
    patience: float = 400.0
    folder: str = ""
    say: Callable[[str], None] = print
    dtype: str = BASE
    level: str = ""


@dataclass
class Result:
    """One contender on one model. ms, base_ms: medians of calls. skipped: why there are none.

    base: what it is compared with, full precision in that dtype. level: what `levels.shown` says of its process.
    """

    model: str
    contender: str
    kernel: str = ""
    ms: float = 0.0
    base_ms: float = 0.0
    calls: int = 0
    error_db: float | None = None
    ready_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    base: str = BASE
    level: str = ""

    @property
    def times_base(self) -> float:
        """The base's time over this one: above 1 is faster."""
        return self.base_ms / self.ms if self.ms else 0.0


class Lane:
    """A process with a `peers.Contestant`, asked by pickled messages. LaneLost when it dies or is silent too long."""

    def __init__(self, environment: dict[str, str], setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.log = tempfile.NamedTemporaryFile("r", errors="replace")
        arguments = (theirs, setting.threads, setting.folder, self.log.name)
        self.process = context.Process(target=peers.serve, args=arguments)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), setting.folder)))
        given = {"OMP_NUM_THREADS": str(setting.threads), **environment}
        given |= levels.environment(setting.level) | ({"PYTHONPATH": path} if path else {})
        with _environment(given):
            self.process.start()
        theirs.close()

    def ask(self, order: str, *arguments, patience: float | None = None):
        """The result of a method of the lane's Runner."""
        try:
            self.connection.send((order, arguments))
            if not self.connection.poll(patience):
                raise LaneLost(f"not done after {patience:.0f} s")
            state, result = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            said = [line for line in self.log.read().splitlines() if line.strip()]
            last = f", saying last: {said[-1][:200]}" if said else ""
            raise LaneLost(f"its process ended with {self.process.exitcode}{last}") from error
        if state == "failed":
            raise LaneLost(result)
        return result

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.log.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@dataclass(frozen=True)
class Race:
    """What was measured on one model: a row per contender (the base first), roofline lines of dq's int8, peaks."""

    model: str
    results: list[Result]
    lines: list[Line]
    peaks: Peaks | None


def models(names: Sequence[str]) -> list[str]:
    """`linears` is one model per shape. DQError for an unknown name."""
    found = [each for name in names for each in (LINEARS if name == "linears" else (name,))]
    for name in found:
        if not widths.LINEAR.fullmatch(name):
            widths.width(name)
    return found


def contenders(names: Sequence[str], without: Sequence[str] = ()) -> list[Contender]:
    """Contenders by name, the usual ones without names. DQError for an unknown name."""
    left_out = {peers.get(name).name for name in without}
    chosen = [peers.get(name) for name in names] or [each for each in peers.CONTENDERS if each.usual]
    return [each for each in chosen if each.name not in left_out]


def race(
    entries: Iterable[tuple[str, Sequence[Contender]]], setting: Setting, start: Callable = Lane
) -> Iterator[Race]:
    """Measure models, each with those of its contenders that fit it; lanes stay for all of them.

    start  makes a lane from the environment of its process and the setting
    """
    lanes: dict[str, Lane] = {}
    try:
        for name, entered in entries:
            fitting = [each for each in entered if each.fits(name, setting.dtype)]
            if fitting:
                yield _measure(name, fitting, lanes, setting, start)
            else:
                setting.say(f"{name}: none of the contenders is for it")
    finally:
        for lane in lanes.values():
            lane.close()


def _measure(name: str, entered: list[Contender], lanes: dict, setting: Setting, start: Callable) -> Race:
    grouped: dict[str, list[Contender]] = {}
    for each in entered:
        grouped.setdefault(each.lane, []).append(each)
    for lane, members in grouped.items():
        if lane not in lanes:
            lanes[lane] = start({key: value for each in members for key, value in each.environment.items()}, setting)
    results: dict[tuple[str, str], Result] = {}
    with ThreadPoolExecutor(PREPARING) as pool:
        jobs = [pool.submit(_prepare, name, lane, grouped[lane], lanes, setting) for lane in grouped]
        for job in jobs:
            results |= job.result()
    _fill(results, _turns(name, lanes, results, setting))
    lines, peaks = _roofline(lanes.get("dq"), setting)
    for lane in lanes.values():
        with contextlib.suppress(LaneLost):
            lane.ask("drop")
    bases = [found for (_, key), found in results.items() if key == setting.dtype and found.ms]
    others = [found for (_, key), found in results.items() if key != setting.dtype]
    return Race(name, bases[:1] + others, lines, peaks)


def _prepare(name: str, lane: str, members: list[Contender], lanes: dict, setting: Setting) -> dict:
    """Load a model in a lane and make its contenders ready. -> results without times, the base's first."""
    base = setting.dtype
    results = {(lane, key): Result(name, key, base=base) for key in (base, *(each.name for each in members))}
    try:
        loaded = lanes[lane].ask("load", name, base, patience=setting.patience)
        results[lane, base].kernel = loaded["kernel"]
        for found in results.values():
            found.level = loaded["level"]
        for each in members:
            found, mine = lanes[lane].ask("ready", each, patience=setting.patience), results[lane, each.name]
            mine.skipped = found.get("skipped", "")
            if not mine.skipped:
                mine.kernel = found["kernel"]
                mine.error_db = found["error_db"]
                mine.versions = found["versions"]
                mine.ready_seconds = found["seconds"]
            setting.say(f"{name}: {each.name} " + (mine.skipped or f"is ready after {mine.ready_seconds} s"))
    except LaneLost as lost:
        _lose(lane, lost, lanes, results, setting)
    return results


def _turns(name: str, lanes: dict, results: dict, setting: Setting) -> dict:
    """Milliseconds by (lane, contender): rounds of turns until the time is over. Lanes without contenders sit out."""
    times = {place: [] for place, found in results.items() if not found.skipped}
    counts = Counter(lane for lane, _ in times)
    racing = {lane: [key for home, key in times if home == lane] for lane in counts if counts[lane] > 1}
    least = TURN_MS if widths.LINEAR.fullmatch(name) else 0.0
    until, rounds = time.perf_counter() + setting.seconds, 0
    while racing and (time.perf_counter() < until or rounds < setting.rounds):
        for lane in list(racing):
            try:
                for key in racing[lane]:
                    times[lane, key] += lanes[lane].ask("turn", key, least, patience=setting.patience)
            except LaneLost as lost:
                _lose(lane, lost, lanes, results, setting)
                del racing[lane]
            time.sleep(REST)
        rounds += 1
        if rounds in (1, setting.rounds):
            setting.say(f"{name}: round {rounds} is done")
    return times


def _lose(lane: str, lost: LaneLost, lanes: dict, results: dict, setting: Setting) -> None:
    """A lane that died: its contenders say why, and the next model gets a new process."""
    for (home, key), found in results.items():
        if home == lane and not found.skipped:
            found.skipped = str(lost)
            setting.say(f"{found.model}: {key}: {lost}")
    lanes.pop(lane).close()


def _fill(results: dict, times: dict) -> None:
    for (lane, key), spent in times.items():
        found = results[lane, key]
        if spent and times[lane, found.base] and not found.skipped:
            found.ms, found.calls = statistics.median(spent), len(spent)
            found.base_ms = statistics.median(times[lane, found.base])


def _roofline(lane: Lane | None, setting: Setting) -> tuple[list[Line], Peaks | None]:
    """Lines of dq's int8 model, and the peaks of its process; nothing when dq does not take part."""
    if lane is None:
        return [], None
    try:
        lines = lane.ask("lines", patience=setting.patience)
        units = tuple(dict.fromkeys(["int8", "bf16", *(line.work.unit for line in lines)]))
        return lines, lane.ask("peaks", units, patience=setting.patience).raised(lines)
    except LaneLost as lost:
        setting.say(f"no roofline: {lost}")
        return [], None


@dataclass(frozen=True)
class Memory:
    """Most memory a process held that loaded a model and ran one step, and before it loaded anything."""

    model: str
    contender: str
    kernel: str
    peak_bytes: int
    before_bytes: int
    weight_bytes: int  # of the bf16 model


MEMORY = (("bf16", None, None), ("dq-w4a8, saved", peers.W4A8, None), ("dq-w4a8, while loading", None, peers.W4A8))


def memory(name: str, setting: Setting, start: Callable = Lane) -> Iterator[Memory]:
    """Peaks of bf16, of a saved W4A8 model and of W4A8 made while loading, each in a process of its own.

    MEMORY has (name, recipe it is saved with, recipe it is loaded with). start: as for `race`
    """
    with tempfile.TemporaryDirectory() as place:
        saved: dict[str, int] = {}
        for contender, before, recipe in MEMORY:
            folder = f"{place}/{before.name if before else BASE}"
            if folder not in saved:
                saved[folder] = _alone(start, setting, "save", name, folder, before)
            found = _alone(start, setting, "peak", name, folder, recipe)
            yield Memory(name, contender, weight_bytes=saved[folder], **found)


def _alone(start: Callable, setting: Setting, *order):
    """The answer of a process that is started for this one question."""
    lane = start({}, setting)
    try:
        return lane.ask(*order, patience=setting.patience)
    finally:
        lane.close()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Variables that a process started in the block inherits."""
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
