"""Every page of docs/ runs from top to bottom in what looks like a clone: Python as it stands, commands in order.

A page has a folder of its own. `python` blocks run, each in a fresh namespace; of `sh` blocks every line runs; blocks
with a title are written to that file. What is not to run says why in a comment above: `<!-- not run: reason -->`.
Blocks of other languages are text; `py` blocks only show a file of the repository.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dq
from dq import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(
    r"(?:^<!-- not run: *(?P<reason>.*?) *-->\n)?^(?P<ticks>```+)(?P<head>.*)\n(?P<body>(?:.*\n)*?)^(?P=ticks)$",
    re.MULTILINE,
)
HEAD = re.compile(r'(?: \{\.)?(\w*)(?: title="(.*)")?\}?')  # ruff formats what begins with "py", so a file is "{.py"
INCLUDE = re.compile(r'--8<-- "(.+)"\n')
RUN, SHOWN = ("python", "sh"), ("py", "text", "yaml", "json")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())


class Block(NamedTuple):
    """A fenced block of a page. reason: why it does not run, None for one that does."""

    line: int
    language: str
    title: str
    body: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        language, title = HEAD.fullmatch(match["head"]).groups(default="")
        line = text[: match.start("ticks")].count("\n") + 1
        found.append(Block(line, language, title, match["body"], match["reason"]))
    return found


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone from inside, with a cache of its own; the kernels' choice is put back after."""
    for name in ("pipelines", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DQ_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    dq.set_backend("auto")
    torch._dynamo.reset()


def run(command: str, monkeypatch) -> None:
    """One line of a shell: `dq ...`, or `python -m ...`."""
    words = shlex.split(command)
    with pytest.raises(SystemExit) as left:
        if words[0] == "dq":
            monkeypatch.setattr(sys, "argv", words)
            cli.main()
        assert words[:2] == ["python", "-m"], f"{command}: say above the block why it does not run"
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        sys.exit(0)
    assert left.value.code in (0, None), command


@each_page
def test_a_page_runs_from_top_to_bottom(page, clone, monkeypatch):
    for block in blocks(page.read_text()):
        if block.reason is not None or (block.language not in RUN and not block.title):
            continue
        try:
            if block.language == "sh":
                for command in filter(None, map(str.strip, block.body.splitlines())):
                    run(command, monkeypatch)
            elif block.language == "python":
                (clone / "fresh.py").write_text(block.body)
                runpy.run_path("fresh.py", run_name="__main__")  # not a process: importing torch again takes longest
            elif block.language in ("text", "yaml", "json"):
                (clone / block.title).write_text(block.body)
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)}, line {block.line}")
            raise


@each_page
def test_what_does_not_run_says_why(page):
    text = page.read_text()
    found = blocks(text)
    assert text.count("\n```") == 2 * len(found), "a fence is not closed, or is indented"
    for block in found:
        where = f"line {block.line}"
        assert block.language in RUN + SHOWN, f"{where}: language {block.language!r}, expected one of {RUN + SHOWN}"
        if block.language == "py":
            assert block.title and INCLUDE.fullmatch(block.body), f"{where}: `py` shows a whole file, `python` runs"
            assert INCLUDE.fullmatch(block.body)[1] == block.title
        if block.reason is not None:
            assert block.language in RUN and len(block.reason.split()) >= 3, f"{where}: why does it not run?"
    reasons = [block.reason for block in found if block.reason is not None]
    assert text.count("<!-- not run") == len(reasons), "a comment `not run` stands above no block"


def test_a_block_is_read_with_its_reason_title_and_line():
    text = 'a\n\n<!-- not run: needs a GPU here -->\n```python\nx\n```\n\n```yaml title="s.yaml"\ny\n```\n'
    one, two = blocks(text)
    assert one == Block(4, "python", "", "x\n", "needs a GPU here")
    assert two == Block(8, "yaml", "s.yaml", "y\n", None)


def test_a_command_that_fails_fails_the_page(clone, monkeypatch):
    with pytest.raises(AssertionError, match="dq inspect"):
        run("dq inspect nothing", monkeypatch)
    with pytest.raises(AssertionError, match="say above the block why"):
        run("make test", monkeypatch)
