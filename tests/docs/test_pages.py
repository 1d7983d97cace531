"""The pages of docs/ are true: every file, test, option, field, public name and word that they name is there."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import dq
from dq.layers import packed
from dq.plan import LayerPlan, Plan, Recipe

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"]
PLACES = re.compile(r"`((?:dq|eval|pipelines|tests|docs|demo|\.github|\.ci)/[^`\s]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def page(name):
    return (DOCS / f"{name}.md").read_text()


def section(text, head):
    """The lines below one heading, up to the next of its level."""
    level = head.partition(" ")[0]
    return text.partition(f"\n{head}\n")[2].partition(f"\n{level} ")[0]


def cells(text):
    """Rows of the tables in a text, heads left out, each a list of cells."""
    lines = text.splitlines()
    rows = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if re.match(r"\| *[^-]", row)]


def entries(nav):
    """The pages of a navigation, however deep."""
    for item in nav:
        for value in item.values() if isinstance(item, dict) else [item]:
            yield from entries(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once():
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_site_fetches_nothing_from_elsewhere():
    text = (ROOT / "mkdocs.yml").read_text()
    config = yaml.safe_load(text)
    assert config["theme"]["font"] is False and "://" not in text
    assert not {"extra_javascript", "extra_css", "repo_url"} & config.keys()


@each_page
def test_files_that_a_page_names_are_there(page):
    for place in PLACES.findall(page.read_text()):
        if "NAME" not in place and "*" not in place:  # a pattern
            assert (ROOT / place).exists(), place


@each_page
def test_links_between_pages_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_tests_that_pages_name_are_there():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    there = set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 20 and named <= there, sorted(named - there)


def test_the_api_page_has_every_public_name_from_where_it_lives():
    shown = dict(reversed(path.rpartition(".")[::2]) for path in re.findall(r"^::: (\S+)$", page("api"), re.MULTILINE))
    for name, home in shown.items():
        found = getattr(importlib.import_module(home), name)
        assert found is getattr(dq, name, found) and found.__module__ == home, f"{name} lives in {found.__module__}"
    assert {*dq.__all__} - {"__version__"} <= shown.keys()


def test_columns_of_a_docstring_become_a_list(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    as_lists = runpy.run_path(DOCS / "docstrings.py")["as_lists"]
    text = "Does it.\n\none   first,\n      and more\ntwo, three  second\nRaises DQError.\n\n    y = a x  + b"
    wanted = (
        "Does it.\n\n\n- `one`: first,\n    and more\n- `two, three`: second\n\nRaises DQError.\n\n    y = a x  + b"
    )
    assert as_lists(text) == wanted


def test_words_of_the_glossary_stand_in_the_files_it_names():
    rows = cells(section(page("architecture"), "## Glossary"))
    assert len(rows) > 60
    for words, _, place in rows:
        text = place + (ROOT / place.strip("`")).read_text()
        for word in words.replace("`", "").split(", "):
            assert re.search(rf"(?<![a-z]){word}", text, re.IGNORECASE), f"{word!r} is not in {place}"


def test_the_tree_has_every_file_and_folder_of_the_library():
    tree = page("architecture").partition("```text\ndq/ ")[2].partition("```")[0]
    named = set(re.findall(r"^  (\S+)  ", tree, re.MULTILINE))
    there = {path.stem for path in (ROOT / "dq").glob("*.py")} - {"__init__"}
    there |= {f"{path.name}/" for path in (ROOT / "dq").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert named == there


def test_every_change_to_other_libraries_is_in_the_table():
    """What `import dq` sets in modules, classes and dicts of its hosts, by comparing them before and after."""
    code = """
        import json, sys, types
        import diffusers.loaders.lora_pipeline, peft.tuners.lora.model
        import diffusers.quantizers.auto, transformers.quantizers.auto
        from diffusers import ControlNetModel, FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
        from diffusers import UNetMotionModel
        from transformers import T5EncoderModel

        HOSTS = ("diffusers", "transformers", "peft", "accelerate", "torch")

        def look():
            found = {}
            for name, module in list(sys.modules.items()):
                if name.split(".")[0] not in HOSTS or not isinstance(module, types.ModuleType):
                    continue
                for key, value in list(vars(module).items()):
                    found[f"{name}.{key}"] = id(value)
                    if isinstance(value, type) and value.__module__ == name:
                        found |= {f"{name}.{key}.{inner}": id(x) for inner, x in list(vars(value).items())}
                    elif type(value) is dict and not key.startswith("__"):
                        found |= {f'{name}.{key}["{inner}"]': id(x) for inner, x in list(value.items())}
            return found

        before, modules = look(), set(sys.modules)
        import dq
        after = look()
        changed = [name for name in before if after.get(name) != before[name]]
        new = after.keys() - before.keys()
        changed += [name for name in new if name.endswith('["dq"]') or name.rpartition(".")[0] in before]
        print(json.dumps(changed))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = cells(section(page("architecture"), "## What `import dq` changes in other libraries"))
    found = json.loads(done.stdout.splitlines()[-1])
    of_many_classes = r"^diffusers\.models\.(?!modeling_utils\.).*\.(\w+)$"
    assert {row[0].strip("`") for row in rows} == {
        re.sub(of_many_classes, r"diffusers.models.*.\1", name) for name in found
    }


def test_the_cli_page_has_every_command_and_option():
    from typer.main import get_command

    from dq import cli

    text = page("guide/cli")
    for name, command in get_command(cli.app).commands.items():
        (part,) = re.findall(rf"^## dq {name}\b.*\n((?:(?!## ).*\n)*)", text, re.MULTILINE)
        named = {flag for row in cells(part) for flag in re.findall(r"`(--[a-z-]+)", row[0])}
        options = {flag for option in command.params for flag in option.opts if flag.startswith("--")}
        assert named == options - {"--help"}, name


@pytest.mark.parametrize("kind", [Plan, LayerPlan])
def test_the_file_format_has_every_field(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    named = {row[0].strip("`") for row in cells(page("file_format"))}
    assert fields <= {name for cell in named for name in re.split(r"`, `", cell)}


def test_the_file_format_has_every_tensor():
    named = set(re.findall(r"`NAME\.(\w+)`", page("file_format")))
    assert named == {"weight", "scale", "bias", *packed.OPTIONAL}


# not DQConfig's to override: names, and what takes data
_NOT_CONFIGS = {"name", "method", "options", "status", "sampler", "late", "switch", "route"}


@pytest.mark.parametrize(
    ("kind", "name", "elsewhere"),
    [
        (dq.Calibration, "guide/calibrate", set()),
        (dq.Budget, "guide/budget", set()),
        (dq.Tune, "guide/tuning", set()),
        (Recipe, "guide/load_time", _NOT_CONFIGS),
    ],
)
def test_a_page_has_every_argument_of_what_users_make(kind, name, elsewhere):
    fields = {field.name for field in dataclasses.fields(kind)}
    named = {word for pair in re.findall(r"`(\w+)`|\b(\w+)=", page(name)) for word in pair}
    assert fields - elsewhere <= named


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dq.__version__
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    used = {need for repo in hooks for hook in repo["hooks"] for need in hook["additional_dependencies"]}
    assert f"ruff=={pinned}" in used


def test_workflows_call_the_commands_of_the_repository():
    flows = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert ".ci/run" in flows["test"] and "make docs" in flows["docs"] and "cibuildwheel" in flows["wheel"]
    called = {name for text in flows.values() for name in re.findall(r"run: make (\w+)", text)}
    assert called <= targets, sorted(called - targets)
