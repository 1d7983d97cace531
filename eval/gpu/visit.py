"""A visit to a machine with a card, in pieces that go on where they stopped: `python -m eval.gpu.visit [--rehearse]`.

    versions ceilings              what is there, and what it does at most
    check-...                      every kernel next to the truth, and faults that the checks have to see
    tune-int8 tune-fp8             tile sizes; the fastest go into the user's cache and into the results
    gemm linears weight-only rows  products, layers on every backend that takes them, kernels that round
    attention block flux           attention backends, fused blocks, diffusers' FLUX beside torchao and SDNQ
    tests                          pytest -m gpu
Each piece is a process of its own with a bound on its time; what it measured before stays. README.md of this folder
has the commands. A rehearsal goes through all of it on the CPU; its rows are marked, lie in a file of another name and
are refused by the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("what", "contender", "shape", "machine")
LONGEST = 540  # seconds of a piece
PACKAGES = ("triton", "torchao", "sdnq", "accelerate", "peft")
FAULTS_FIRST = ("check-faults", "check-tiles", "check-rows", "check-layers", "check-lab")


@dataclass(frozen=True)
class Visit:
    """out: folder of the results; rehearsal: on the CPU; wheels: folder to install from, None for none."""

    out: Path
    rehearsal: bool
    wheels: Path | None = None

    @property
    def rows(self) -> Path:
        return self.out / ("rehearsal.json" if self.rehearsal else "gpu_kernels.json")

    @property
    def state(self) -> Path:
        return self.out / "state.json"

    @property
    def site(self) -> Path:
        return self.out / "site"


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


# --- pieces, each in a process of its own ----------------------------------------------------------------------------


def pieces() -> dict[str, Callable[[SimpleNamespace, Callable], object]]:
    from eval.gpu import bench

    named = {"gemm": bench.gemm, "linears": bench.linears, "weight-only": bench.weight_only, "rows": bench.quantizers}
    return {
        "versions": versions, "ceilings": bench.ceilings, **dict.fromkeys(FAULTS_FIRST, check),
        "tune-int8": partial(bench.tune, eight=False), "tune-fp8": partial(bench.tune, eight=True), **named,
        "attention": bench.attention, "block": bench.block, "flux": flux, "tests": tests,
    }  # fmt: skip


NAMES = (
    "versions", "ceilings", *FAULTS_FIRST, "tune-int8", "tune-fp8", "gemm", "linears", "weight-only", "rows",
    "attention", "block", "flux", "tests",
)  # fmt: skip


def versions(options: SimpleNamespace, note: Callable) -> None:
    """Backends of dq and what they say of an int8 linear here, beside the stamp that every row has."""
    from dq import kernels
    from eval.gpu import bench

    plan, _, _ = bench.layer("int8/channel", "int8/token", (16, 64, 64))
    said = {name: why or "" for name, why in kernels.asked("linear", plan, bench.DEVICE, backend="auto").items()}
    options.write("versions.json", options.stamp | {"python": sys.version.split()[0], "backends": said})


def flux(options: SimpleNamespace, note: Callable) -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        note("FLUX blocks", "diffusers", (), None, error=str(error))
        return
    from eval.gpu import flux

    flux.measure(options, note)


def check(options: SimpleNamespace, note: Callable) -> None:
    """Checks that are not in checks.json; SystemExit(1) when something is wrong or nothing was checked."""
    from eval.gpu import checks

    name = options.piece.removeprefix("check-")
    before = read(options.visit.out / f"{options.piece}.json").get("outcomes", [])
    checks.known.update({each["what"]: checks.Outcome(**each) for each in before if not each["wrong"]})
    checks.until[0] = options.until
    found = []
    for outcome in checks.CHECKS[name](checks.DEVICE):
        found.append(outcome)
        if outcome.what not in checks.known and outcome.skipped != checks.OUT_OF_TIME:
            kept = [asdict(each) for each in found if each.skipped != checks.OUT_OF_TIME]
            options.write(f"{options.piece}.json", options.stamp | {"outcomes": kept})
        if outcome.wrong:
            print(f"WRONG {outcome.what}: {outcome.wrong}", flush=True)
    late = sum(each.skipped == checks.OUT_OF_TIME for each in found)
    print(checks.counted(found) + (f", {late} of them for want of time" if late else ""), flush=True)
    if not checks.sound(found):
        raise SystemExit(1)
    if late and not options.visit.rehearsal:
        raise SystemExit(f"{late} checks are left for the next call")


def tests(options: SimpleNamespace, note: Callable) -> None:
    chosen = ["tests/kernels/test_proof.py"] if options.visit.rehearsal else ["-m", "gpu", "tests/kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *chosen]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    with (options.visit.out / "tests.txt").open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    print((options.visit.out / "tests.txt").read_text().strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(1)


def run_piece(visit: Visit, piece: str, seconds: float) -> None:
    """In this process. SystemExit, or whatever a piece raises, when it did not come to its end."""
    import torch

    from dq.disk import write_json
    from dq.kernels.triton import configs
    from eval.experiments import rows

    stamp = rows.stamp("cpu" if visit.rehearsal else "cuda", PACKAGES) | (
        {"rehearsal": True} if visit.rehearsal else {}
    )
    journal = visit.out / f"recorded-{piece}.json"
    finished = read(journal).get("recorded", [])

    def finish(key: str) -> None:
        finished.append(key)
        write_json(journal, {"recorded": finished})

    def note(what: str, contender: str, shape: tuple[int, ...], ms: float | None, operations: int = 0, **more) -> None:
        row = {"what": what, "contender": contender, "shape": list(shape)}
        row |= {} if ms is None else {"ms": round(ms, 5)}
        row |= more | ({"tera_ops": round(operations / ms / 1e9, 1)} if operations and ms else {})
        rows.add(visit.rows, row | stamp, KEYS)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    options = SimpleNamespace(
        visit=visit, piece=piece, stamp=stamp, seconds=0.001 if visit.rehearsal else 0.3, finish=finish,
        until=time.monotonic() + seconds * (0.5 if visit.rehearsal else 0.9), recorded=finished.__contains__,
        write=lambda name, found: write_json(visit.out / name, found),
    )  # fmt: skip
    torch.manual_seed(0)
    pieces()[piece](options, note)
    if piece.startswith("tune") and configs.cache_file(configs.architecture()).exists():
        file = configs.cache_file(configs.architecture())
        (visit.out / file.name).write_text(file.read_text())


# --- all of them -----------------------------------------------------------------------------------------------------


def install(visit: Visit) -> None:
    """Unpack wheels without a network into a folder of the visit, once."""
    if visit.wheels is None or visit.site.exists():
        return
    wheels = sorted(map(str, visit.wheels.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"visit: no wheels in {str(visit.wheels)!r}, expected *.whl")
    # without their dependencies: the machine has them, or the piece that needs one says so
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--target",
            str(visit.site),
            *wheels,
        ],
        check=True,
    )


def start(visit: Visit, piece: str, seconds: float) -> tuple[int, str]:
    """Run a piece in a process of its own -> (exit code, its last line); 124 when it was out of time."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(visit.out), "--inside", piece]
    command += ["--seconds", str(seconds)] + (["--rehearse"] if visit.rehearsal else [])
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "DQ_CACHE": str(visit.out / "cache")}
    environment.setdefault("TRITON_CACHE_DIR", str(visit.out / "cache" / "triton"))
    if visit.rehearsal:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DQ_CHOICE": "static"}
    log = visit.out / f"{piece}.txt"
    with log.open("a") as file:
        try:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    return code, (log.read_text(errors="replace").strip().splitlines() or [""])[-1][:200]


