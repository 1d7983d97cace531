"""SVDQuant: outliers go into a low-rank branch in 16 bits. Li et al., arXiv 2411.05007.

    y = Q(W / s R - up down) Q(z) + up (down z) + b,   z = (x * s) R     x (tokens, in), W (out, in), up (out, r)

The input's smoothing s, Hadamard rotation R and rounding (symmetric or with zero points) are searched by output error
with branch and roundings in place, one choice for all layers of one input; "nothing" is a candidate. Deviations:
- SVDs are weighted by the input's second moments, and alternate with GPTQ rounding that knows the noise of the rounded
  input (the paper: plain SVDs of W / s, and nearest rounding or GPTQ afterwards).
- Inputs after GELU may take measured zero points besides the paper's fixed shift of 0.171875 and unsigned codes.
- Each layer has a branch of its own, as large as BRANCH_SHARE of its bytes allows: rank 32 on wide layers, less on
  narrow ones. Convolutions round activations to 8 bits, one scale a sample; the paper leaves them in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from dq.drafts import DraftLinear
from dq.fit import groups, smooth, weights
from dq.plan import LayerPlan, Recipe
from dq.seen import Needs, Seen, Unit

NEEDS = Needs(rows=2048, gram=True, absmax=True, hat=False)
FEW_CALLS = True
RANK = 32
BRANCH_SHARE = 0.13
WIDE = 2**20  # weights from which branch and rounding take one turn: GPTQ is a third of the time there
GELU_SHIFT = 0.171875  # minus the least value of GELU, rounded up
ONE_SIDED = 0.25  # an input whose low end is closer to 0 than this share of its high end is called one-sided

_INT4 = ("int4/group:64", "int4/group:64")
_OPTIONS = {"rank": RANK, "share": BRANCH_SHARE}
RECIPES = (
    Recipe("svdquant-int4", _INT4, ("int4/group:64", "int8a/tensor"), method="svdquant", options=_OPTIONS),
    Recipe("svdquant-nvfp4", ("nvfp4", "nvfp4"), ("nvfp4", "int8a/tensor"), method="svdquant", options=_OPTIONS),
    Recipe(
        "svdquant-w4a8",
        ("int4/group:64", "int8/token"),
        ("int4/group:64", "int8a/tensor"),
        method="svdquant",
        options=_OPTIONS,
    ),
    Recipe(
        "svdquant-int8",
        ("int8/channel", "int8/token"),
        ("int8/channel", "int8a/tensor"),
        method="svdquant",
        options=_OPTIONS,
    ),
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made = {}
    for shared in groups.shared(unit, seen):
        made |= _fit_shared(shared, seen, options)
    return made


def _fit_shared(shared: smooth.Shared, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    plan = shared.plan
    ranks = {name: _rank(shared.plans[name], module, options) for name, module in shared.modules.items()}
    found = smooth.search(shared, wish(plan, shared, min(ranks.values()))) if plan.act else smooth.NOTHING
    drafts = {}
    for name, module in shared.modules.items():
        made = smooth.transformed(module, shared.plans[name], found.best)
        turns = 2 if module.weight.numel() < WIDE else 1
        weights.fit(made, module, seen.layers[name], weights.Wish(rank=ranks[name], iterations=turns))
        made.plan = replace(made.plan, reason=found.reason)
        made.tried = found.tried
        drafts[name] = made
    return drafts


def _rank(plan: LayerPlan, module: nn.Module, options: Mapping) -> int:
    """Columns of a layer's branch: what its bytes allow; weight-only layers have none."""
    if plan.act is None:
        return 0
    return groups.affordable_rank(plan, options["rank"], options["share"], module.weight.element_size())


def wish(plan: LayerPlan, shared: smooth.Shared, rank: int) -> smooth.Search:
    """What is tried for an input: rotations for linears, unsigned codes for one-sided 4-bit integers."""
    rotations = smooth.orders(plan) if plan.kind == "linear" else ()
    acts = ()
    if plan.act.format == "int4":
        acts = (replace(plan.act, format="int4a"), replace(plan.act, format="int4a", shift=GELU_SHIFT))
        acts = acts if _one_sided(shared) else acts[:1]
    return smooth.Search(rank, rotations=rotations, acts=acts)


def _one_sided(shared: smooth.Shared) -> bool:
    low, high = float(shared.seen.low.min()), float(shared.seen.high.max())
    return -GELU_SHIFT <= low and -low < ONE_SIDED * high
