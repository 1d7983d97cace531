"""Calibration data: the exact denoiser calls of the user's own pipeline, or of a loop the user writes, on disk.

A run is one call of the pipeline with one prompt; its steps are numbered by the distinct timesteps in order of
appearance (a second-order scheduler calls twice at one step). `policies` chooses the (run, step) pairs that are kept;
all denoiser calls of a pair go to disk before the model sees them, so that they can be made again to the bit.

Layout: `<part>/calls/<run>-<number>.entry` (see `records`), `runs/<run>.json` once a run is done,
`called/<run>.json` counts all its calls, `calibration.json` tells one calibration from another, `pool/` holds what the
policy "clustered" looks at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dq import schema
from dq.disk import read_json, write_json
from dq.errors import DQError
from dq.layers.memory import aligned
from dq.trace import identity, policies
from dq.trace.calibration import Calibration
from dq.trace.range import watched
from dq.trace.records import Store
from dq.trace.running import Call, Runner, drawing, kept_modes, modules_of, telling, watching
from dq.trace.world import processes

if TYPE_CHECKING:
    from accelerate import PartialState

SKETCH = 256  # numbers that stand for the latents of a call when calls are clustered


def capture(
    target,
    models: Mapping[str, nn.Module],
    calibration: Calibration,
    folder: str | Path,
    progress: bool = True,
    claim: bool = True,
    cache: str = "",
) -> dict[str, str]:
    """Record calls of `models` (by component name) while `target` runs, below `folder/<name>/calls`.

    target   the pipeline, or the one bare model, which the calibration's forward loop runs
    cache    what is on the models, as their plan says it: other calls come from under another cache
    claim    write down whose records these are, or check that they are ours: of no use in a folder that nobody keeps
    Each record is {"info": {run, step (-1: unknown), timestep (largest value or None), branches (one a batch row, 1
    unconditional)}, "args", "kwargs"}; keys sort by run and call. A finished run is not done again. Under accelerate
    the runs are dealt out to the processes; all return when all runs are done.
    -> by part: why there are no calls of it, of parts that no run ever calls. Raises DQError when something fails;
    models and schedulers are as they were in any case.
    """
    folder, bare = Path(folder), isinstance(target, nn.Module)
    if bare and calibration.forward_loop is None:
        raise DQError("calibration of a bare model needs forward_loop=..., a function that runs the model it is given")
    if not bare and calibration.forward_loop is not None:
        raise DQError("calibration: forward_loop is for a bare model, got a pipeline; pass the model, or prompts")
    runner = None if bare else Runner(target, calibration)
    world = processes()
    if claim and world.is_main_process:
        claim_folder(folder, identity.of(target, models, calibration) | ({"cache": cache} if cache else {}))
    world.wait_for_everyone()
    session = _Session(models, folder, world)
    with kept_modes(models), aligned(modules_of(target)), torch.no_grad():
        if bare:
            _record_loop(session, target, calibration)
        else:
            _record_pipeline(session, runner, calibration, progress)
    world.wait_for_everyone()
    silent = [part for part, store in session.stores.items() if not store.keys("calls/")]
    if silent and bare:
        raise DQError("forward_loop never called the model: got no calls, expected one or more; call what it is given")
    return {part: _never_called(part, session, target, calibration) for part in silent}


def _never_called(part: str, session: _Session, pipe, calibration: Calibration) -> str:
    """Why a part was not recorded. DQError, with what helps, where it should have been."""
    called, own = session.called(), type(session.models[part])
    if called[part]:
        what = f"denoiser {part!r} was called, but at no recorded step; raise samples, or record every step"
        raise DQError(f"{what} with policy='all' and samples={calibration.steps}")
    if any(called[other] and isinstance(model, own) for other, model in session.models.items()):
        what = f"denoiser {part!r} was never called in {calibration.steps} steps: {_turns(pipe, calibration)}"
        raise DQError(f"{what}; or leave it in full precision with components={{{part!r}: None}}")
    if not called:
        raise DQError(f"{type(pipe).__name__} called no denoiser; look at the calibration's call_kwargs")
    return "never called by the pipeline, left in full precision"


def _turns(pipe, calibration: Calibration) -> str:
    """What decides which of two denoisers a step goes to, in a pipeline in which they take turns."""
    edge = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if edge is not None:
        return (
            f"the pipeline goes over from one denoiser to the other at boundary_ratio={edge}; raise steps so that "
            "some lie on its side, or set another ratio"
        )
    if "boundary_ratio" in (getattr(pipe, "config", None) or {}):
        return "the pipeline has boundary_ratio=None and so uses one denoiser only; set a ratio in its config"
    return "raise steps, or give call_kwargs with which the pipeline goes over to it"


class _Session:
    """Stores of the parts, and marks of the runs that are done."""

    def __init__(self, models: Mapping[str, nn.Module], folder: Path, world: PartialState):
        self.models = models
        self.folder = folder
        self.world = world
        self.stores = {part: Store(folder / part) for part in models}
        self.counts: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()  # calls of the running run, recorded or not

    def mine(self, runs) -> list[int]:
        return [run for run in runs if run % self.world.num_processes == self.world.process_index]

    def keep(self, call: Call, branches: list[int]) -> None:
        info = {"run": call.run, "step": call.step, "timestep": call.timestep, "branches": branches}
        key = f"calls/{call.run:05d}-{self.counts[call.part]:05d}"
        self.stores[call.part].write(key, {"info": info, "args": call.args, "kwargs": dict(call.kwargs)})
        self.counts[call.part] += 1

    def begin(self, *prefixes: str) -> None:
        """Remove what a killed run left."""
        self.counts.clear()
        self.heard.clear()
        for store in self.stores.values():
            for key in (key for prefix in prefixes for key in store.keys(f"calls/{prefix}")):
                store.drop(key)

    def finish(self, name: str) -> None:
        write_json(self.folder / "called" / f"{name}.json", dict(self.heard))
        write_json(self.folder / "runs" / f"{name}.json", {part: self.counts[part] for part in self.models})

    def called(self) -> Counter[str]:
        """Calls of every part in all finished runs."""
        found: Counter[str] = Counter()
        for path in sorted((self.folder / "called").glob("*.json")):
            heard = read_json(path)
            schema.check("counts", heard, f"file {str(path)!r}")
            found.update(heard)
        return found

    def finished(self, name: str, prefix: str) -> bool:
        path = self.folder / "runs" / f"{name}.json"
        if not path.exists():
            return False
        counts = {part: read_json(path).get(part) for part in self.stores}
        schema.check("counts", counts, f"file {str(path)!r}")
        return all(len(store.keys(f"calls/{prefix}")) == counts[part] for part, store in self.stores.items())


def _record_loop(session: _Session, model: nn.Module, calibration: Calibration) -> None:
    """Every call of the user's loop, on the first process; a killed one starts anew."""
    if not session.world.is_main_process or session.finished("loop", ""):
        return
    session.begin("")
    (part,) = session.models

    def sink(call: Call) -> None:
        call.run, call.step = session.counts[part], -1
        session.keep(call, [0] * call.rows)

    with (
        watched(session.models),
        _unchanged(model),
        watching(session.models, sink),
        drawing(calibration.seed, 0),
        telling("forward_loop"),
    ):
        calibration.forward_loop(model)
    session.finish("loop")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """DQError when the user's loop did more than run the model: put modules in place of others, or changed weights."""
    modules, before = dict(model.named_modules()), identity.tensors(model)
    yield
    after = dict(model.named_modules())
    for name in (name for name in (*modules, *after) if modules.get(name) is not after.get(name)):
        what = f"forward_loop put another module in the place of {name!r}"
        raise DQError(f"{what}; change the model first, and let the loop only run it")
    now = identity.tensors(model)
    for name in (name for name in (*before, *now) if before.get(name) != now.get(name)):
        raise DQError(f"forward_loop changed {name!r} of the model, as training does; let it only run the model")


