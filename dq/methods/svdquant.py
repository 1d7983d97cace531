"""SVDQuant: outliers go into a low-rank branch in 16 bits. Li et al., arXiv 2411.05007.

    y = Q(W / s R - up down) Q(z) + up (down z) + b,   z = (x * s) R     x (tokens, in), W (out, in), up (out, r)

The input's smoothing s, Hadamard rotation R and rounding (symmetric or with zero points) are searched by output error
with branch and roundings in place, one choice for all layers of one input; "nothing" is a candidate. Deviations:
- SVDs are weighted by the input's second moments, and alternate with GPTQ rounding that knows the noise of the rounded
  input (the paper: plain SVDs of W / s, and nearest rounding or GPTQ afterwards). Option `noise`: the weight that is
  rounded serves the rounded input best, and SVDs are in the norm of what that leaves (dq/fit/weights.py).
- 4-bit inputs may be clipped: scales cover a part of the range measured in a call, one share an input (option `clip`;
  per layer and range of steps in arXiv 2605.27003).
- `svdquant-int4-late8` rounds inputs to 8 bits in the last third of the steps, under the very same weights: 4-bit
  inputs cost most there. Every choice above is by rows of all steps, each rounded as in its own phase.
- All 4-bit integer inputs may take measured zero points, and most do; those after GELU also the paper's fixed shift of
  0.171875 with unsigned codes.
- Each layer has a branch of its own, as large as BRANCH_SHARE of its bytes allows: rank 32 on wide layers, less on
  narrow ones. Convolutions round activations to 8 bits, one scale a sample; the paper leaves them in 16 bits.
- `svdquant-mp-*` spend the bytes of the recipe in one width, branches included, where they count: each layer's width
  and rank by its sensitivity (dq/budget). Inputs of 4 bits then have 8 in some layers, if others are not rounded less.
`svdquant-int4-nunchaku` has only what diffusers' nunchaku-lite operators hold: inputs that are smoothed and rounded
symmetrically (no rotation, no zero points, no shift), branches of a multiple of 16 columns, and int4 where others keep
int8 (modulation, large embedders). `dq export --to nunchaku-lite` writes it for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from dq.fit import groups, smooth, weights
from dq.fit.drafts import DraftLinear
from dq.plan import LayerPlan, Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=2048, gram=True, absmax=True, hat=False)
FEW_CALLS = True
RANK = 32
BRANCH_SHARE = 0.13
WIDE = 2**20  # weights from which branch and rounding take one turn: GPTQ is a third of the time there
GELU_SHIFT = 0.171875  # minus the least value of GELU, rounded up
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # shares of a 4-bit input's range that are tried
ONE_SIDED = 0.25  # an input whose low end is closer to 0 than this share of its high end is called one-sided

# multiple: ranks of linears are multiples of it, and at least it
# plain: inputs are smoothed and rounded as planned, nothing else
# noise: weights are those that serve the rounded input best
# clip: codes of 4-bit inputs may cover less than the measured range
OPTIONS = {"rank": RANK, "share": BRANCH_SHARE, "multiple": 1, "plain": False, "clip": False, "noise": False}
NUNCHAKU = {
    "modulation": "int4/group:64",
    "edge": "int4/group:64",
    "options": {**OPTIONS, "multiple": 16, "plain": True},
}
FEW_RUNS = {"runs": 16, "checks": 0}  # half as long again as one width; 64 runs gain 1 dB more on tiny-pixart
MIXED8 = {"options": {**OPTIONS, "bits": "own", **FEW_RUNS}}
MIXED4 = {"options": {**OPTIONS, "bits": "own", "act_bits": "own", **FEW_RUNS}}
LATE8 = {"late": ("int8/token",), "switch": (2 / 3,)}
# weights and activations of linears; convolutions have the same weights and round activations to 8 bits
RECIPES = tuple(
    Recipe(
        name,
        (weight, act),
        (weight, "int8a/tensor"),
        method="svdquant",
        status="experimental" if name.endswith(("late8", "nunchaku", "nvfp4")) else "stable",
        **({"options": OPTIONS} | more),
    )
    for name, (weight, act, more) in {
        "svdquant-int4": ("int4/group:64", "int4/group:64", {}),
        "svdquant-int4-late8": ("int4/group:64", "int4/group:64", LATE8),
        "svdquant-int4-nunchaku": ("int4/group:64", "int4/group:64", NUNCHAKU),
        "svdquant-nvfp4": ("nvfp4", "nvfp4", {}),
        "svdquant-w4a8": ("int4/group:64+channel", "int8/token", {}),
        "svdquant-mp-w4a4": ("int4/group:64", "int4/group:64", MIXED4),
        "svdquant-mp-w4a8": ("int4/group:64+channel", "int8/token", MIXED8),
        "svdquant-int8": ("int8/channel", "int8/token", {}),
    }.items()
)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made, options = {}, {**OPTIONS, **options}
    for shared in groups.shared(unit, seen):
        wishes = {name: _wish(shared.plans[name], module, options) for name, module in shared.modules.items()}
        least = min(each.rank for each in wishes.values())
        search = wish(shared.plan, shared, least, options) if shared.plan.act else None
        made |= groups.fit(shared, seen, search, wishes)
    return made


def _wish(plan: LayerPlan, module: nn.Module, options: Mapping) -> weights.WeightWish:
    """A branch of as many columns as its bytes allow, at least the unit of a linear's; none for weight-only layers."""
    turns = 2 if plan.rows * plan.columns < WIDE else 1
    rank = branch_rank(plan, options, module.weight.element_size())  # pyright: ignore[reportCallIssue]
    return weights.WeightWish(rank, iterations=turns, noise=options["noise"])


def branch_rank(plan: LayerPlan, options: Mapping, element_bytes: int) -> int:
    """Columns of a layer's branch, whose numbers have so many bytes; those of the plan once a budget chose them."""
    if options["rank"] is None:
        return plan.rank
    if plan.act is None:
        return 0
    most = groups.affordable_rank(plan, options["rank"], options["share"], element_bytes)
    unit = options["multiple"] if plan.kind == "linear" else 1
    return max(most // unit, unit > 1) * unit


def wish(plan: LayerPlan, shared: smooth.Shared, rank: int, options: Mapping) -> smooth.SmoothSearch:
    """What is tried for an input: rotations of linears; for 4-bit integers unsigned codes, clipping; not if plain."""
    if options["plain"]:
        return smooth.SmoothSearch(rank)
    rotations = smooth.orders(plan) if plan.kind == "linear" else ()
    acts = ()
    narrow = smooth.narrowest(plan)
    if narrow is not None and narrow.format == "int4":
        acts = (replace(narrow, format="int4a"), replace(narrow, format="int4a", shift=GELU_SHIFT))
        acts = acts if _one_sided(shared) else acts[:1]
    clips = CLIPS if options["clip"] and acts and plan.kind == "linear" else ()
    return smooth.SmoothSearch(rank, rotations=rotations, acts=acts, clips=clips)


def _one_sided(shared: smooth.Shared) -> bool:
    low, high = float(shared.seen.low.min()), float(shared.seen.high.max())
    return -GELU_SHIFT <= low and -low < ONE_SIDED * high
