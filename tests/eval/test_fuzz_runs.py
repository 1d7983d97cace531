"""Folders of runs, suites and prompts files with any damage are read or refused in one line, and nothing else."""

from __future__ import annotations

import json

import pytest
import yaml

from dq.errors import DQError
from eval import prompts, report, summary
from eval.runs import Run
from eval.suite import Suite
from tests import mutated
from tests.eval import made_runs

pytest.importorskip("eval.reading", reason="runs, suites and prompts are read through forms there")


def told(work) -> bool:
    """Whether `work` refused in one line."""
    try:
        work()
    except DQError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return True
    return False


@pytest.fixture
def folder(tmp_path):
    made_runs.make(tmp_path / "inside" / "run", prompts=made_runs.PROMPTS[:2], side=16)
    return tmp_path / "inside" / "run"


def whole(folder):
    """All that a report and the demo read of a run."""
    run = Run(folder)
    summary.summary(run)
    for entry in run.entries("tiny-pixart"):
        if run.missing("tiny-pixart", entry) is None:
            for item in run.items:
                run.frames("tiny-pixart", entry, item.index)


def test_any_damage_to_a_file_of_a_run_is_told(folder, tmp_path):
    files = mutated.contents(folder)
    refused = 0
    for number, name in enumerate(sorted(files)):
        for seed in range(20 if name.endswith("json") else 3):
            (folder / name).write_bytes(mutated.bytes_of(files[name], 100 * number + seed))
            refused += told(lambda: whole(folder))
        (folder / name).write_bytes(files[name])
    assert refused > 50 and [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("name", ["manifest.json", "figures/tiny-pixart/int8.json", "scores/tiny-pixart/int8.json"])
def test_any_values_in_a_file_of_a_run_are_told(folder, tmp_path, name):
    path = folder / name
    good = json.loads(path.read_text("utf-8"))
    for number, data in enumerate(mutated.values(good, 60, 0)):
        path.write_text(json.dumps(data))
        if not told(lambda: whole(folder)) and number % 6 == 0:
            told(lambda: report.write(Run(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.parametrize("seed", range(2))
def test_any_line_of_items_is_told(folder, seed):
    path = folder / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for data in mutated.values(lines, 100, seed):
        path.write_text("".join(json.dumps(line) + "\n" for line in data))
        told(lambda: whole(folder))


@pytest.mark.parametrize("seed", range(3))
def test_any_suite_is_told(tmp_path, seed):
    good = made_runs.suite().to_dict() | {"timing": {"repeats": 2}, "fid": {"real": "scenes"}}
    path = tmp_path / "suite.yaml"
    for data in mutated.values(good, 50, seed):
        told(lambda data=data: Suite.from_dict(data))
        try:
            path.write_text(yaml.safe_dump(data))
        except (yaml.YAMLError, ValueError):  # an integer of more digits than it is written with
            continue
        told(lambda: Suite.read(path))
    content = yaml.safe_dump(good).encode()
    for number in range(40):
        path.write_bytes(mutated.bytes_of(content, 100 * seed + number))
        told(lambda: Suite.read(path))


FILES = {
    "a.txt": "a red circle\na blue square\n",
    "a.csv": 'prompt,other\n"a red, circle",1\na blue square,2\n',
    "a.tsv": "Prompt\tother\na red circle\t1\n",
    "a.jsonl": '{"prompt": "a red circle"}\n"a blue square"\n',
    "a.json": '{"annotations": [{"image_id": 1, "caption": "a red circle"}, {"image_id": 2, "caption": "a star"}]}',
}


@pytest.mark.parametrize("name", FILES)
def test_any_prompts_file_is_told(tmp_path, name):
    for seed in range(100):
        (tmp_path / name).write_bytes(mutated.bytes_of(FILES[name].encode(), seed))
        told(lambda: prompts.read(tmp_path / name))
    for data in mutated.values(json.loads(FILES["a.json"]), 100, 0) if name == "a.json" else ():
        (tmp_path / name).write_text(json.dumps(data))
        told(lambda: prompts.read(tmp_path / name))
