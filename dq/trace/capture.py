"""Calibration data: the exact denoiser calls of the user's own pipeline, or of a loop the user writes, on disk.

A run is one call of the pipeline with one prompt; its steps are numbered by the distinct timesteps in order of
appearance (a second-order scheduler calls twice at one step). `policies` chooses the (run, step) pairs that are kept;
all denoiser calls of a pair go to disk before the model sees them, so that they can be made again to the bit.

Layout: `<part>/calls/<run>-<number>.entry` (see `records`), `runs/<run>.json` once a run is done,
`calibration.json` tells one calibration from another, `pool/` holds what the policy "clustered" looks at.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import nn
from tqdm import tqdm

from dq import schema
from dq.disk import read_json, write_json
from dq.errors import DQError
from dq.layers.memory import aligned
from dq.trace import inputs, policies
from dq.trace.calibration import Calibration
from dq.trace.records import Store
from dq.trace.running import Call, Runner, drawing, kept_modes, modules_of, telling, watching
from dq.trace.world import processes

if TYPE_CHECKING:
    from accelerate import PartialState

SKETCH = 256  # numbers that stand for the latents of a call when calls are clustered


FINGERPRINT = 100_000  # values of each parameter that tell one model from another


def capture(target, models: Mapping[str, nn.Module], calibration: Calibration, folder, progress: bool = True) -> None:
    """Record calls of `models` (by component name) while `target` runs, below `folder/<name>/calls`.

    target   the pipeline, or the one bare model, which the calibration's forward loop runs
    Each record is {"info": {run, step (-1: unknown), timestep (largest value or None), branches (one a batch row, 1
    unconditional)}, "args", "kwargs"}; keys sort by run and call. A finished run is not done again. Under accelerate
    the runs are dealt out to the processes; all return when all runs are done. Raises DQError when something
    fails; models and schedulers are as they were in any case.
    """
    folder, bare = Path(folder), isinstance(target, nn.Module)
    if bare and calibration.forward_loop is None:
        raise DQError("calibration of a bare model needs forward_loop=..., a function that runs the model it is given")
    if not bare and calibration.forward_loop is not None:
        raise DQError("calibration: forward_loop is for a bare model, got a pipeline; pass the model, or prompts")
    runner = None if bare else Runner(target, calibration)
    world = processes()
    if world.is_main_process:
        _claim(folder, _identity(target, models, calibration))
    world.wait_for_everyone()
    session = _Session(models, folder, world)
    with kept_modes(models), aligned(modules_of(target)), torch.no_grad():
        if bare:
            _record_loop(session, target, calibration)
        else:
            _record_pipeline(session, runner, calibration, progress)
    world.wait_for_everyone()
    silent = [
        name or type(models[name]).__name__ for name, store in session.stores.items() if not store.keys("calls/")
    ]
    if silent and bare:
        raise DQError("forward_loop never called the model: got no calls, expected one or more; call what it is given")
    if silent:
        raise DQError(f"denoiser {silent[0]!r} was never called at a recorded step; raise samples or name other steps")


class _Session:
    """Stores of the parts, and marks of the runs that are done."""

    def __init__(self, models: Mapping[str, nn.Module], folder: Path, world: PartialState):
        self.models = models
        self.folder = folder
        self.world = world
        self.stores = {part: Store(folder / part) for part in models}
        self.counts: Counter[str] = Counter()

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
        for store in self.stores.values():
            for key in (key for prefix in prefixes for key in store.keys(f"calls/{prefix}")):
                store.drop(key)

    def finish(self, name: str) -> None:
        write_json(self.folder / "runs" / f"{name}.json", {part: self.counts[part] for part in self.models})

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

    with watching(session.models, sink), drawing(calibration.seed, 0), telling("forward_loop"):
        calibration.forward_loop(model)
    session.finish("loop")


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
            if call.step in pairs[call.run]:
                session.keep(call, runner.branches(call))

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


def _identity(target, models: Mapping[str, nn.Module], calibration: Calibration) -> dict[str, Any]:
    """What two calibrations share when they make the same records."""
    found: dict[str, Any] = {part: f"{type(model).__name__} {_weights(model)}" for part, model in models.items()}
    found = {"models": found, "seed": calibration.seed, "target": type(target).__name__}
    if calibration.forward_loop is not None:
        return found | {"forward_loop": getattr(calibration.forward_loop, "__qualname__", "callable")}
    parts = {name: part for name, part in target.components.items() if isinstance(part, SchedulerMixin)}
    schedulers = {name: f"{type(part).__name__} {_crc(_settings(part))}" for name, part in parts.items()}
    names = {name: getattr(calibration, name) for name in ("steps", "samples", "policy")}
    values = {
        "prompts": _crc(
            [inputs.arguments(text) if isinstance(text, Mapping) else text for text in calibration.texts()]
        ),
        "call_kwargs": _crc(dict(calibration.call_kwargs)),
    }
    return found | names | values | {"schedulers": schedulers}


def _settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """A scheduler's settings without diffusers' own notes, some of which stand in another order in each process."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def _weights(model: nn.Module) -> str:
    """crc32 over names and the first values of all parameters and buffers."""
    value = 0
    for name, tensor in model.state_dict().items():
        value = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), value)
        if not tensor.is_meta and tensor.numel():
            first = tensor.detach().flatten()[:FINGERPRINT].cpu().contiguous()
            value = zlib.crc32(first.view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _crc(value: Any) -> str:
    """crc32 of a tree of settings: the content of tensors, arrays and pictures, never their address."""
    return f"{zlib.crc32(_bytes(value)):08x}"


def _bytes(value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"{" + b"".join(repr(name).encode() + _bytes(value[name]) for name in sorted(value, key=repr)) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_bytes, value)) + b"]"
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return f"{value.dtype}{tuple(value.shape)}".encode() + value.flatten().view(torch.uint8).numpy().tobytes()
    if hasattr(value, "tobytes"):
        return (
            f"{type(value).__name__}{getattr(value, 'shape', getattr(value, 'size', ''))}".encode() + value.tobytes()
        )
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value).encode()
    return type(value).__name__.encode()


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Write down whose records these are, or check that they are ours."""
    path = folder / "calibration.json"
    if not path.exists():
        write_json(path, identity)
        return
    try:
        found = read_json(path)
    except DQError as error:
        raise DQError(f"{error}; delete the folder {str(folder)!r} or choose another") from None
    if found != identity:
        names = [name for name in identity if found.get(name) != identity[name]] or ["something"]
        what = f"folder {str(folder)!r} holds another calibration: {names[0]} differs"
        raise DQError(f"{what}; choose another folder or delete it")
