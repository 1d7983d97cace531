"""The table of times and verdicts: whole whoever writes it, read by later processes, measured anew when damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dq.kernels import times
from tests.kernels.injected import inject, linear

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_two_writers_keep_each_others_rows(tmp_path):
    path = tmp_path / "ms.json"
    one, other = times.Table(path, {}), times.Table(path, {})
    one.add("a", {"x": 1.0})
    other.add("a", {"y": 2.0})
    other.judge("b", {"x": "wrong"})
    one.add("c", {"x": 3.0})
    found = times.Table(path, {})
    assert found.ms == {"a": {"x": 1.0, "y": 2.0}, "c": {"x": 3.0}} and found.verdicts == {"b": {"x": "wrong"}}
    assert ("a", "y") in found and found["a", "y"] == 2.0 and ("a", "z") not in found


def test_many_processes_write_at_once_and_nothing_is_lost(tmp_path):
    code = "import sys; from pathlib import Path; from dq.kernels import times\n"
    code += "t = times.Table(Path(sys.argv[1]), {})\nfor i in range(10): t.add(f'{sys.argv[2]} {i}', {'x': 1.0})"
    path = tmp_path / "ms.json"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], cwd=ROOT) for i in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert len(times.Table(path, {}).ms) == 30


@pytest.mark.parametrize("text", ["{", "[]", '{"ms": {"a": {"dense": "fast"}}}', "", '{"ms": 3, "verdicts": {}}'])
@torch.no_grad()
def test_a_damaged_file_is_measured_anew(monkeypatch, tmp_path, text):
    measured = inject(monkeypatch, tmp_path, {"dense": 2.0, "full": 3.0})
    path = times.table(CPU).path
    times._table.cache_clear()
    path.write_text(text)
    layer = linear()
    layer(torch.randn(5, 40))
    assert len(measured.asked) == 1 and layer.choice.speedup == 1.5
    (row,) = json.loads(path.read_text())["ms"].values()
    assert row == {"dense": 2.0, "full": 3.0}


@torch.no_grad()
def test_a_cache_that_cannot_be_written_costs_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    measured = inject(monkeypatch, tmp_path / "file", {"full": 3.0})
    layer, other = linear(), linear()
    layer(torch.randn(5, 40)), other(torch.randn(5, 40))
    assert len(measured.asked) == 1 and other.choice.speedup == 3


def test_threads_and_native_kernels_have_tables_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    before = times.table(CPU)
    assert times.table(CPU) is before and before.what["torch"] == torch.__version__
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert times.table(CPU).path != before.path
    monkeypatch.undo()
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    known = times._machine()
    monkeypatch.setattr(times, "_machine", lambda: known | {"native": "another"})
    times._table.cache_clear()
    assert times.table(CPU).path != before.path
