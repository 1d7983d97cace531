"""Which rounded attention each module of a model can bear, by recorded calls. SageAttention's rule, arXiv 2410.02367.

    c = min over calls <o^, o> / (|o^| |o|)

o is what a call of attention gives in the full-precision model, o^ what it gives rounded, both as one vector. A module
becomes the first choice of the wish with c >= least in all calls, and stays in floating point without one; of wishes
without a least cosine it becomes the choice with the largest c. Deviation: the paper takes the mean over the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dq.attentionplan import AttentionPlan, Wish
from dq.fusions import attention, tiles
from dq.layers import attending, takeover
from dq.trace.records import Store

CALLS = 12  # of the recorded ones, evenly
ROLE = "attention compared"


def chosen(model: nn.Module, wish: Wish, store: Store) -> tuple[dict[str, AttentionPlan], str]:
    """By name what every attention module becomes, and a line for the report. The model is in full precision."""
    menus = [attending.planned(model, choice) for choice in wish.choices]
    found = cosines(model, {name: [menu[name] for menu in menus] for name in menus[0]}, store)
    plans = {name: _decided([menu[name] for menu in menus], found[name], wish.least) for name in menus[0]}
    counts = Counter(str(plan) for plan in plans.values())
    return plans, "attention: " + "; ".join(f"{said} in {count} modules" for said, count in counts.items())


def _decided(menu: list[AttentionPlan], cosines: list[float], least: float | None) -> AttentionPlan:
    if not cosines:
        return AttentionPlan(reason="no recorded call reached it")
    best = max(range(len(menu)), key=lambda index: cosines[index])
    if least is None:
        return replace(menu[best], reason=f"cosine {cosines[best]:.4f}")
    fits = next((index for index, value in enumerate(cosines) if value >= least), None)
    if fits is None:
        return AttentionPlan(reason=f"cosine {cosines[best]:.4f} under {least:g}")
    return replace(menu[fits], reason=f"cosine {cosines[fits]:.4f}")


@torch.no_grad()
def cosines(model: nn.Module, menus: dict[str, list[AttentionPlan]], store: Store) -> dict[str, list[float]]:
    """By module the least cosine of each of its plans over calls; nothing for a module that none reaches."""
    found: dict[str, list[float]] = {name: [] for name in menus}
    keys, parts = store.keys("calls/"), dict(model.named_modules())
    keys = [keys[index * len(keys) // CALLS] for index in range(CALLS)] if len(keys) > CALLS else keys
    for name, menu in menus.items():
        takeover.take(parts[name], ROLE, partial(_compared, partial(_compare, menu, found[name])))
    try:
        for key in keys:
            call = store.read(key, next(model.parameters()).device, kind="call")
            model(*call["args"], **call["kwargs"])
    finally:
        for name in menus:
            takeover.give_back(parts[name], ROLE)
    return found


def _compared(compare: Callable, module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of a module whose attention is compared (see `takeover`)."""
    with attention.Instead(compare):
        return inner(*args, **kwargs)


def _compare(menu: list[AttentionPlan], least: list[float], query, key, value, *args, **kwargs) -> torch.Tensor:
    """Torch's attention; lowers `least` to the cosines of the plans in this call."""
    full = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    for index, plan in enumerate(menu):
        rounded = tiles.attention(plan, query, key, value, *args, **kwargs)
        cosine = F.cosine_similarity(full.double().flatten(), rounded.double().flatten(), 0).item()
        if index == len(least):
            least.append(cosine)
        least[index] = min(least[index], cosine)
    return full
