"""What each layer may become under a budget: the formats a recipe names, and those below it.

The recipe decides the kind: weight-only or with rounded activations, integers or floats, with low-rank branches or
without. Integers go from 8 bits down to 2, floats from fp8 to the 4-bit micro formats; every layer may also stay in
full precision. Convolutions with rounded activations take one scale a row or two levels of them: no kernel multiplies
by a scale for each group there. A recipe's option "choices" names the weight formats itself, as MixDQ (arXiv
2405.17873) and Qua2SeDiMo (arXiv 2412.14628) do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from dq.formats.base import Scales
from dq.formats.integer import NARROW, Integer
from dq.layers import stored_bytes
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan

GROUP = "group:64"
WIDTHS = (8, 7, 6, 5, 4, 3, 2)
FLOATS = ("fp8/channel", "nvfp4")
RANKS = (0, 16, 32)
BRANCH_SHARE = 0.25  # most of a layer's bytes that a branch may take

Choice = LayerPlan | None  # None: the layer stays in full precision
# scales of each part that a method rounds a weight (rows, columns) with before it has seen data; None: of its range
Start = Callable[[torch.Tensor, LayerPlan], list[Scales]] | None


def menus(plan: Plan, recipe: Recipe) -> dict[str, tuple[Choice, ...]]:
    """The choices of every planned layer, most exact first; the plan's own is among them."""
    return {name: menu(layer, recipe) for name, layer in plan.layers.items()}


def menu(layer: LayerPlan, recipe: Recipe) -> tuple[Choice, ...]:
    """Choices of one layer. Stacked experts have the plan's own format only."""
    if layer.kind == "stack":
        return (layer,)
    found: list[Choice] = [None]
    for weight in _weights(layer, recipe):
        for act in _acts(layer, recipe):
            for rank in _ranks(layer, recipe):
                choice = replace(layer, weight=TensorPlan.parse(weight), act=act, rank=rank)
                if rank == 0 or _branch_share(choice) <= BRANCH_SHARE:
                    found.append(choice)
    return tuple(dict.fromkeys(found if layer in found else [*found, layer]))


def _weights(layer: LayerPlan, recipe: Recipe) -> Iterator[str]:
    """Weight formats as text: those the recipe lists, else a ladder of the plan's own kind."""
    own = layer.weight
    if "choices" in recipe.options:
        yield from recipe.options["choices"]
        return
    if not isinstance(own.spec, Integer):
        yield from dict.fromkeys((*FLOATS, str(own)))
        return
    letter = "a" if own.spec.affine else ""
    below = GROUP if own.spec.bits == 8 and not letter else own.granularity
    above = below.removesuffix("+channel")  # more bits than 4 have one level of scales
    if layer.kind != "linear" and layer.act is not None and layer.act.granularity != "token":
        below, above = f"{GROUP}+channel" if "group" in below and not letter else "channel", "channel"
    for bits in WIDTHS:
        grain = "channel" if bits == 8 else below if bits <= NARROW else above
        yield f"int{bits}{letter}/{grain}"


def thirds(menu: Sequence[Choice]) -> tuple[Choice, ...]:
    """The menu, and every way to round a layer's input to one of its formats in each third of the steps."""
    found = list(menu)
    for first in menu:
        if first is not None and first.act is not None and first.act.scale == "dynamic":
            like = [c for c in menu if c is not None and c.act is not None and replace(c, act=first.act) == first]
            pairs = ((middle.act, last.act) for middle, last in product(like, like))
            found += [replace(first, late=pair) for pair in pairs if any(act != first.act for act in pair)]
    return tuple(found)


def act_bits(choice: Choice) -> float:
    """Bits of a layer's input, the mean over the phases; 16 where it is not rounded."""
    if choice is None or choice.act is None:
        return 16.0
    acts = [choice.act, *choice.late]
    return sum(act.spec.bits for act in acts) / len(acts)


def _acts(layer: LayerPlan, recipe: Recipe) -> tuple[TensorPlan | None, ...]:
    """Input formats of linears that the recipe lists; else 4-bit ones may also have 8 bits."""
    act = layer.act
    if "acts" in recipe.options and act is not None and layer.kind == "linear":
        return tuple(map(TensorPlan.parse, recipe.options["acts"]))
    if act is None or act.spec.bits >= 8 or layer.kind != "linear":
        return (act,)
    return (TensorPlan.parse("int8/token" if isinstance(act.spec, Integer) else "fp8/token"), act)


def _ranks(layer: LayerPlan, recipe: Recipe) -> tuple[int, ...]:
    """Ranks of the low-rank branch, for methods that have one."""
    most = recipe.options.get("rank", 0)
    if not most or layer.act is None:
        return (0,)
    return tuple(rank for rank in RANKS if rank <= min(most, layer.rows // 4, layer.columns // 4))


def _branch_share(choice: LayerPlan) -> float:
    whole = weight_bytes(choice, torch.bfloat16)
    return 1 - weight_bytes(replace(choice, rank=0), torch.bfloat16) / whole


def weight_bytes(choice: Choice, dtype: torch.dtype, elements: int = 0) -> int:
    """Bytes of everything a packed layer holds but its bias; of `elements` weights in `dtype` for a kept layer."""
    if choice is None:
        return elements * dtype.itemsize
    return stored_bytes(choice, dtype)


def label(choice: Choice) -> str:
    """A choice in few words: `int4/group:64 x int8/token + rank 16`."""
    if choice is None:
        return "kept"
    act = "" if choice.act is None else " x " + ", then ".join(map(str, (choice.act, *choice.late)))
    return f"{choice.weight}{act}" + (f" + rank {choice.rank}" if choice.rank else "")
