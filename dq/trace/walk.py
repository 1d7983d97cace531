"""Walks through a model unit by unit, over recorded calls, with the inputs every unit would get.

Two streams run side by side: `full`, where every unit is as it was, and `hat`, where the units before are quantized.
Everything is on disk, so a killed walk goes on where it was, and memory holds one unit and one call.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.families import Family
from dq.layers.clock import Clock
from dq.plan import Plan
from dq.trace import observe, units
from dq.trace.observe import CallInfo, Observer, Sums
from dq.trace.records import Store
from dq.trace.replay import ABSENT, Replay, entry
from dq.trace.seen import Needs, Seen, Unit, UnitCall
from dq.trace.units import Hollow, map_tree
from dq.trace.world import processes

PIECES = 8  # calls are dealt into so many pieces; which process works on which piece changes nothing
MOST_BUCKETS = 64
MOST_KINDS = 8  # kinds of calls laid out; later kinds are taken to take the same ways


class Trace(Replay):
    """The units of a model, and what they see in the recorded calls of `folder`.

    units     in execution order; one without planned layers is only skipped
    unfit     planned layers outside of all units, and why
    edges     rising step-bucket edges in the model's timestep units
    finished  number of units walked through; a new Trace of the same folder goes on there
    clock     shows the step bucket and phase of the running call to layers with a table or later phases
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        family: Family,
        folder: str | Path,
        seed: int = 0,
        identity: str = "",
        most: int = 0,
        between: bool = False,
    ):
        """folder holds `calls/...` as `calibration.capture` leaves it.

        identity  of everything else that decides the result (method, options): a walk under another one starts anew
        most      calls to walk through, chosen evenly over the timesteps; 0: all
        between   as in Needs
        Raises DQError when there are no calls.
        """
        super().__init__(model, Store(folder))
        self.seed, self._ranks = seed, processes()
        self._calls = self._store.keys("calls/")
        if not self._calls:
            raise DQError(f"{str(folder)!r} holds no recorded calls; record some with dq.Calibration first")
        kinds = self._read_infos(most, between, plan)
        with self._evaluating():
            self._layout = units.find(model, plan, family, kinds)
        self.units, self.unfit = self._layout.units, self._layout.unfit
        self._begin({"seed": seed, "identity": identity, "calls": self._calls}, plan)

    @property
    def said(self) -> str:
        """Which calls the model is fitted on, a line for the report."""
        times = [time for time in self._times if time is not None]
        span = f" at timesteps {max(times):g} to {min(times):g}" if times else ""
        return f"fitted on {len(self._calls)} calls{span}"

    def observe(self, unit: Unit, needs: Needs) -> Seen:
        """Run the full-precision unit over all calls and tell what its layers saw; stores its outputs."""
        index = self._at(unit)
        twice = needs.hat and self._hat_differs(index)
        apart: frozenset[str] = frozenset()
        while True:
            steps = len({info.bucket for info in self._infos})
            observer = Observer(unit, needs, len(self._calls), len(self.edges) + 1, twice, apart, steps)
            sums, torn = self._observe(index, observer)
            if not torn:
                break
            apart |= torn
        self._save(observed=index + 1)
        layers = observe.finish(sums)
        layers = {name: layers[name] for name in unit.layers if name in layers}
        calls = partial(self.calls, unit)
        return Seen(layers, len(self.edges) + 1, self.edges, calls, self.seed, self._rising)

    def advance(self, unit: Unit, packed: Mapping[str, nn.Module]) -> None:
        """Run the unit with these layers in place of its own over the quantized stream; then it is finished."""
        index = self._at(unit)
        if self._state["observed"] <= index:
            self.observe(unit, Needs(hat=False))
        differs = bool(packed) or self._hat_differs(index)
        if differs and self._layout.last_use(index) > index:
            with self._swapped(unit, packed) as forward:
                for call in self._own_calls():
                    self._clocked(call)
                    output = self._reach(index, "hat", call, lambda args, kwargs: forward(*args, **kwargs))
                    if output is not ABSENT:
                        self._put("hat", index, call, output)
        self._ranks.wait_for_everyone()
        self._save(finished=index + 1, differs=[*self._differs, differs])
        self._drop()

    def skip(self, unit: Unit) -> None:
        """Go on with a unit that stays as it is."""
        self.advance(unit, {})

    def calls(self, unit: Unit, stream: str = "full") -> Iterator[UnitCall]:
        """The calls of an observed unit: inputs under `stream`, output of the full-precision unit under `full`."""
        index = self.units.index(unit)
        for call, (args, kwargs) in self._inputs(index, stream):
            info = self._infos[call]
            yield UnitCall(args, kwargs, self._get("full", index, call), info.bucket, info.phase)

    def inputs(self, unit: Unit, stream: str = "full") -> Iterator[tuple[tuple, dict]]:
        """(args, kwargs) of every call that reaches a unit; the units before it must be finished."""
        return (given for _, given in self._inputs(self.units.index(unit), stream))

    def outputs(self, stream: str = "full") -> Iterator[Any]:
        """The model's output in every call, once all units are finished."""
        for call in range(len(self._calls)):
            yield self._reach(len(self.units), stream, call, None)

    def save_unit(self, index: int, tensors: Mapping[str, torch.Tensor], note: dict) -> None:
        """Keep what was fitted to a unit, whole or not at all."""
        self._store.write(f"units/{index:03}", {"tensors": dict(tensors), "note": note}, share=False)

    def load_unit(self, index: int) -> tuple[dict[str, torch.Tensor], dict] | None:
        """What `save_unit` kept; None if there is nothing. DQError for a damaged file."""
        if not self._store.has(f"units/{index:03}"):
            return None
        kept = self._store.read(f"units/{index:03}", self._home, kind="fitted")
        return kept["tensors"], kept["note"]

    @property
    def finished(self) -> int:
        return self._state["finished"]

    # where the walk stands

    def _read_infos(self, most: int, between: bool, plan: Plan) -> list[tuple[tuple, dict]]:
        """Sets calls, edges, clock and what statistics know of every call; gives the first call of every kind."""
        kinds, infos = {}, []
        for key in self._calls:
            tree = self._store.read(key, self._home, kind="call")
            infos.append(tree["info"])
            if len(kinds) < MOST_KINDS:
                kinds.setdefault(repr(units.kind((tree["args"], tree["kwargs"]))), (tree["args"], tree["kwargs"]))
        times = [info.get("timestep") for info in infos]
        if 0 < most < len(infos):
            order = sorted(_shuffled(len(infos), self.seed), key=lambda call: times[call] or 0.0)
            chosen = sorted(order[(2 * i + 1) * len(order) // (2 * most)] for i in range(most))
            self._calls, infos = [self._calls[call] for call in chosen], [infos[call] for call in chosen]
            times = [times[call] for call in chosen]
        self._times = times
        self.edges = edges_between([time for time in times if time is not None], between)
        self._rising = _rise(infos)
        self.clock = Clock(self.edges, plan.switch, plan.rising)
        self._infos = [
            CallInfo(index, rank, self._clocked(index), tuple(info.get("branches") or (0,)), 0, self.clock.now)
            for index, (info, rank) in enumerate(zip(infos, _shuffled(len(infos), self.seed), strict=True))
        ]
        return list(kinds.values())

    def _clocked(self, call: int) -> int:
        """Turn the clock to a call; gives its bucket."""
        if self._times[call] is not None:
            self.clock.set(self._times[call])
        return int(self.clock.index)

    def _begin(self, identity: dict, plan: Plan) -> None:
        """Take up the state that an earlier walk left, if it was the same walk."""
        planned = {name: layer.to_dict() for name, layer in plan.layers.items()}
        identity |= {"units": [unit.name for unit in self.units], "layers": planned}
        identity |= {"switch": plan.switch, "rising": plan.rising} if plan.switch else {}
        crc = zlib.crc32(json.dumps(identity).encode())
        self._state = {"identity": crc, "finished": 0, "observed": 0, "differs": []}
        found = self._store.read("state", kind="walk") if self._store.has("state") else None
        self._ranks.wait_for_everyone()
        if found is not None and found["identity"] == crc:
            if not found["finished"] == len(found["differs"]) <= found["observed"] <= len(self.units):
                raise DQError(f"{str(self._store.folder)!r} is damaged: its state is of another model; delete it")
            self._state = found
        elif self._ranks.is_main_process:
            for stem in ("state", "full/", "hat/", "units/", "shapes/", "pieces/"):
                for key in self._store.keys(stem):
                    self._store.drop(key)
        self._ranks.wait_for_everyone()
        self._shapes: dict[int, dict[int, Any]] = {}
        for index in range(self._state["observed"]):
            self._shapes[index] = self._store.read(f"shapes/{index:03}", kind="shapes")
        self._dropped: set[int] = set()
        self._drop()

    def _at(self, unit: Unit) -> int:
        index = self.units.index(unit)
        if index != self.finished:
            expected = self.units[self.finished].name if self.finished < len(self.units) else "none, all are finished"
            raise DQError(f"unit {unit.name!r} is out of turn, expected {expected}; walk through trace.units in order")
        return index

    def _save(self, **changes: Any) -> None:
        self._state |= changes
        if self._ranks.is_main_process:
            self._store.write("state", self._state)
        self._ranks.wait_for_everyone()

    def _drop(self) -> None:
        """Forget the outputs of finished units that nothing later needs."""
        spent = [
            j for j in range(self.finished) if j not in self._dropped and self._layout.last_use(j) < self.finished
        ]
        self._dropped.update(spent)
        if self._ranks.is_main_process:
            for index in spent:
                for stream in ("full", "hat"):
                    for key in self._store.keys(entry(stream, index)):
                        self._store.drop(key)

    @property
    def _differs(self) -> list[bool]:
        return self._state["differs"]

    def _hat_differs(self, index: int) -> bool:
        return any(self._differs[earlier] for earlier in self._layout.feeds[index])

    # running a unit

    def _observe(self, index: int, observer: Observer) -> tuple[dict[str, Sums], frozenset[str]]:
        total, torn, shapes = {}, set(), {}
        fresh = self._state["observed"] <= index
        for piece in self._dealt(lambda calls: self._piece(index, observer, calls, fresh)):
            total, more = observe.join((total, piece["sums"]))
            torn |= {*more, *piece["torn"]}
            shapes |= piece["shapes"]
        self._shapes[index] = shapes
        if self._ranks.is_main_process:
            self._store.write(f"shapes/{index:03}", shapes)
        return total, frozenset(torn)

    def _piece(self, index: int, observer: Observer, calls: range, fresh: bool) -> dict:
        """Statistics over some calls of a unit, and the shapes of outputs that are unlike the first call's."""
        shapes, forward = {}, self.units[index].module.forward
        for call in calls:
            info = replace(self._infos[call], seed=_mixed(self.seed, index, call))

            def watched(hat: bool, info=info) -> Callable:
                def visit(args, kwargs):
                    with observer.watch(info, hat) as told:
                        told(args, kwargs)
                        return forward(*args, **kwargs)

                return visit

            output = self._reach(index, "full", call, watched(False))
            shape = None if output is ABSENT else map_tree(output, Hollow.of)
            if shape != self._layout.outputs[index]:
                shapes[call] = shape
            if shape is None:
                continue
            if fresh or not self._store.has(entry("full", index, call)):
                self._put("full", index, call, output)
            if observer.twice:
                self._reach(index, "hat", call, watched(True))
        return {"sums": observer.take(), "torn": sorted(observer.torn), "shapes": shapes}

    def _own_calls(self) -> Iterator[int]:
        for piece in range(self._ranks.process_index, PIECES, self._ranks.num_processes):
            yield from range(piece, len(self._calls), PIECES)

    def _dealt(self, work: Callable[[range], dict]) -> Iterator[dict]:
        """The results of all pieces of calls, in order, worked on by all processes."""
        calls = [range(piece, len(self._calls), PIECES) for piece in range(PIECES)]
        if self._ranks.num_processes == 1:
            yield from map(work, calls)
            return
        for piece in range(self._ranks.process_index, PIECES, self._ranks.num_processes):
            self._store.write(f"pieces/{piece}", work(calls[piece]), share=False)
        self._ranks.wait_for_everyone()
        for piece in range(PIECES):
            yield self._store.read(f"pieces/{piece}", self._home, kind="piece")
        self._ranks.wait_for_everyone()


def _rise(infos: list) -> bool:
    """Whether timesteps rise along the runs, as where 1 is a clean picture; not where no step is known."""
    known = [(i["step"], i["timestep"]) for i in infos if i.get("step", -1) >= 0 and i.get("timestep") is not None]
    table = torch.tensor(known, dtype=torch.float64).reshape(-1, 2)
    return bool((table - table.mean(0)).prod(1).sum() > 0)


def edges_between(timesteps: list[float], between: bool = False) -> tuple[float, ...]:
    """Edges halfway between the timesteps seen, rising; with too many of them, neighbours share a bucket.

    between  cut what lies between two timesteps into buckets of their own, up to MOST_BUCKETS in all; those of the
             timesteps seen have them in their middle
    """
    seen = sorted(set(torch.tensor(timesteps, dtype=torch.float32).tolist()))
    count = min(len(seen), MOST_BUCKETS)
    firsts = [seen[bucket * len(seen) // count] for bucket in range(count)]
    parts = max(1, MOST_BUCKETS // max(count, 1)) if between else 1
    edges = []
    for _, later in pairwise(firsts):
        below = seen[seen.index(later) - 1]
        shares = torch.arange(1, 2 * parts, 2, dtype=torch.float64) / (2 * parts)
        found = (below + (later - below) * shares).float().unique().tolist()
        edges += [edge for edge in found if below < edge <= later] or [later]
    return tuple(edges)


def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _mixed(*numbers: int) -> int:
    """A seed from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