def _record_pipeline(session: _Session, runner: Runner, calibration: Calibration, progress: bool) -> None:
    if calibration.policy == "clustered":
        pool = _Pool(session.folder / "pool")
        missing = [run for run in session.mine(range(policies.runs(calibration))) if not pool.store.has(pool.key(run))]
        for run in tqdm(missing, desc="calibrate: survey", disable=not progress):
            runner.run(run, session.models, pool.add)
            pool.finish(run)
        session.world.wait_for_everyone()
        pairs = policies.choose(calibration, *pool.load(policies.runs(calibration)))
    else:
        pairs = policies.choose(calibration)
    runs = [run for run in session.mine(pairs) if not session.finished(f"{run:05d}", f"{run:05d}-")]
    for run in tqdm(runs, desc="calibrate", disable=not progress):
        session.begin(f"{run:05d}-")

        def sink(call: Call) -> None:
            session.heard[call.part] += 1
            if call.step in pairs[call.run]:
                session.keep(call, runner.branches(call))

        with watched(session.models):
            runner.run(run, session.models, sink)
        session.finish(f"{run:05d}")


class _Pool:
    """What the policy "clustered" knows of every step of every run: a seeded sketch of the latents, not the calls."""

    def __init__(self, folder: Path):
        self.store = Store(folder)
        self.found: dict[int, list[float]] = {}

    def add(self, call: Call) -> None:
        latents = call.latents()
        if latents is not None and call.step not in self.found:
            values = latents if isinstance(latents, torch.Tensor) else torch.cat([item.flatten() for item in latents])
            self.found[call.step] = sketch(values)

    def finish(self, run: int) -> None:
        self.store.write(
            self.key(run), {"steps": list(self.found), "sketches": list(self.found.values())}, share=False
        )
        self.found = {}

    def load(self, runs: int) -> tuple[np.ndarray, np.ndarray]:
        """Sketches (n, SKETCH) and their (run, step) (n, 2), in order."""
        found = [(run, self.store.read(self.key(run), kind="pool")) for run in range(runs)]
        of = [(run, step) for run, tree in found for step in tree["steps"]]
        if not of:
            raise DQError("policy 'clustered': no call of a denoiser had latents to compare; choose another policy")
        rows = [row for _, tree in found for row in tree["sketches"]]
        return np.array(rows, dtype=np.float64), np.array(of)

    @staticmethod
    def key(run: int) -> str:
        return f"run-{run:05d}"


