"""Versions of result rows: a hash of the code behind a figure, so that a test can call a row old.

Comments, docstrings, annotations, layout, imports, the place of a definition and the status of a recipe change no
figure and do not count: a file may be moved or cut in two and its rows stay what they were. Of C++ the includes count,
the files' names and order do not.
"""

import ast
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("RECIPES", "DATA_FREE")  # what files of recipes call theirs
STATUSES = ("stable", "experimental")
PLACES = (ast.Import, ast.ImportFrom)
PASSED = ("dq", "dq.errors", "dq.disk", "dq.schema")  # these read, write and refuse, and decide no figure


def code(roots: Iterable[Path]) -> str:
    """Definitions of all files of dq that `roots` reach by imports, in an order of their own."""
    return "\n".join(sorted({definition for path in sources(roots) for definition in definitions(path)}))


def definitions(path: Path) -> Iterator[str]:
    """Source of each top-level statement of a file, without imports, comments, docstrings, annotations and layout."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(...)  # a field stays a field
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in RECIPES:
            _without_status(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            node.body = [item for item in body if not isinstance(item, PLACES)] or [ast.Pass()]
    yield from map(ast.unparse, tree.body)


def _without_status(recipes: ast.Assign) -> None:
    for node in ast.walk(recipes):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "status"]
        if isinstance(node, ast.Constant) and node.value in STATUSES:
            node.value = ""


def sources(roots: Iterable[Path]) -> set[Path]:
    """The files among `roots`, and those of dq that they import, lazily or not."""
    todo, found = list(roots), set()
    while todo:
        path = todo.pop()
        if path not in found and path.exists():
            found.add(path)
            todo += _imported(path)
    return found


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dq":
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                place = ROOT / name.replace(".", "/")
                yield from (place.with_suffix(".py"), place / "__init__.py") if name not in PASSED else ()


# what may hold the signs of a comment comes first, so that it is left as it is
CPP = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def native(paths: Iterable[Path]) -> str:
    """C++ sources without comments and layout, in an order of their own."""
    return "\n".join(sorted(_uncommented(path.read_text()) for path in paths))


def _uncommented(text: str) -> str:
    def kept(match: re.Match) -> str:
        return " " if match[0].startswith(("//", "/*")) else match[0]

    return " ".join(CPP.sub(kept, text).split())


def crc(text: str) -> str:
    """crc32 of a text, 8 hex digits."""
    return f"{zlib.crc32(text.encode()):08x}"
