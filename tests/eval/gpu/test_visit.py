"""A visit to a card, rehearsed: every piece, what goes on after a stop, and rows that no table takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton.language")

import torch

from dq.errors import DQError
from dq.kernels.triton import ops
from eval.experiments import rows
from eval.gpu import faults, tiles, visit

ROOT = Path(__file__).resolve().parents[3]
BARE = """
import runpy, sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "torchao", "sdnq", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Bare())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rehearsed(out, *pieces, root=ROOT, seconds=60):
    command = [sys.executable, "-I", str(root / "eval/gpu/visit.py"), "--rehearse", "--out", str(out)]
    return subprocess.run(
        [*command, "--seconds", str(seconds), "--pieces", *pieces],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )


@pytest.fixture
def copied(tmp_path):
    """What travels: neither .git nor an installed dq."""
    for folder in ("dq", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tree" / ".commit").write_text("abc1234\n")
    return tmp_path / "tree"


def test_a_copied_tree_without_git_rehearses_and_goes_on_where_it_stopped(copied, tmp_path):
    out = tmp_path / "out"
    first = rehearsed(out, "versions", root=copied)
    assert first.returncode == 0, first.stdout + first.stderr
    again = rehearsed(out, "versions", "ceilings", root=copied)
    assert again.returncode == 0 and "versions" not in again.stdout, "it is done"
    found = json.loads((out / "rehearsal.json").read_text())["rows"]
    assert {row["commit"] for row in found} == {"abc1234"} and all(row["rehearsal"] for row in found)
    assert {"bf16 F.linear", "_int_mm"} <= {row["contender"] for row in found}
    assert "No time here means anything" in (out / "rehearsal.md").read_text().replace("no time", "No time")
    assert not (out / "gpu_kernels.json").exists()
    with pytest.raises(DQError, match="got rows of a rehearsal"):
        rows.read(out / "rehearsal.json")


def test_without_diffusers_its_pieces_say_so(tmp_path):
    command = [sys.executable, "-c", BARE, str(ROOT / "eval/gpu/visit.py"), "--rehearse", "--out", str(tmp_path)]
    for piece in ("flux", "attention"):
        environment = {"TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--inside", piece], capture_output=True, text=True, env=environment, cwd="/")
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rehearsal.json").read_text())["rows"]
    missing = [row for row in found if row["contender"] == "diffusers"]
    assert {row["what"] for row in missing} == {"FLUX blocks", "attention"}
    assert all("diffusers" in row["error"] and "ms" not in row for row in missing)
    assert any("ms" in row for row in found if row["what"] == "attention"), "the rest of the piece ran"


def test_another_commit_does_not_go_on_in_the_same_folder(tmp_path, capsys):
    (tmp_path / "state.json").write_text(json.dumps({"about": {"commit": "old", "rehearsal": True}}))
    assert visit.go(visit.Visit(tmp_path, True), ["versions"], 1, 10) == 2
    assert "Take another --out" in capsys.readouterr().out


def test_a_piece_out_of_time_is_told_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    codes = {"versions": (124, "half"), "ceilings": (0, "whole")}
    monkeypatch.setattr(visit, "start", lambda at, piece, seconds: codes[piece])
    assert visit.go(visit.Visit(tmp_path, True), ["versions", "ceilings"], 1, 30) == 1
    said = capsys.readouterr().out
    assert "versions: out of time: half" in said and "ceilings: done: whole" in said
    codes["versions"] = (0, "whole")
    assert visit.go(visit.Visit(tmp_path, True), ["versions", "ceilings"], 1, 30) == 0


def test_a_fault_that_the_check_does_not_see_is_wrong(monkeypatch):
    for name in faults.LAUNCHES:
        monkeypatch.setattr(ops, name, lambda *args: torch.zeros(1))
    monkeypatch.setattr(tiles, "check", lambda problem: "")
    assert faults.unseen(SimpleNamespace(kernel="gemm"), "bias dropped") == "the check does not see it"


@pytest.mark.slow
def test_every_piece_is_rehearsed(tmp_path):
    """Pieces that the interpreter has no time for leave what they have."""
    done = rehearsed(tmp_path, *visit.NAMES, seconds=90)
    state = json.loads((tmp_path / "state.json").read_text())["pieces"]
    assert list(state) == list(visit.NAMES), done.stdout + done.stderr
    assert {name: each["says"] for name, each in state.items() if each["code"] not in (0, 124)} == {}
    found = json.loads((tmp_path / "rehearsal.json").read_text())["rows"]
    assert {"ceiling", "gemm", "tune", "rows", "attention"} <= {row["what"] for row in found}
