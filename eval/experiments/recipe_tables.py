"""Tables of what code says of itself: every recipe, and every kernel backend. docs/recipes.md is made of them.

A recipe is stable when rows of both embedded models are committed and its linears are served by plain torch or by a
stable kernel that was timed, in the format's own arithmetic; else it is experimental. `Recipe.status` says so by hand,
and a test compares it with this rule.
"""

from __future__ import annotations

import re
from functools import cache

from dq import cookbook, kernels, methods
from dq.attentionplan import WISHES
from dq.kernels.triton import chips, configs
from dq.plan import Recipe
from eval.experiments import matrix, rows
from eval.markdown import table
from pipelines import tiny

NEAREST = "rounded to nearest"
UNITS = ("int8", "fp8", "nvfp4")
TITLE = re.compile(r"(?P<name>[^:]+): (?P<idea>.*?)\. (?P<source>.+)", re.DOTALL)


def recipes() -> list[str]:
    """Markdown lines: what each recipe does to linears and convolutions, whose idea it is, and what it needs."""
    head = ["recipe", "linears", "convolutions", "method", "calibration", "status"]
    return table(head, map(_cells, map(cookbook.get, cookbook.names())))


def _cells(recipe: Recipe) -> list[str]:
    layers = [_layers(recipe, kind) for kind in ("linear", "conv")]
    wish = WISHES.get(recipe.attention)
    found = _method(recipe) + (f"; attention by {wish.source}" if wish else "")
    return [f"`{recipe.name}`", *layers, found, "yes" if recipe.needs_calibration else "no", recipe.status]


def _layers(recipe: Recipe, kind: str) -> str:
    """Formats of a kind of layer: weights, or those a method chooses among, and activations."""
    weight, act = getattr(recipe, kind)
    acts = recipe.options.get("acts", (act,)) if kind == "linear" else (act,)
    formats = " or ".join(recipe.options.get("choices", (weight,))) + (f" x {' or '.join(acts)}" if act else "")
    if kind == "linear":
        pairs = zip(recipe.late, recipe.switch, strict=not recipe.route)
        formats += "".join(f", after {share:.0%} of the steps {late}" for late, share in pairs)
        formats += f" or {recipe.late[0]} by a rule, {recipe.route:g} bits on average" if recipe.route else ""
    return formats + (", emulated" if matrix.emulated_on_cpu(recipe, kind) else "")


def _method(recipe: Recipe) -> str:
    """Name and source of a method, from the first line of its file."""
    if not recipe.method:
        return NEAREST
    title = (methods.files()[recipe.method].__doc__ or "").partition("\n\n")[0]
    found = TITLE.fullmatch(title)
    if found is None:
        raise ValueError(
            f"dq/methods/{recipe.method}.py: got {title!r}, expected `NAME: idea. Source.` on its first line"
        )
    return f"{found['name']} ({found['source'].rstrip('.')})"


def backends() -> list[str]:
    """Markdown lines: the kernel backends, preferred first, what they are and whether they were tried."""
    found = kernels.backends().items()
    return table(
        ["backend", "is", "status"],
        [[f"`{name}`", _first_sentence(module.__doc__), module.STATUS] for name, module in found],
    )


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split()).rstrip(".")


def status(recipe: Recipe) -> str:
    """What the rule says of a recipe: "stable" or "experimental"."""
    fast = matrix.PROCESSORS[0]
    given = matrix.plan("linear", recipe.linear)
    with kernels.imagined(fast.machine):
        name, _ = kernels.chosen("linear", given, fast.device, None, "auto")
    module = kernels.backends()[name]
    emulated = kernels.emulates(name, "linear", given)
    served = module.STATUS == "stable" and not emulated
    tried = recipe.linear[1] is None or matrix.timed(module.label("linear", given), fast)
    return "stable" if served and tried and _measured(recipe.name) == set(tiny.NAMES) else "experimental"


@cache
def _measured(name: str) -> set[str]:
    """The embedded models of which there are rows of pictures."""
    quality = {row["model"] for row in rows.read(rows.FOLDER / "quality.json") if row["recipe"] == name}
    return quality | {row["model"] for row in rows.read(rows.FOLDER / "methods.json") if row["row"] == name}


def gpus() -> list[str]:
    """Markdown lines: the GPUs that kernels are compiled for, and whether anything was timed on one."""
    lines = []
    for arch in sorted({*configs.ARCHITECTURES, *configs.NEAREST}, key=_by_maker):
        units = [_unit(unit, arch) for unit in UNITS if chips.missing(unit, arch) is None]
        timed = f"{len(configs.shipped(arch)['best'])} problems" if configs.measured(arch) else "no"
        lines.append([f"`{arch}`", matrix.GPUS.get(arch, ""), ", ".join(units), f"`{configs.nearest(arch)}`", timed])
    return table(["architecture", "for example", "matrix units that kernels use", "tile sizes of", "timed"], lines)


def _by_maker(arch: str) -> tuple[bool, int]:
    """NVIDIA's chips first, older ones first."""
    return arch.startswith("gfx"), int(re.sub(r"\D", "", arch))


def _unit(unit: str, arch: str) -> str:
    since = chips.SINCE.get((arch, unit))
    return unit if since is None else f"{unit} (Triton {chips.dotted(since)})"


if __name__ == "__main__":
    print("\n".join([*recipes(), "", *backends()]))
