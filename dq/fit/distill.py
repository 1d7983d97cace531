"""Tuning: all quantized layers of a denoiser learn at once to answer as the full-precision one did in whole runs.

    minimise  sum_pairs |e|^2 / mean |y|^2,    e = ŷ(x_t, t, c) - y(x_t, t, c)

x_t, t, c, y (any shape): calls of the pipeline's own full-precision runs and their answers (dq/trace/pairs.py). With
loss "guided", where a call holds both halves of guidance, e is what guidance makes of the two errors, e_u + g (e_c -
e_u). That leaves errors free which cancel there: on tiny-pixart the guided error fell by 2.7 dB, each half's rose by 9
to 12 dB and pictures lost 1.7 dB. The student is the model itself with every quantized layer's forward replaced
(dq/fit/trainable.py): nothing but what packed layers hold is trained, so that bytes, formats and kernels stay.

Adam with cosine decay; rates are shares of a tensor's own size, so that they suit every layer. How many updates there
are is decided once, from the time of the first ones, and kept with the state: a tuning that was killed goes on with
the same updates on the same pairs, to the same bytes. Whole runs are held out; the state that errs least on them is
kept, the untuned one among them, and the packed layers themselves have the last word.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from dq.fit import auxiliary, course, room
from dq.fit.course import TIMED
from dq.fit.student import Student, Subject, share, within
from dq.fit.tune import Tune
from dq.kernels.dense import HAS_BF16
from dq.trace import pairs
from dq.trace.pairs import Pair
from dq.trace.records import Store
from dq.trace.world import processes

SHARES = {"weights": 1.0, "lowrank": 0.3, "scales": 0.05, "branch": 0.1, "bias": 0.1, "smooth": 0.05, "act": 0.05}
SHARES["aux"] = SHARES["branch"]
BETAS = (0.9, 0.99)
JUDGED, MOST_HELD = 8, 48  # how often the held-out pairs are asked, and how many of them
LOUD = 3e-4  # error as a share of the power, beside which the rounding of bf16 products is nothing
SAVED_S = 60.0  # between states on disk
STATE = "tune/state"


@dataclass
class Outcome:
    """What a tuning gave.

    packed    layers by name, tuned or as they were; changed: names of the tuned ones
    before, after  error on the held-out pairs as a share of the answers' power, of the packed layers
    updates   done, of `total`, on `learned` pairs
    losses    mean loss of each eighth, in units of the error before
    norms     mean norm of the gradient of each eighth, of what packed layers hold, in units of their rates
    """

    packed: dict[str, nn.Module]
    changed: tuple[str, ...]
    before: float
    after: float
    updates: int
    total: int
    seconds: float
    learned: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    ended: str = ""

    def figures(self) -> dict[str, float]:
        found = {"before_db": _decibels(self.before), "after_db": _decibels(self.after)}
        return found | {"updates": self.updates, "seconds": self.seconds}

    def note(self) -> str:
        """A line for the report."""
        gained = f"held-out prediction {_decibels(self.before):.2f} -> {_decibels(self.after):.2f} dB"
        kept = "" if self.after < self.before else "; no state was better, layers are as the recipe left them"
        what = f"tuned in {self.seconds:.0f} s, {self.updates} updates on {self.learned} calls"
        norms = " ".join(f"{each / self.norms[0]:.2f}" for each in self.norms if self.norms[0])
        curve = norms and f"; gradient norm by eighths, of the first: {norms}"
        return f"{what}: {gained}{kept}{self.ended and f'; {self.ended}'}{curve}"


def _eighths(values: list[float]) -> list[float]:
    """The mean of each eighth."""
    size = max(1, len(values) // 8)
    return [sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])]


def _decibels(share: float) -> float:
    return -10 * math.log10(max(share, 1e-20))


def tune(
    subject: Subject, store: Store, wish: Tune, seed: int = 0, progress: bool = True, seconds: float | None = None
) -> tuple[Outcome, str]:
    """Tune one denoiser on the pairs in `store`, where the state is kept as well. -> outcome, note for the report.

    seconds  left of the wish's minutes; None: all of them
    The model and the packed layers given are not changed. Raises DQError when nothing can be trained, and, before
    anything is, when memory will not do.
    """
    device = next(value.device for value in subject.model.parameters())
    keys, held = pairs.divided(store, wish.held)
    held = _some(held, seed)
    student = Student(subject, wish)
    first = pairs.read(store, keys[0], device)
    said = room.check(student, wish, first, device)
    work = _Work(subject, student, store, wish, seed, keys, held, device)
    return work.run(progress, 60 * wish.minutes if seconds is None else seconds), said


def _some(keys: list[str], seed: int) -> list[str]:
    """At most MOST_HELD keys, drawn: every so many of a run would meet the same steps in all runs."""
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    return [keys[i] for i in sorted(order[:MOST_HELD])]


def _short(wish: Tune, device: torch.device, error: float) -> bool:
    """Whether products are in bf16: where the machine multiplies it faster and its own noise is far below `error`."""
    if wish.precision != "auto":
        return wish.precision == "bf16"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and HAS_BF16
    return fast and error > LOUD


class _Work:
    """The updates of one tuning, and its state."""

    def __init__(self, subject, student: Student, store: Store, wish: Tune, seed: int, keys, held, device):
        self.subject, self.student, self.store, self.wish, self.seed = subject, student, store, wish, seed
        self.keys, self.held, self.device, self.world = keys, held, device, processes()
        self.guidance = subject.guidance if wish.loss == "guided" else None
        groups = student.groups
        self.values = [value for _, _, value, _ in groups]
        self.owners = [(name, part, size) for name, part, _, size in groups]
        self.helps = [layer.weight.help for layer in student.layers.values() if layer.weight.help is not None]
        alike: dict[tuple[str, float], list[nn.Parameter]] = {}  # sizes as powers of two, so that groups are few
        for _, part, value, size in groups:
            if not size:
                continue  # it moves in jumps
            alike.setdefault((part, 2.0 ** round(math.log2(size))), []).append(value)
        self.sizes = list(alike)
        grouped = [{"params": values, "lr": 0.0} for values in alike.values()]
        self.adam = torch.optim.Adam(grouped, betas=BETAS, eps=1e-16, fused=True)
        self.update, self.total, self.seconds, self.phase = 0, wish.updates or 0, 0.0, 0
        self.best: list[torch.Tensor] | None = None
        self.least = self.before = math.inf
        self.losses: list[float] = []
        self.norms: list[float] = []

    def run(self, progress: bool, limit: float) -> Outcome:
        self._resume()
        with self.student.running():
            if not math.isfinite(self.before):
                self.before = self.least = self._judge()
            self.short = _short(self.wish, self.device, self.before)
            ended = self._train(progress, limit)
        packed, after = self._packed()
        better = after < self.before
        changed = tuple(n for n, each in self.student.layers.items() if each.parameters) if better else ()
        eighths = _eighths(self.losses), _eighths(self.norms)
        made = (self.update, self.total, self.seconds, len(self.keys), *eighths, ended)
        outcome = Outcome(packed, changed, self.before, after, *made)
        self._save()
        return outcome

    def _train(self, progress: bool, limit: float) -> str:
        """Update after update; -> why it ended early, "" if it did not."""
        saved = time.perf_counter()
        bar = tqdm(total=self.total or None, initial=self.update, desc="tune", disable=not progress, delay=2)
        with bar:
            while not self.total or self.update < self.total:
                if self.wish.stop is not None and self.wish.stop():
                    self._end()
                    return f"stopped by the caller after {self.update} updates"
                begun = time.perf_counter()
                where = self._step()
                if where:
                    return f"stopped at update {self.update}: the loss is not a number at {where}"
                self.update += 1
                self.seconds += time.perf_counter() - begun
                self._plan(limit, bar)
                if self.total and self._is_judged():
                    begun = time.perf_counter()
                    self._end()
                    self.seconds += time.perf_counter() - begun
                if time.perf_counter() - saved > SAVED_S:
                    self._save()
                    saved = time.perf_counter()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", best=f"{_decibels(self.least):.2f} dB", refresh=False)
                bar.update()
                alone = self.world.num_processes == 1  # others would wait for the one that ended
                if alone and self.wish.updates is None and self.total and self.seconds > 1.2 * limit:
                    self._end()
                    return f"the time was over after {self.update} of {self.total} updates"
        return ""

    def _is_judged(self) -> bool:
        every = max(1, self.total // JUDGED)
        return self.update == self.total or (self.update % every == 0 and self.total - self.update >= every // 2)

    def _plan(self, limit: float, bar) -> None:
        """Decide how many updates there are, once a few were timed: what the minutes hold, judging included."""
        if self.total or self.update < TIMED:
            return
        each = self.seconds / self.update
        judging = (JUDGED + 2) * len(self.held) / (3 * self.wish.batch) * each
        self.total = max(self.update + 1, int((limit - self.seconds - judging) / each))
        if self.world.num_processes > 1:
            count = torch.tensor(self.total, device=self.device)
            torch.distributed.broadcast(count, 0)
            self.total = int(count)
        bar.total = self.total

    def _fade(self) -> None:
        """Take what helps the layers to its place in the schedule."""
        if not self.helps or not self.total:
            return
        phase, factor = auxiliary.place(self.update / self.total, self.wish.rank)
        for done in range(self.phase, phase):
            for help in self.helps:
                help.halve(done)
                for value in (help.down, help.up):
                    self.adam.state.pop(value, None)  # moments along directions that are no longer these
        self.phase = phase
        for help in self.helps:
            help.fade(phase, factor)

    def _step(self) -> str:
        """One update. -> where the loss was not a number, "" if it was."""
        self._fade()
        stage, done, of = course.place(self.wish.course, self.update, self.total)
        moving = self.student.stages[stage]
        for layer in self.student.layers.values():
            layer.hold(helped=True)
        loss, where = torch.zeros((), device=self.device), ""
        for i, key in enumerate(self._batch()):
            if i % self.world.num_processes != self.world.process_index:
                continue
            pair = pairs.read(self.store, key, self.device)
            with torch.enable_grad():
                each = self._error(pair, moving) / self.wish.batch
                each.backward()
            if not math.isfinite(float(each.detach())):
                where = f"timestep {pair.timestep} of {key.removeprefix(pairs.HEAD)}"
            loss += each.detach()
        for layer in self.student.layers.values():
            layer.gather()
        if self.world.num_processes > 1:
            for value in (loss, *(value.grad for value in self.values)):
                torch.distributed.all_reduce(value)
        if not math.isfinite(float(loss)):
            return where or "another process"
        self.norms.append(self._norm(moving))
        rate = course.rate(done, of, self.wish.rate)
        for group, (part, size) in zip(self.adam.param_groups, self.sizes, strict=True):
            group["lr"] = rate * SHARES[part] * size
        self.adam.step()
        share = min(1.0, rate / course.MOST_RATE)
        for name, layer in self.student.layers.items():
            if "weights" in moving[name]:
                layer.weight.jump(share)
        self.losses.append(float(loss) / max(self.before, 1e-20))
        return ""

    def _error(self, pair: Pair, moving: Mapping[str, set[str]]) -> torch.Tensor:
        """What is brought down, of one call: the error of the answer, and of the layers whose weights move."""
        names = [n for n, parts in moving.items() if {"weights", "lowrank"} & parts] if self.wish.local else []
        truths: dict[str, list[torch.Tensor]] = {}
        if names:
            with torch.no_grad(), self.student.told(names, teacher=True) as truths:
                self.student.answer(pair, self.short)
        with self.student.told(names) as mine:
            output = self.student.answer(pair, self.short)
        noise, _ = share(pair, output, self.guidance)
        error = self._counts(pair) * noise / self.power
        return error + self.wish.local * within(mine, truths) if names else error

    def _norm(self, moving: Mapping[str, set[str]]) -> float:
        """Norm of the gradient of what packed layers hold and what moves, in units of rates; others lose theirs."""
        total = torch.zeros((), device=self.device)
        for value, (name, part, size) in zip(self.values, self.owners, strict=True):
            if part not in moving[name]:
                value.grad = None  # Adam leaves it alone
            elif part != "aux" and value.grad is not None:
                total += (value.grad.float() * (size * SHARES[part])).square().sum()
        return float(total.sqrt())

    def _counts(self, pair: Pair) -> float:
        """By how much the errors of a call count: 1 on average over the steps."""
        return self.subject.follows[pair.step] if self.subject.follows and pair.step >= 0 else 1.0

    def _batch(self) -> list[str]:
        """Keys of the pairs of this update: every pair once a round, in an order that only the seed decides."""
        found = []
        for place in range(self.update * self.wish.batch, (self.update + 1) * self.wish.batch):
            turn, at = divmod(place, len(self.keys))
            order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(self.seed * 100_003 + turn))
            found.append(self.keys[int(order[at])])
        return found

    @torch.no_grad()
    def _judge(self) -> float:
        """Error of the model as it now answers on the held-out pairs, as a share of the answers' power."""
        for layer in self.student.layers.values():
            layer.hold()
        sums = torch.zeros(2, dtype=torch.float64)
        for i, key in enumerate(self.held):
            if i % self.world.num_processes == self.world.process_index:
                pair = pairs.read(self.store, key, self.device)
                found = share(pair, self.student.answer(pair), self.guidance)
                sums += self._counts(pair) * torch.stack(found).cpu().double()
        if self.world.num_processes > 1:
            torch.distributed.all_reduce(sums)
        self.power = float(sums[1]) / len(self.held)
        value = float(sums[0] / sums[1])
        return value if math.isfinite(value) else math.inf

    def _end(self) -> None:
        """Judge the state, and remember it if it is the best."""
        found = self._judge()
        if found < self.least:
            self.least, self.best = found, [value.detach().clone() for value in self.values]

    def _packed(self) -> tuple[dict[str, nn.Module], float]:
        """The layers of the best state, and their error; the ones given where they are no better."""
        as_given = dict(self.subject.packed), self.before
        if self.best is None:
            return as_given
        with torch.no_grad():
            for value, kept in zip(self.values, self.best, strict=True):
                value.copy_(kept)
        packed = {name: layer.pack() for name, layer in self.student.layers.items()}
        with self.student.running({name: layer.forward for name, layer in packed.items()}):
            after = self._judge()
        return (as_given[0] | packed, after) if after < self.before else as_given

    # the state on disk

    def _identity(self) -> int:
        crc = zlib.crc32(
            json.dumps(
                [self.wish.identity(), self.seed, self.keys, self.held, *self.subject.follows], default=str
            ).encode()
        )
        for layer in self.subject.packed.values():
            for value in layer.parameters():
                crc = zlib.crc32(value.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
        return crc

    def _save(self) -> None:
        if not self.world.is_main_process:
            return
        state = {"identity": self._identity(), "update": self.update, "total": self.total, "seconds": self.seconds}
        state |= {"before": self.before, "least": self.least, "power": self.power, "losses": self.losses}
        state |= {"phase": self.phase, "norms": self.norms}
        state |= {"values": [value.detach() for value in self.values], "best": self.best}
        state |= {"adam": [self.adam.state[value] for value in self.values]}
        self.store.write(STATE, state, share=False)

    def _resume(self) -> None:
        if not self.store.has(STATE):
            return
        kept = self.store.read(STATE)
        if kept["identity"] != self._identity():
            return
        for name in ("update", "total", "seconds", "before", "least", "power", "losses", "norms", "phase", "best"):
            setattr(self, name, kept[name])
        with torch.no_grad():
            for value, found, state in zip(self.values, kept["values"], kept["adam"], strict=True):
                value.copy_(found)
                self.adam.state[value] = {key: each.to(self.device) for key, each in state.items()}
