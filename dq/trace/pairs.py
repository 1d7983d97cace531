"""What a full-precision denoiser answers in whole runs of the user's own pipeline: the lessons of a tuning, on disk.

A pair is one call and its answer. Every call of a run is kept, so that runs, not calls, are held out; no data but the
pipeline's own: prompts and call arguments are the calibration's, noise is of seeds of its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dq.layers.memory import aligned
from dq.trace import capture, identity
from dq.trace.calibration import Calibration
from dq.trace.records import Store
from dq.trace.running import Call, Runner, drawing, kept_modes, modules_of, telling, watching
from dq.trace.units import map_tree
from dq.trace.world import processes

FIRST = 100_000  # run whose seeds these begin with: calibration runs are never so many
FEWEST = 2  # runs, however long they take: one to learn from, one to judge by
HEAD, RUNS, DONE = "tune/pairs/", "tune/runs/", "tune/recorded"


@dataclass(frozen=True)
class Pair:
    """One call of a denoiser, and what it answered in full precision.

    branches  guidance branch of each batch row, 1 unconditional
    step      of its run, from 0; -1: unknown
    """

    args: tuple
    kwargs: dict[str, Any]
    output: Any
    timestep: float | None
    branches: tuple[int, ...]
    step: int = -1


@dataclass(frozen=True)
class Length:
    """How much to record: at most so many runs, none begun after so many seconds but for the first two."""

    runs: int
    seconds: float


def record(
    target,
    models: Mapping[str, nn.Module],
    calibration: Calibration,
    folder: Path,
    length: Length,
    progress: bool = True,
) -> dict[str, Store]:
    """Run the pipeline, or the bare model's loop once, and keep every call of `models` with its answer.

    models  by name, as for `capture`, below whose records in `folder` these lie
    A run that is there is not made again; once all are there none is added. The first process records, all wait.
    -> stores by part. Raises DQError when a run fails; models and schedulers are as they were.
    """
    stores, world = {part: Store(folder / part) for part in models}, processes()
    if world.is_main_process:
        capture.claim_folder(folder, identity.of(target, models, calibration), "tuning.json", (f"*/{RUNS}*",), "tune/")
        first = next(iter(stores.values()))
        if not first.has(DONE):
            with kept_modes(models), aligned(modules_of(target)), torch.no_grad():
                _record(target, models, calibration, stores, length, progress)
            first.write(DONE, {"runs": len(first.keys(RUNS))})
    world.wait_for_everyone()
    return stores


def _record(
    target, models: Mapping[str, nn.Module], calibration: Calibration, stores, length: Length, progress
) -> None:
    bare = isinstance(target, nn.Module)
    runner, begun = None if bare else Runner(target, calibration), time.perf_counter()
    bar = tqdm(range(1 if bare else length.runs), desc="runs to learn from", disable=not progress, delay=2)
    for run in bar:
        if all(store.has(f"{RUNS}{run:05d}") for store in stores.values()):
            continue
        if run >= FEWEST and time.perf_counter() - begun > length.seconds:
            break
        _run(target, runner, models, calibration, stores, run)


def _run(target, runner: Runner | None, models, calibration: Calibration, stores: Mapping[str, Store], run: int):
    made: dict[str, list[dict]] = {part: [] for part in models}
    hooks = [_answering(model, made[part]) for part, model in models.items()]

    def sink(call: Call) -> None:
        branches = [0] * call.rows if runner is None else runner.branches(call)
        info = {"run": run, "step": call.step, "timestep": call.timestep, "branches": branches}
        kept = map_tree((call.args, dict(call.kwargs)), torch.clone)  # models may write into what they are given
        made[call.part].append({"info": info, "args": kept[0], "kwargs": kept[1]})

    try:
        if runner is not None:
            runner.run(FIRST + run, models, sink)
        else:
            (model,) = models.values()
            with watching(models, sink), drawing(calibration.seed, FIRST), telling("forward_loop"):
                assert calibration.forward_loop is not None  # as capture checked
                calibration.forward_loop(model)
    finally:
        for hook in hooks:
            hook.remove()
    for part, rows in made.items():
        for count, row in enumerate(rows):
            stores[part].write(f"{HEAD}{run:05d}-{count:05d}", row)
    for store in stores.values():
        store.write(f"{RUNS}{run:05d}", {"calls": sum(map(len, made.values()))})


def _answering(model: nn.Module, rows: list[dict]):
    def hook(module, args, output) -> None:
        rows[-1]["output"] = output

    return model.register_forward_hook(hook)


def guidance(target, calibration: Calibration) -> float | None:
    """The scale that a pipeline's predictions are guided by in the calibration's runs; None where none is known."""
    if isinstance(target, nn.Module):
        return None
    runner = Runner(target, calibration)
    default = runner.accepted["guidance_scale"].default if "guidance_scale" in runner.accepted else None
    found = runner.arguments(0).get("guidance_scale", default)
    return float(found) if isinstance(found, int | float) and found > 1 else None


def divided(store: Store, held: float) -> tuple[list[str], list[str]]:
    """-> keys of the pairs to learn from and of those to judge by: of the last runs, or of a loop's last calls."""
    keys = store.keys(HEAD)
    runs = [key.rpartition("-")[0] for key in keys]
    runs = runs if len(set(runs)) > 1 else keys  # a loop's calls count as runs
    names = sorted(set(runs))
    if len(names) < 2:
        return keys, keys
    last, of = set(names[-max(1, round(held * len(names))) :]), dict(zip(keys, runs, strict=True))
    return [key for key in keys if of[key] not in last], [key for key in keys if of[key] in last]


def read(store: Store, key: str, device: torch.device | None = None) -> Pair:
    """A recorded pair, on `device` what was not on the CPU."""
    tree = store.read(key, device)
    info = tree["info"]
    return Pair(tree["args"], tree["kwargs"], tree["output"], info["timestep"], tuple(info["branches"]), info["step"])
