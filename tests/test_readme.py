"""README is true and short: its snippets and commands run, its tables, plots and picture are the committed rows."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dq import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^dq .*$", "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)), re.MULTILINE)
MODULES = re.findall(r"`python -m (eval[.\w]*)", TEXT)
TARGETS = re.findall(r"`make (\w+)`", TEXT)
HEADS = ("Install", "Use", "Which recipe", "Quality and speed", "What runs where", "What was measured", "Read on")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone from inside: where a reader would try the snippets."""
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_read_in_one_sitting():
    assert len(TEXT.splitlines()) <= 150


def test_it_begins_with_figures_a_picture_and_how_to_install():
    places = [
        TEXT.index(what) for what in ("<!-- headline -->", "docs/pictures.png", *(f"## {head}" for head in HEADS))
    ]
    assert places == sorted(places)


def test_snippets_run_from_top_to_bottom(clone, capsys):
    (clone / "fresh.py").write_text("\n".join(SNIPPETS))
    runpy.run_path("fresh.py", run_name="__main__")  # not a process: importing torch again takes longest
    assert capsys.readouterr().out.count("layers quantized") >= 2
    assert all((clone / "out" / name).is_file() for name in ("first.png", "second.png"))


def test_the_first_snippet_has_eight_lines_and_loading_takes_two():
    first, second = ([line for line in snippet.splitlines() if line.strip()] for snippet in SNIPPETS[:2])
    assert (len(first), len(second)) == (8, 2)


def test_commands_work_in_the_order_given(clone, monkeypatch, capsys):
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, command
    assert (clone / "out" / "star.png").exists()


def test_other_commands_are_there():
    makefile = (ROOT / "Makefile").read_text()
    assert MODULES and all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in MODULES)
    assert TARGETS and all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in TARGETS)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_figures_stand_in_tables_that_rows_make():
    """Outside of them no number has a unit that is measured: it could not be made anew."""
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```", "", TEXT, flags=re.DOTALL)
    assert re.findall(r"\d[\d.]* ?(?:dB|ms|MiB|GiB|times|min\b|%)|\d[\d.]*x\b", prose) == []


def test_what_was_not_measured_is_said():
    told = TEXT.partition("## What was measured")[2]
    for word in ("FLUX", "SDXL", "Wan", "GPU"):
        assert word in told


def test_pictures_are_there_and_small():
    names = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert len(names) == 3
    for name in names:
        assert 0 < (ROOT / name).stat().st_size < 300_000
