"""What runs where: number formats by processors, made by asking every backend about machines that are not here.

native         multiplied in the format's own arithmetic
decoded        weights unpacked to the compute dtype in every call, then a product in floating point
weight-only    the same with activations that the plan rounds and nobody multiplies there
emulated       activations rounded as a kernel would, the product in floating point: right, and never fast
not measured   no row of eval/results has a time of that kernel on such a processor
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from dq import cookbook, kernels
from dq.kernels import Conv, Machine
from dq.plan import STATUS, LayerPlan, Recipe, TensorPlan
from eval.experiments import rows
from eval.markdown import table

SHAPES = {"linear": (1152, 1152), "conv": (320, 320, 3, 3)}
CONV = Conv((1, 1), (1, 1), (1, 1), 1)
AVX512 = ("avx512_vnni", "avx512_bf16")
UNTIMED = ", not measured"
TIMES = ("speed.json", "layers.json", "pipelines.json", "kernels.json", "eval.json", "gpu_kernels.json")

Pair = tuple[str, str | None]  # formats of a weight and of activations, as recipes write them


@dataclass(frozen=True)
class Processor:
    """A column. name: as it is shown; machine: what backends are told about it."""

    name: str
    machine: Machine

    @property
    def device(self) -> str:
        return "cuda" if self.machine.gpu else "cpu"

    def owns(self, row: dict) -> bool:
        """Whether a row was measured on such a processor, not on one whose higher levels were hidden."""
        if rows.limited(row):
            return False
        if self.device == "cuda":
            return f"({self.machine.gpu})" in row["machine"]
        if self.machine.vnni:
            return all(unit in row["machine"] for unit in AVX512)
        return " cores " in row["machine"] and "vnni" not in row["machine"]


PROCESSORS = (
    Processor("CPU, AVX512-VNNI and bf16", Machine()),
    Processor("x86 with AVX2", Machine(vnni=False, level="avx2")),
    *(Processor(gpu, Machine(gpu)) for gpu in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")),
    *(Processor(gpu, Machine(gpu)) for gpu in ("gfx942", "gfx950")),
)
GPUS = {"sm_80": "A100", "sm_86": "RTX 30", "sm_87": "Orin", "sm_89": "RTX 40, L4", "sm_90": "H100", "sm_100": "B200"}
GPUS |= {"sm_103": "B300", "sm_120": "RTX 50", "sm_121": "DGX Spark", "gfx942": "MI300", "gfx950": "MI350"}


def pairs(kind: str, statuses: Iterable[str] = STATUS) -> list[Pair]:
    """Every pair of formats that some recipe of a status gives to "linear" or "conv" layers, each once."""
    recipes = map(cookbook.get, cookbook.names())
    return list(dict.fromkeys(getattr(recipe, kind) for recipe in recipes if recipe.status in statuses))


def plan(kind: str, pair: Pair) -> LayerPlan:
    """A layer of a common size in these formats."""
    shape, (weight, act) = SHAPES[kind], pair
    name = "linear" if kind == "linear" else "conv2d"
    return LayerPlan(name, shape, TensorPlan.parse(weight), TensorPlan.parse(act) if act else None)


def word(kind: str, pair: Pair, processor: Processor) -> str:
    """How a layer runs: native, decoded or emulated, and whether that was ever timed there."""
    given = plan(kind, pair)
    with kernels.imagined(processor.machine):
        name, _ = kernels.chosen(kind, given, processor.device, CONV if kind == "conv" else None, "auto")
        label = kernels.backends()[name].label(kind, given)
    if kernels.emulates(name, kind, given):
        return "emulated"
    if kernels.leaves_floating(name, kind, given):
        return "weight-only" if timed(label, processor) else "weight-only" + UNTIMED
    how = "decoded" if given.act is None else "native"
    return how if timed(label, processor) else how + UNTIMED


def timed(label: str, processor: Processor) -> bool:
    """Whether a row has milliseconds of that kernel on such a processor; codes with zero points run the same one."""
    return any(_plain(label) in labels and processor.owns(row) for row, labels in _timed_rows())


@cache
def _timed_rows() -> list[tuple[dict, set[str]]]:
    """Rows that have a time, and what they say ran."""
    found = []
    for row in (row for name in TIMES for row in rows.read(rows.FOLDER / name) if "error" not in row):
        if "figures" in row:
            names = {} if row["missing"] or row["emulated"] else row["figures"]["kernels"]
        else:
            lines = [line["kernel"] for line in row.get("lines", [])]
            names = [] if row.get("emulated") else [*row.get("kernel", "").split(", "), *lines]
        found.append((row, set(map(_plain, names))))
    return found


def _plain(label: str) -> str:
    return re.sub(r"\b(int\d)a\b", r"\1", label)


def matrix(kinds: Iterable[str] = ("linear", "conv"), statuses: Iterable[str] = STATUS) -> list[str]:
    """Markdown lines: a row per pair of formats of recipes, a column per processor; alike ones become one."""
    listed = [(kind, pair) for kind in kinds for pair in pairs(kind, statuses)]
    columns: list[tuple[list[Processor], list[str]]] = []
    for processor in PROCESSORS:
        words = [word(kind, pair, processor) for kind, pair in listed]
        alike = columns and columns[-1][1] == words and columns[-1][0][0].device == processor.device
        if alike:
            columns[-1][0].append(processor)
        else:
            columns.append(([processor], words))
    found: dict[tuple, list[str]] = {}
    shown = [words if _measured(words) else [each.removesuffix(UNTIMED) for each in words] for _, words in columns]
    for (kind, (weight, act)), *words in zip(listed, *shown, strict=True):
        name = ("convolution, " if kind == "conv" else "") + weight
        found.setdefault((name, *words), []).append(act or "floating point")
    heads = [_head(group) + ("" if _measured(words) else f": {UNTIMED[2:]}") for group, words in columns]
    lines = [[name, ", ".join(acts), *words] for (name, *words), acts in found.items()]
    return table(["weights", "activations", *heads], lines)


def _measured(words: Iterable[str]) -> bool:
    """Whether anything of a column was timed; else its head says that nothing was, once for all."""
    return any(each in ("native", "decoded", "weight-only") for each in words)


def _head(group: list[Processor]) -> str:
    if group[0].device == "cpu":
        return ", ".join(processor.name for processor in group)
    return ", ".join(f"{processor.name} ({GPUS[processor.name]})" for processor in group)


def emulated_on_cpu(recipe: Recipe, kind: str) -> bool:
    """Whether a recipe's layers of a kind are emulated even where dq's CPU kernels run."""
    return word(kind, getattr(recipe, kind), PROCESSORS[0]) == "emulated"


if __name__ == "__main__":
    print("\n".join(matrix()))
