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
# lowest first; a room (a file or a folder of dq/) imports only from itself and from rooms below it
ROOMS = (
    # run half: all that a saved model needs
    "version",
    "errors",
    "disk",
    "timing",
    "formats",
    "surroundings",
    "tensorplan",
    "attentionplan",
    "plan",
    "schema",
    "kernels",
    "layers",
    "fusions",
    "sampler",
    "model",
    "report",
    "explaining",
    "host",
    # fit half: from a running pipeline to a plan and to weights
    "families",
    "cookbook",
    "planning",
    "bridges",
    "trace",
    "fit",
    "methods",
    "budget",
    "around",
    "stages",
    "api",
    "export",
    # measuring half
    "bench",
    "cli",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}
# imports that go up all the same, each inside a function: (file, room) and why
UPWARD = {
    ("plan.py", "schema"): "pydantic is imported by who reads a file; the schema takes its words from the plan",
    ("host/config.py", "cookbook"): "quantizing while loading names a recipe; a saved model carries its plan instead",
    ("host/config.py", "planning"): "quantizing while loading plans the model; a saved model carries its plan instead",
    ("cookbook.py", "methods"): "recipes stand in the files of their methods; only asking for one of those reads them",
}
OUTSIDE = ("pipelines", "eval", "app", "demo", "tests")
# a saved model needs none of these: plans are frozen when saved
NOT_FOR_LOADING = ROOMS[ROOMS.index("host") + 1 :]
FORBIDDEN = ("utils", "util", "helper", "helpers", "manager", "handler")
FUNCTION_LINES, FILE_LINES, KERNEL_FILE_LINES = 50, 450, 600  # the rule is 35 and 400 for most
SOURCES = sorted((ROOT / "dq").rglob("*.py"))
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def room(path):
    return path.relative_to(ROOT / "dq").parts[0].removesuffix(".py")


def imports(tree):
    """(module name, whether inside a function) of every import; `from dq import x` counts as dq.x."""
    inside = {id(node) for found in ast.walk(tree) if isinstance(found, ast.FunctionDef) for node in ast.walk(found)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            deeper = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((name, id(node) in inside) for name in (deeper if node.module == "dq" else (node.module,)))


def climbs(path):
    """(room above, whether inside a function) of every import of a file that goes up."""
    here = RANK[room(path)]
    for name, lazy in imports(ast.parse(path.read_text())):
        if name.startswith("dq.") and RANK[name.split(".")[1]] > here:
            yield name.split(".")[1], lazy


def test_every_room_exists_and_has_one_rank():
    there = {room(path) for path in SOURCES} - {"__init__"}
    assert sorted(ROOMS) == sorted(there), "one rank a room, and no room that does not exist"


@each_source
def test_imports_point_one_way(path):
    for name, _ in imports(ast.parse(path.read_text())):
        assert name.split(".")[0] not in OUTSIDE, f"{path.name} imports {name}: nothing points back"
    if room(path) != "__init__":
        place = path.relative_to(ROOT / "dq").as_posix()
        for above, lazy in climbs(path):
            assert lazy and (place, above) in UPWARD, f"{place} imports {above}, which stands above it"


def test_the_list_of_imports_that_go_up_is_the_shortest():
    found = {
        (path.relative_to(ROOT / "dq").as_posix(), above)
        for path in SOURCES
        if room(path) in RANK
        for above, _ in climbs(path)
    }
    assert found == set(UPWARD) and all(UPWARD.values())


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_circle_inside_or_between_rooms():
    """Eager imports between files, packages' __init__ included, form no circle."""
    modules = {module_of(path): path for path in SOURCES}
    arrows = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        targets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in inside and (node.module or "").startswith("dq"):
                for alias in node.names:
                    deeper = f"{node.module}.{alias.name}"
                    targets.add(deeper if deeper in modules else node.module)
        arrows[name] = targets - {name, "dq"}
    order, state = [], {}

    def visit(name, trail):
        assert state.get(name) != "open", f"circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name in state:
            return
        state[name] = "open"
        for target in sorted(arrows.get(name, ())):
            visit(target, [*trail, name])
        state[name] = "done"
        order.append(name)

    for name in modules:
        visit(name, [])
    assert len(order) == len(modules)


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