def go(visit: Visit, wanted: list[str], minutes: float, bound: float) -> int:
    """Run the pieces that are not done -> exit code: 0 when all of the wanted ones are."""
    from dq.disk import write_json
    from eval.experiments import rows

    visit.out.mkdir(parents=True, exist_ok=True)
    install(visit)
    about = {"commit": rows.stamp()["commit"], "rehearsal": visit.rehearsal}
    state = read(visit.state)
    if state.get("about", about) != about:
        print(f"visit: {str(visit.state)!r} is of {state['about']}, this is {about}. Take another --out")
        return 2
    done, ends = state.get("pieces", {}), time.monotonic() + 60 * minutes
    for piece in wanted:
        left = min(bound, ends - time.monotonic())
        if done.get(piece, {}).get("code") == 0 or left < 10:
            continue
        began = time.monotonic()
        code, line = start(visit, piece, left)
        done[piece] = {"code": code, "seconds": round(time.monotonic() - began), "says": line}
        print(f"{piece}: {'done' if code == 0 else 'out of time' if code == 124 else f'exit code {code}'}: {line}")
        write_json(visit.state, {"about": about, "pieces": done})
        write_report(visit, done)
    return 0 if all(done.get(piece, {}).get("code") == 0 for piece in wanted) else 1


def write_report(visit: Visit, done: dict) -> None:
    """visit.md, or rehearsal.md: pieces, then every row."""
    from eval.markdown import table

    title = "A rehearsal on a CPU: no time here means anything" if visit.rehearsal else "A visit"
    found = read(visit.rows).get("rows", [])
    where = sorted({f"{row['machine']}, commit {row['commit']}, {row['versions']}" for row in found})
    names = [[name, str(each["code"]), str(each["seconds"]), each["says"]] for name, each in done.items()]
    lines = [f"# {title}", "", *where, "", *table(["piece", "exit code", "seconds", "says"], names), ""]
    columns = ("what", "contender", "shape", "ms", "tera_ops", "gb_s", "ratio", "off", "kernel", "error")
    cells = ([_cell(row.get(column, "")) for column in columns] for row in found)
    name = "rehearsal.md" if visit.rehearsal else "visit.md"
    (visit.out / name).write_text("\n".join([*lines, *table(columns, cells)]) + "\n")


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.gpu.visit", description=__doc__.partition("\n")[0])
    parser.add_argument("--pieces", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--out", type=Path, help="folder of the results: out/gpu, of a rehearsal out/gpu-rehearsal")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into a folder of --out first")
    parser.add_argument("--minutes", type=float, default=600, help="no piece goes on after so long")
    parser.add_argument("--seconds", type=float, default=LONGEST, help=f"of a piece, {LONGEST} at most")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny sizes")
    parser.add_argument("--stamp", action="store_true", help="only write .commit, which travels where .git does not")
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    out = options.out or ROOT / "out" / ("gpu-rehearsal" if options.rehearse else "gpu")
    visit = Visit(out.resolve(), options.rehearse, options.wheels)
    sys.path[:0] = [str(ROOT), str(visit.site)]  # python -I and a folder of wheels know neither
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]
    from eval.experiments import rows

    if options.stamp:
        print(f"wrote {rows.carry_commit()}")
        return
    if options.inside:
        run_piece(visit, options.inside, options.seconds)
        return
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            "eval.gpu.visit: no CUDA device is visible; run it on a machine with a GPU, or --rehearse", file=sys.stderr
        )
        raise SystemExit(2)
    raise SystemExit(go(visit, options.pieces, options.minutes, min(options.seconds, LONGEST)))


if __name__ == "__main__":
    main()
