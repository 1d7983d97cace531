"""Rows of eval/results/kernels.json: dq next to its peers, shares of the machine's peak, and memory.

A row is of a kind: "speed" (a contender on a model), "roofline" (dq's kernels on a model) or "memory" (a process that
loads a model and runs a step). Contenders that have a row of the running commit are not measured again, unless the
files of dq differ from it; `--again` does.
"""

import argparse
import os
import time
from dataclasses import asdict

from dq.bench import race, widths
from dq.bench.race import Result
from eval.experiments import rows

FILE = rows.FOLDER / "kernels.json"
KEYS = ("kind", "model", "contender", "threads", "machine")
MEMORY_MODELS = ("pixart-full", "flux-deep")


def speeds(options: argparse.Namespace) -> None:
    """A row per model and contender, one of roofline lines per model; written when a model is done."""
    began, stamp = time.perf_counter(), rows.stamp()
    load = {"load": round(os.getloadavg()[0], 2), "threads": options.threads}
    entered, entries = race.contenders(options.contenders, options.without), []
    for name in race.models(options.models or race.MODELS):
        there = () if options.again else done(options.out, name, options.threads, stamp)
        left = [each for each in entered if each.name not in there]
        entries.append((name, left))
    for found in race.race(entries, setting(options, began)):
        write(options, found, load, stamp)


def setting(options: argparse.Namespace, began: float) -> race.Setting:
    """How the race is run, telling how long the command has run with each line."""
    return race.Setting(
        options.seconds,
        options.rounds,
        options.threads,
        options.patience,
        options.peers_folder,
        lambda text: say(text, began),
    )


def say(text: str, began: float) -> None:
    print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)


def done(file, name: str, threads: int, stamp: dict) -> set[str]:
    """Contenders of a model that have a row of this commit and machine; none while the files of dq differ from it."""
    same = {"kind": "speed", "model": name, "threads": threads, "commit": stamp["commit"], "machine": stamp["machine"]}
    fitting = [row for row in rows.read(file) if all(row.get(key) == value for key, value in same.items())]
    return set() if stamp["commit"].endswith("+") else {row["contender"] for row in fitting}


def write(options: argparse.Namespace, found: race.Race, load: dict, stamp: dict) -> None:
    """The rows of one model."""
    for result in found.results:
        if result.skipped:
            print(f"{found.model}: {result.contender} left out: {result.skipped}")
            continue
        rows.add(options.out, speed_row(result) | load | versioned(stamp, result.versions), KEYS)
        print(f"{found.model}: {result.contender} {result.ms:.2f} ms, {result.times_base:.2f} times bf16")
    if found.peaks is not None and found.lines:
        row = {"kind": "roofline", "model": found.model, "contender": "dq-int8", "peaks": asdict(found.peaks)}
        row["lines"] = [asdict(line) | {"share": round(found.peaks.share(line), 3)} for line in found.lines]
        rows.add(options.out, row | load | stamp, KEYS)


def speed_row(result: Result) -> dict:
    """The figures of a contender on a model."""
    figures = {"kind": "speed", "shown": widths.shown(result.model), "times_bf16": round(result.times_base, 3)}
    figures |= {key: value for key, value in asdict(result).items() if key not in ("skipped", "versions")}
    return figures | {"ms": round(result.ms, 3), "base_ms": round(result.base_ms, 3)}


def versioned(stamp: dict, versions: dict[str, str]) -> dict:
    """The stamp with the versions of a peer."""
    return stamp | {"versions": stamp["versions"] | versions}


def memory(options: argparse.Namespace) -> None:
    """A row per model and way to load it: peak of the process, and what that saves of the bf16 weights' bytes."""
    began, stamp, load = time.perf_counter(), rows.stamp(), {"threads": options.threads}
    for name in options.models or MEMORY_MODELS:
        most = 0
        for found in race.memory(name, setting(options, began)):
            most = most or found.peak_bytes
            saved = (most - found.peak_bytes) / found.weight_bytes
            row = {"kind": "memory", "shown": widths.shown(name), **asdict(found), "saved_share": round(saved, 3)}
            rows.add(options.out, row | load | stamp, KEYS)
            say(f"{name}: {found.contender}: {found.peak_bytes / 2**30:.2f} GiB, {100 * saved:.0f} % saved", began)
