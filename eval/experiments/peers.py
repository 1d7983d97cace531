"""Rows of eval/results/kernels.json: dq next to its peers, shares of the machine's peak, and memory.

A row is of a kind: "speed" (a contender on a model), "roofline" (dq's kernels on a model) or "memory" (a process that
loads a model and runs a step). Contenders that have a row of the running commit are not measured again, unless the
files of dq differ from it; `--again` does. A race is beside full precision in the dtype `base`, and a contender of one
base and level says nothing of another.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from dq.bench import levels, peers, race, widths
from dq.bench.race import Result
from eval.experiments import rows

FILE = rows.FOLDER / "kernels.json"
KEYS = ("kind", "model", "contender", "base", "threads", "machine", "level")
MEMORY_MODELS = ("pixart-full", "flux-deep")


def speeds(options: argparse.Namespace) -> None:
    """A row per model and contender, one of roofline lines per model; written when a model is done."""
    began, stamp = time.perf_counter(), rows.stamp() | rows.conditions(options.threads)
    entered = race.contenders(options.contenders, options.without)
    for base in options.dtypes or [levels.base()]:
        entries = []
        for name in race.models(options.models or race.MODELS):
            there = () if options.again else done(options.out or FILE, name, base, stamp)
            entries.append((name, [each for each in entered if each.name not in there]))
        for found in race.race(entries, setting(options, began, base)):
            write(options.out or FILE, found, stamp | {"base": base})


def setting(options: argparse.Namespace, began: float, base: str = peers.BASE) -> race.Setting:
    """How the race is run, telling how long the command has run with each line."""
    chosen = {key: getattr(options, key) for key in ("seconds", "rounds", "threads", "patience")}
    return race.Setting(**chosen, folder=options.peers_folder, say=lambda text: say(text, began), dtype=base)


def say(text: str, began: float) -> None:
    print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)


def done(file: Path, name: str, base: str, stamp: dict) -> set[str]:
    """Contenders of a model that have a row of this commit and machine; none while the files of dq differ from it."""
    key = {"kind": "speed", "model": name, "base": base}
    return {each for each in peers.NAMES if rows.there(file, key | {"contender": each}, stamp)}


def write(file: Path, found: race.Race, stamp: dict) -> None:
    """The rows of one model."""
    for result in found.results:
        if result.skipped:
            print(f"{found.model}: {result.contender} left out: {result.skipped}")
            continue
        rows.add(file, speed_row(result) | versioned(stamp, result.versions), KEYS)
        print(f"{found.model}: {result.contender} {result.ms:.2f} ms, {result.times_base:.2f} times {result.base}")
    if found.peaks is not None and found.lines:
        row = {"kind": "roofline", "model": found.model, "contender": "dq-int8", "peaks": asdict(found.peaks)}
        row["lines"] = [asdict(line) | {"share": round(found.peaks.share(line), 3)} for line in found.lines]
        rows.add(file, row | stamp, KEYS)


def speed_row(result: Result) -> dict:
    """The figures of a contender on a model."""
    figures = {"kind": "speed", "shown": widths.shown(result.model), "times_base": round(result.times_base, 3)}
    figures |= {key: value for key, value in asdict(result).items() if key not in ("skipped", "versions")}
    return figures | {"ms": round(result.ms, 3), "base_ms": round(result.base_ms, 3)}


def versioned(stamp: dict, versions: dict[str, str]) -> dict:
    """The stamp with the versions of a peer."""
    return stamp | {"versions": stamp["versions"] | versions}


def memory(options: argparse.Namespace) -> None:
    """A row per model and way to load it: peak of the process, and what that saves of the bf16 weights' bytes."""
    began, stamp = time.perf_counter(), rows.stamp() | rows.conditions(options.threads) | {"base": peers.BASE}
    for name in options.models or MEMORY_MODELS:
        most = 0
        for found in race.memory(name, setting(options, began)):
            most = most or found.peak_bytes
            saved = (most - found.peak_bytes) / found.weight_bytes
            row = {"kind": "memory", "shown": widths.shown(name), **asdict(found), "saved_share": round(saved, 3)}
            rows.add(options.out or FILE, row | stamp, KEYS)
            say(f"{name}: {found.contender}: {found.peak_bytes / 2**30:.2f} GiB, {100 * saved:.0f} % saved", began)
