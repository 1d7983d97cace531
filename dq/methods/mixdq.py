"""MixDQ: bits by sensitivity, for models of few steps, where no later step repairs an error. Zhao et al., 2405.17873.

    minimise sum_l E[l, b_l]   subject to   mean over weights of bits b_l <= target,   b_l in {8, 4, 2}

Weights are rounded to nearest, one scale per output channel; nothing is learned. Deviations:
- The paper measures attention to text and feed-forward layers by the SSIM of pictures, all others by the SQNR of the
  prediction, solves each group by itself, and looks for the best split of the bits among some candidates by making
  pictures. Here both are measured on one scale, by gradients of the pictures (dq.fit.trajectory), and solved at once.
- Activations have one scale per token (convolutions: per sample) that is found in every call, so that the text's start
  token, far louder than all others, harms none of them.
- The paper computes that token in full precision where keys and values of the text are made. It is the same in every
  prompt and draws most of the attention, so its exact output is stored here, wherever the calls show such a token:
  first tokens that agree from call to call while second ones do not. Another first token is computed like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from dq.fit.drafts import DraftLinear, draft
from dq.layers import STARTS_ALIKE
from dq.plan import Recipe
from dq.trace.seen import Needs, Seen, Unit, UnitCall

NEEDS = Needs(rows=256, calls=True, hat=False)  # rows: for the report
FEW_CALLS = True
LEAST_SHARE = 0.4  # of the calls' samples that begin with the token; guidance may come with zeros in place of text
WEIGHTS = ("int8/channel", "int4/channel", "int2/channel")

RECIPES = (
    Recipe(
        "mixdq-w5a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="mixdq",
        status="experimental",
        options={"bits": 5.25, "choices": WEIGHTS},  # 5 bits and the scales
    ),
    Recipe(
        "mixdq-w4a8",
        ("int4/channel", "int8/token"),
        ("int4/channel", "int8a/tensor"),
        method="mixdq",
        status="experimental",
        options={"bits": 4.25, "choices": WEIGHTS},
    ),
)


def smooths(options: Mapping) -> bool:
    return False


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the layers that see a start token; all others are rounded to nearest in their formats."""
    made = {}
    for name, token in start_tokens(unit, seen.calls("full")).items():
        plan = unit.layers[name]
        reason = "; ".join(filter(None, (plan.reason, "the start token's output is stored")))
        made[name] = draft(unit.layer(name), replace(plan, start=True, reason=reason))
        made[name].start_in = token
    return made


def replayed(unit: Unit, calls: Iterable[UnitCall], looks: Mapping[str, Callable]) -> None:
    """Run a unit's calls, with `looks` as forward pre-hooks of its layers, by name."""
    hooks = [unit.layer(name).register_forward_pre_hook(look) for name, look in looks.items()]
    try:
        for call in calls:
            unit.module(*call.args, **call.kwargs)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def start_tokens(unit: Unit, calls: Iterable[UnitCall]) -> dict[str, torch.Tensor]:
    """By layer: the token (in,) that its inputs (batch, tokens, in) begin with, whatever comes after it."""
    firsts: dict[str, list] = {}
    seconds: dict[str, list] = {}

    def watch(name: str):
        def look(module, args):
            if args[0].dim() == 3 and args[0].shape[1] > 1:
                firsts.setdefault(name, []).append(args[0][:, 0].float())
                seconds.setdefault(name, []).append(args[0][:, 1].float())

        return look

    names = [name for name, plan in unit.layers.items() if plan.kind == "linear"]
    replayed(unit, calls, {name: watch(name) for name in names})
    found = {}
    for name in firsts:
        token, count = _commonest(torch.cat(firsts[name]))
        total = sum(map(len, firsts[name]))
        if count >= LEAST_SHARE * total and count > _commonest(torch.cat(seconds[name]))[1]:
            found[name] = token
    return found


def _commonest(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The row (in,) of (n, in) that most rows agree with, and how many do; rows of zeros agree with none."""
    powers = rows.square().sum(1)
    counts = (torch.cdist(rows, rows).square() < STARTS_ALIKE * powers[:, None]).sum(1)
    best = int(counts.argmax())
    return rows[best], int(counts[best])
