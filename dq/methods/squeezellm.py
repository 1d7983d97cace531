"""SqueezeLLM: values of each row by k-means that counts weights by sensitivity. Kim et al., arXiv 2306.07629.

    minimise over c:   sum_k F_k min_i (W_rk - c_ri)^2,   F_k = sum_r E[(d<v, f> / dW_rk)^2]        c (rows, 8), rising

f is the output of the unit (a block) that holds the layer, in the full-precision model's recorded calls, v random
signs: F is the diagonal of the Gauss-Newton matrix of the block's squared error. Deviations:
- The paper has the gradient of the whole model's loss and counts each weight by its own; here it ends at the block,
  and weights of one column count alike: the squares of few calls are noisy, their sums over rows are not.
- The largest and the most sensitive weights stay in the table; the paper keeps 0.45 % of them apart in 16 bits.
- Tables hold bytes with a scale a row in place of 16-bit values, so that 8-bit products take them (dq.formats.lookup).
Options: `count` "fisher", "moments" (F_k = E[z_k^2] of the layer's own input) or "" (all weights alike); `round`
"nearest" as published, or "gptq" on the same tables.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dq.fit import levels, moments, reconstruct, rounding
from dq.fit.drafts import DraftLinear, draft
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, calls=True, hat=True)
FEW_CALLS = True
MOST_CALLS = 64  # whose gradients are squared
OPTIONS = {"count": "fisher", "round": "nearest"}
RECIPES = (
    Recipe(
        "squeezellm-w3",
        ("lut3/channel", None),
        ("lut3/channel", None),
        method="squeezellm",
        status="experimental",
        options=OPTIONS,
    ),
)


@torch.no_grad()
def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data; those without tables are rounded to nearest."""
    options = {**OPTIONS, **options}
    made = {name: draft(unit.layer(name), plan) for name, plan in unit.layers.items() if name in seen.layers}
    names = [name for name in made if unit.layers[name].weight.spec.tabled]
    found = fisher(unit, seen, names) if names and options["count"] == "fisher" else {}
    for name in names:
        plan, layer = unit.layers[name], seen.layers[name]
        weight = made[name].weight.data.reshape(plan.rows, -1)
        count = found.get(name)
        if options["count"] == "moments" and layer.gram is not None:
            count = layer.gram.diagonal()
        made[name].scales = levels.tables(weight, plan, count)
        if options["round"] == "gptq":
            met = moments.rounded(layer, made[name])
            weight, made[name].scales = rounding.gptq(weight, plan, met, scales=made[name].scales)
            made[name].weight.data.copy_(weight.reshape(plan.shape))
    return made


def fisher(unit: Unit, seen: Seen, names: list[str]) -> dict[str, torch.Tensor]:
    """(columns,) by layer: mean squared gradient of the unit's output under random signs, added up over rows."""
    weights = [unit.layer(name).get_parameter("weight") for name in names]
    found = [torch.zeros(weight[0].numel(), device=weight.device) for weight in weights]
    signs = torch.Generator().manual_seed(seen.seed)
    calls = reconstruct.load(seen, reconstruct.Settings(most=MOST_CALLS, stream="full"), weights[0].device)
    with reconstruct.only(weights, unit.module):
        for call in calls:
            outputs = list(reconstruct.floating(unit.module(*call.args, **call.kwargs)))
            drawn = [torch.randint(0, 2, y.shape, generator=signs).to(y) * 2 - 1 for y in outputs]
            total = torch.stack([(y * sign).float().sum() for y, sign in zip(outputs, drawn, strict=True)]).sum()
            gradients = torch.autograd.grad(total, weights, allow_unused=True)
            for mine, gradient in zip(found, gradients, strict=True):
                mine += 0 if gradient is None else gradient.float().square().flatten(1).sum(0)
    return {name: mine for name, mine in zip(names, found, strict=True) if bool(mine.isfinite().all() & mine.any())}
