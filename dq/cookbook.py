"""The named recipes: the data-free ones as data, those of `dq.methods` found by listing that folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from dq.disk import read_json
from dq.errors import DQError, naming, nearest
from dq.plan import Keeping, Plan, Recipe

DATA_FREE = (
    Recipe("int8", linear=("int8/channel", "int8/token"), conv=("int8/channel", "int8a/tensor")),
    # SageAttention (Zhang et al., 2410.02367): attention in bytes, on top of int8
    Recipe(
        "sageattention-int8",
        ("int8/channel", "int8/token"),
        ("int8/channel", "int8a/tensor"),
        attention="int8",
        status="experimental",
    ),
    # SageAttention2 (Zhang et al., 2411.10958): queries and keys in 4 bits, emulated
    Recipe(
        "sageattention2",
        ("int8/channel", "int8/token"),
        ("int8/channel", "int8a/tensor"),
        attention="sage2",
        status="experimental",
    ),
    Recipe("fp8", linear=("fp8/channel", "fp8/token"), conv=("fp8/channel", "fp8/tensor"), status="experimental"),
    # OCP MX v1.0 (2023): activations have one scale for 32 values, too; a convolution's are not in such blocks
    Recipe("mxfp8", linear=("mxfp8", "mxfp8"), conv=("mxfp8", None), status="experimental"),
    # HiF8 (Luo et al., 2409.16626) with a scale a row and token where OSP-Next has one a tensor; no unit of the chips
    # that dq knows multiplies it
    Recipe("hif8", linear=("hif8/channel", "hif8/token"), conv=("hif8/channel", "hif8/tensor"), status="experimental"),
    Recipe("hif8-weight", linear=("hif8/channel", None), conv=("hif8/channel", None), status="experimental"),
    Recipe("int8-weight", linear=("int8/channel", None), conv=("int8/channel", None)),
    Recipe("int4-weight", linear=("int4/group:64", None), conv=("int4/group:64", None)),
    Recipe("nvfp4-weight", linear=("nvfp4", None), conv=("nvfp4", None)),
    Recipe("mxfp4-weight", linear=("mxfp4", None), conv=("mxfp4", None)),
)
# of models whose weights have codes already, in a file or in layers of another library; dq/bridges
KEEPING = {wish.name: wish for wish in (Keeping("stored"), Keeping("stored-int8", "int8/token"))}
RECIPES = {recipe.name: recipe for recipe in DATA_FREE}
# what `a+b` adds to a recipe: fields of Recipe
ADDED: dict[str, dict] = {
    "sixbit": {"route": 6.0, "late": ("int8/token",)},
    "qsched": {"sampler": "qsched"},
    "qandc": {"sampler": "qandc"},
    "interval": {"cache": "interval"},
    "firstblock": {"cache": "firstblock"},
    "taylorseer": {"cache": "taylorseer"},
    "sageattention-int8": {"attention": "int8"},
    "sageattention2": {"attention": "sage2"},
    "deltacache": {"cache": "deltacache"},
    "dgq-attention": {"attention": "dgq"},
    "qdiffusion-attention": {"attention": "qdiffusion"},
    "adalog-attention": {"attention": "adalog"},
}
NAMED = {
    "qsched-w8a8": "int8+qsched",
    "qsched-w4a8": "gptq-w4a8+qsched",
    "qandc-w8a8": "ptq4dm-w8a8+interval:2+qandc",
    "qandc-w4a8": "qdiffusion-w4a8+interval:2+qandc",
}
WIDTH = re.compile(r"[a-z]*[-_ ]?(\d)(?:[-_ ]?bits?)?")  # a format or a width in place of a recipe: int4, w4, 4-bit


def names() -> list[str]:
    """Names of all recipes, the data-free ones first."""
    return [*RECIPES, *_fitted_names()]


def _all() -> dict[str, Recipe]:
    from dq import methods  # the fit half: only for those who ask for more than a data-free recipe

    return RECIPES | methods.recipes()


@cache
def _fitted_names() -> list[str]:
    """Names of the recipes of `dq.methods`, `<method>-<format>`, read from the files: importing those costs torch."""
    found = []
    for path in sorted(Path(__file__).with_name("methods").glob("*.py")):
        named = re.compile(rf"{path.stem}(-[a-z0-9]+(\.[0-9]+)?)+")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "RECIPES":
                texts = [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
                found += [text for text in texts if isinstance(text, str) and named.fullmatch(text)]
    return found


def for_file(recipe: str | Path | Recipe | Plan | Keeping) -> Recipe | Plan | Keeping:
    """`get`, for weights that may have codes already: also "stored" and "stored-int8", which keep those."""
    if isinstance(recipe, Keeping):
        return recipe
    return KEEPING[str(recipe)] if isinstance(recipe, str) and recipe in KEEPING else get(recipe)


def get(recipe: str | Path | Recipe | Plan) -> Recipe | Plan:
    """A recipe by name, or a recipe or plan read from a JSON path; objects pass through. `a+b` adds b to recipe a.

    Raises DQError with the nearest names for an unknown one (for a format or width: those of its bits), and for a
    broken file.
    """
    if isinstance(recipe, Recipe | Plan):
        return recipe
    text = str(recipe)
    if text in RECIPES:
        return RECIPES[text]
    text = NAMED.get(text, text)
    if "+" in text and not Path(text).is_file():
        return _combined(*text.split("+"))
    if text.endswith(".json") or Path(text).is_file():
        data = read_json(text)
        with naming(text):
            return Plan.from_dict(data) if "layers" in data else Recipe.from_dict(data)
    known = names()
    if text in KEEPING:
        raise DQError(f"recipe {text!r} keeps codes that weights have already; these are in full precision")
    if text not in known:
        shown = text[:100]
        raise DQError(f"recipe {shown!r} is unknown, {_of_width(shown, known) or nearest(shown, known)}")
    return _all()[text]


def _combined(first: str, *more: str) -> Recipe:
    """`a+b`: a recipe with what the others add to it, in the order in which they run: layers, then the scheduler."""
    found = get(first)
    if isinstance(found, Plan):
        raise DQError(f"recipe {first!r} is a plan, in which all is decided; expected a recipe before the '+'")
    for name in more:
        head, _, value = name.partition(":")
        fields = ADDED.get(head)
        if fields is None or (value and "cache" not in fields):
            raise DQError(f"recipe: {name[:100]!r} cannot be added to another, {nearest(name[:100], ADDED)}")
        fields = {key: f"{kind}:{value}" if value else kind for key, kind in fields.items()}
        if taken := next((key for key in fields if getattr(found, key)), None):
            raise DQError(f"recipe: {name!r} sets {taken}, which {found.name!r} has already; leave one out")
        found = replace(found, name=f"{found.name}+{name}", **fields)
        found.check()
    return found


def _of_width(text: str, known: Iterable[str]) -> str:
    """For a format or a width, the clause that names the recipes whose name says that their weights have it."""
    width = WIDTH.fullmatch(text.lower())
    fits = [name for name in known if width and re.search(rf"(int|fp|w){width[1]}(?!\d)", name)]
    return f"expected with {width[1]}-bit weights one of {', '.join(fits)}" if fits else ""
