"""House rules a machine can hold: import arrows, sizes, words, and how little loading a saved model imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import zoo

ROOT = Path(__file__).resolve().parents[1]
# lowest first; a room imports only rooms of lower or equal rank
ROOMS = (
    ("formats",),
    ("plan",),
    ("budget", "timing"),
    ("kernels", "hadamard"),
    ("clock",),
    ("layers", "drafts"),
    ("takeover",),
    ("attention", "blocks"),
    ("fusions",),
    ("sampler",),
    ("families",),
    ("recipes",),
    ("report", "files", "adapters", "loading", "hub", "saved"),
    ("records", "seen", "world"),
    ("running", "policies", "calibration", "units", "observe", "replay", "trace"),
    ("fit",),
    ("methods",),
    ("cost", "search", "sensing", "charts"),
    ("work",),
    ("api",),
    ("roofline",),
    ("bench", "widths", "peers", "race", "cli"),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
OUTSIDE = ("pipelines", "eval", "app", "demo", "tests")
# a saved model needs none of these: plans are frozen when saved
NOT_FOR_LOADING = (
    "families",
    "recipes",
    "records",
    "seen",
    "calibration",
    "trace",
    "fit",
    "methods",
    "api",
    "drafts",
    "budget",
    "cost",
    "search",
    "sensing",
    "charts",
    "work",
    "cli",
    "bench",
    "roofline",
    "widths",
    "peers",
    "race",
)
FORBIDDEN = ("utils", "util", "helper", "helpers", "manager", "handler")
FUNCTION_LINES, FILE_LINES, KERNEL_FILE_LINES = 50, 450, 600  # the rule is 35 and 400 for most
SOURCES = sorted((ROOT / "dq").rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def room(path):
    parts = path.relative_to(ROOT / "dq").parts
    return parts[0].removesuffix(".py")


def imports(tree):
    """(module name, whether outside of functions) of every import; `from dq import x` counts as dq.x."""
    inside = {id(node) for found in ast.walk(tree) if isinstance(found, ast.FunctionDef) for node in ast.walk(found)}
    for node in ast.walk(tree):
        eager = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            deeper = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((name, eager) for name in (deeper if node.module == "dq" else (node.module,)))


@each_source
def test_imports_point_one_way(path):
    here = room(path)
    assert here == "__init__" or here in RANK, f"give {here!r} a place in ROOMS"
    for name, eager in imports(ast.parse(path.read_text())):
        assert name.split(".")[0] not in OUTSIDE, f"{path.name} imports {name}: nothing points back"
        if name.startswith("dq.") and here != "__init__" and eager:
            target = RANK.get(name.split(".")[1], 0)
            assert target <= RANK[here], f"{path.name} imports {name}, which stands above it"


@each_source
def test_files_and_functions_are_small(path):
    text = path.read_text()
    most = KERNEL_FILE_LINES if "kernels" in path.parts else FILE_LINES
    assert len(text.splitlines()) <= most
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


@each_source
def test_names_say_what_a_thing_is(path):
    tree = ast.parse(path.read_text())
    named = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    words = {word for name in [*named, *path.relative_to(ROOT).parts] for word in re.split(r"[._]", name.lower())}
    assert not words & set(FORBIDDEN)
    assert ast.get_docstring(tree), "a module says what it is"


def run(code):
    """Run Python in a fresh process from the repository root; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_dq_is_light():
    out = run("import sys, dq; print(*(name for name in sys.modules if name.startswith('dq')))")
    loaded = {name.split(".")[1] for name in out.split() if "." in name}
    assert not loaded & set(NOT_FOR_LOADING), loaded


def test_loading_a_saved_model_imports_neither_families_nor_recipes_nor_the_fit_half(tmp_path):
    import dq

    name = "PixArtTransformer2DModel"
    model = zoo.build(name)
    dq.quantize(model, "int8", progress=False)
    model.save_pretrained(tmp_path)
    out = run(
        f"""
        import sys
        import dq
        from diffusers import {name}
        from tests import zoo
        model = {name}.from_pretrained({str(tmp_path)!r})
        zoo.call(model, zoo.ENTRIES[{name!r}], dtype=model.dtype)
        print(*(name for name in sys.modules if name.startswith("dq.")))
        """
    )
    loaded = {module.split(".")[1] for module in out.split() if module.startswith("dq.")}
    assert "layers" in loaded and not loaded & set(NOT_FOR_LOADING), loaded
