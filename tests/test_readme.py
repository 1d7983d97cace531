"""README is true: its snippets run, its commands work, its table is the committed rows, its lists are complete."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import dq
from dq import cli
from eval.experiments import methods, quality, rows, tables

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^dq .*$", "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)), re.MULTILINE)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone from inside: where a reader would try the snippets."""
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run_in_a_fresh_file(number, clone, capsys):
    (clone / "fresh.py").write_text(SNIPPETS[number])
    runpy.run_path("fresh.py", run_name="__main__")  # not a process: importing torch again takes longest
    assert "layers quantized" in capsys.readouterr().out
    assert ("out/first.png" in SNIPPETS[number]) == (clone / "out" / "first.png").exists()


def test_the_first_snippet_has_eight_lines():
    assert len([line for line in SNIPPETS[0].splitlines() if line.strip()]) == 8


def test_commands_work_in_the_order_given(clone, monkeypatch, capsys):
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, command
    assert (clone / "out" / "star.png").exists()


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_results_tables_are_made_from_the_committed_rows(name):
    assert (tables.current(TEXT, name) or "") == tables.render(name), "run `make table`"


@pytest.mark.parametrize("module", [quality, methods])
def test_rows_are_of_the_models_that_are_shipped(module):
    for row in rows.read(module.FILE):
        name = module.__name__
        assert row["weights"] == quality.fingerprint(row["model"]), f"run `python -m {name}` and `make table`"


def test_a_method_that_does_not_beat_plain_rounding_says_why():
    found = rows.read(methods.FILE)
    assert found == [] or "no reason known" not in "".join(tables.methods(found)), "add to methods.REASONS"


def test_emulated_arithmetic_gets_no_row_of_speeds():
    row = {"what": "x", "machine": "m", "full_ms": 1.0, "quantized_ms": 2.0, "dtype": "float32", "recipe": "fp8"}
    found = [row | {"kernel": "slow one", "emulated": True}, row | {"kernel": "torch._scaled_mm", "emulated": False}]
    assert [line for line in tables.speed(found) if "slow one" in line] == []
    assert "| 0.50 |" in tables.speed(found)[-1]


def test_every_recipe_is_described():
    listed = set(re.findall(r"`([a-z0-9-]+)`", "\n".join(re.findall(r"^\| `.*$", TEXT, re.MULTILINE))))
    assert set(dq.recipes()) <= listed


def test_the_file_tree_names_every_file_of_the_library():
    tree = TEXT.split("```\ndq/ ")[1].split("```")[0]
    named = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    there = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "dq").iterdir()}
    assert named == there - {"__pycache__/", "__init__.py"}


def test_pictures_are_there_and_small():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert 0 < (ROOT / name).stat().st_size < 300_000
