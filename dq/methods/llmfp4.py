"""LLM-FP4: searched floating formats, exponents of channels shifted into the weight. Liu et al., arXiv 2310.16836.

    y^ = Q(W 2^k) Q(x 2^-k) + bias,   k_c = clip(round(log2 |x_c|max^alpha / |W_c|max^beta) + n, 0, 2^E - 1)

x (tokens, in), W (out, in), k (in,) whole numbers, the same for all layers of an input, n one number, E the exponent
bits of the activations' format. A channel's exponent bias is a power of two and moves into the weight without a
rounding error. Formats of weights (a scale a row) and activations are chosen in turn by the error of the output.
Deviations: alpha and beta, (1, 0) in the paper, are chosen by that error, too, and doing nothing is a candidate; a
scale a token in place of a stored one a tensor, covering all of it; weights by GPTQ where that errs less; activations
of convolutions have 8 bits and a scale a sample. Emulated: no chip that dq knows multiplies such rows. Options:
`shift` False leaves channels as they are, `formats` False keeps e2m1 and e3m4, `start` "nearest" leaves GPTQ out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dq.fit import formats, groups, smooth
from dq.fit.drafts import DraftLinear
from dq.methods import qdiffusion
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=2048, gram=True, absmax=True, hat=True)
FEW_CALLS = True
OPTIONS = {"formats": True, "shift": True}
ALPHAS = (0.25, 0.5, 0.75, 1.0)
RECIPES = tuple(
    Recipe(
        name,
        ("fp4/channel", act),
        ("fp4/channel", "e3m4/tensor"),
        method="llmfp4",
        options=OPTIONS,
        status="experimental",
    )
    for name, act in {"llmfp4-w4a4": "fp4/token", "llmfp4-w4a8": "e3m4/token"}.items()
)


def smooths(options: Mapping) -> bool:
    """The shifts of a layer's input are one."""
    return {**OPTIONS, **options}["shift"]


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data."""
    made, options = {}, {**OPTIONS, **options}
    for shared in groups.shared(unit, seen):
        found = smooth.NOTHING
        if options["formats"]:
            shared.plans = formats.choose(shared, seen)
        if options["shift"] and shared.plan.act is not None:
            reach = 2**shared.plan.act.spec.exponent - 1  # pyright: ignore[reportAttributeAccessIssue]
            found = smooth.search(shared, smooth.SmoothSearch(alphas=ALPHAS, reach=reach))
            if options["formats"] and found.best.smooth is not None:
                shared.plans = formats.choose(shared, seen, found.best.smooth)
        for name, module in shared.modules.items():
            made[name] = smooth.transformed(module, shared.plans[name], found.best)
            qdiffusion.onto_grid(made[name], seen.layers[name], options)
            made[name].plan = replace(made[name].plan, reason=found.reason or made[name].plan.reason)
    return made