def sketch(values: torch.Tensor) -> list[float]:
    """SKETCH sums over random groups with random signs: keeps inner products up to a relative 1 / sqrt(SKETCH)."""
    flat = values.detach().float().cpu().flatten().numpy()
    draw = np.random.default_rng(len(flat))
    group, sign = draw.integers(0, SKETCH, len(flat)), draw.integers(0, 2, len(flat)) * 2.0 - 1
    return np.bincount(group, weights=flat * sign, minlength=SKETCH).tolist()


def claim_folder(
    folder: Path, mine: dict[str, Any], name: str = "calibration.json", done=("runs/*", "pool/*"), keys: str = ""
) -> None:
    """Write down whose records these are, or check that they are ours; what holds no finished run is taken over.

    name  of the file that says it; done: what is there once a run is finished; keys: what the records begin with
    """
    path = folder / name
    if not path.exists() or not any(any(folder.glob(each)) for each in done):
        for store in (Store(folder / part) for part in mine["models"] if path.exists()):
            for key in store.keys(keys):
                store.drop(key)
        write_json(path, mine)
        return
    try:
        found = read_json(path)
    except DQError as error:
        raise DQError(f"{error}; delete the folder {str(folder)!r} or choose another") from None
    if found != mine:
        what = f"folder {str(folder)!r} holds another calibration: {identity.differing(found, mine)} differs"
        raise DQError(f"{what}; choose another folder or delete it")
