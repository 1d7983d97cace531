"""LRQ-DiT: weights on twin-logarithmic grids, inputs rotated where that suits them. Yang et al., arXiv 2508.03485.

    c = +-(2^(u_lo + i (u_hi - u_lo) / (2^(b-1) - 1)) - eta),   u = log2(|w| + eta),   i = 0 ... 2^(b-1) - 1
    z = (x * s) R,   s_k = sqrt(max |W_k| / max |x_k|)                                    x (tokens, in), c (rows, 2^b)

Each row's two signs have grids of their own; where they end (alpha, beta) and eta are searched by squared error,
columns counted by the second moments of z. A row stays on the best evenly spaced grid where that is nearer, as for
nearly normal rows at 3 bits. Activations have one scale a token. Deviations:
- The paper searches alpha, beta and an absolute eta for a whole weight by unweighted error; here they are each row's
  own, eta in units of its rms: rows have stored tables (bytes and a scale), in which any values are as good.
- R turns blocks of 128 channels (Hadamard), or 1024 where rms(x * s) >= 1, a twentieth of PixArt's layers: the paper's
  dual rotation there is one of blocks, a permutation that deals channels to other blocks, and one of blocks again, its
  blocks found greedily. A Hadamard matrix of order a b is such a one, P^T (I x H_a) P (I x H_b), and is not stored,
  where twice 128 x 128 is 512 bytes an input channel, of which a 4-bit weight of 1152 rows has 576. On made outliers
  it rounds as finely as the greedy one. No input of tiny-pixart comes near an rms of 1.
- Convolutions, of which the paper has none, round activations to 8 bits, one scale a sample.
Options: `log` False leaves evenly spaced grids alone, `rotate` False no rotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from dq.fit import groups, levels, moments, smooth
from dq.fit.drafts import DraftLinear, draft
from dq.layers import hadamard
from dq.plan import Recipe
from dq.trace.seen import LayerSeen, Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, absmax=True, hat=True)
FEW_CALLS = True
ALPHA = 0.5  # of smoothing, as published
SALIENT = 1.0  # rms of an input from which wider blocks are rotated ...
MOST_ROTATED = 1024  # ... of so many channels at most
OPTIONS = {"log": True, "rotate": True}
RECIPES = tuple(
    Recipe(
        name, (weight, "int4/token"), (weight, "int8a/tensor"), method="lrqdit", status="experimental", options=OPTIONS
    )
    for name, weight in (("lrqdit-w3a4", "lut3/channel"), ("lrqdit-w4a4", "lut4/channel"))
)


@torch.no_grad()
def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of all layers of a unit that saw data; those without tables are rounded to nearest."""
    options, made = {**OPTIONS, **options}, {}
    for shared in groups.shared(unit, seen):
        change = transform(shared, options["rotate"])
        for name, module in shared.modules.items():
            plan = shared.plans[name]
            if not plan.weight.spec.tabled:
                made[name] = draft(module, plan)
                continue
            found = made[name] = smooth.transformed(module, plan, change)
            reason = "" if change.smooth is None else f"rms {rms(shared):.2g}: {change.label}"
            found.plan = replace(found.plan, reason=reason or plan.reason)
            found.scales = tables(found, seen.layers[name], options["log"])
    return made


def transform(shared: smooth.Shared, rotate: bool) -> smooth.Transform:
    """Smoothing of the rounded input of linears, and the rotation that the rule asks for."""
    if shared.plan.act is None or shared.plan.kind != "linear":
        return smooth.NOTHING.best
    most = smooth.MOST_ROTATED if rms(shared) < SALIENT else MOST_ROTATED
    orders = hadamard.orders(shared.plan.shape[1], most) if rotate else []
    vector = smooth.balance(shared, ALPHA, 1 - ALPHA)
    return smooth.Transform(vector, (ALPHA, 1 - ALPHA), max(orders, default=0))


def rms(shared: smooth.Shared) -> float:
    """Root mean square of the smoothed input of linears, |X|_F / sqrt(tokens in); smoothing with the paper's scale."""
    loud, weight = (each.clamp(min=1e-5 * float(each.amax())) for each in (shared.absmax(), shared.weight_absmax()))
    return float((shared.seen.x.float() * (weight / loud).sqrt()).square().mean().sqrt())


def tables(made: DraftLinear, seen: LayerSeen, log: bool) -> list:
    """Scales with tables of each part of a smoothed and rotated draft."""
    weight, count = made.weight.data.reshape(made.plan.rows, -1), moments.rounded(seen, made).diagonal()
    found, bits = [], made.plan.weight.spec.bits
    for first, last in made.plan.parts:
        rows = levels.Rows(weight[:, first:last], count[first:last])
        tried = [levels.uniform(rows, bits), *([levels.twin_log(rows, bits)] if log else [])]
        found.append(levels.stored(levels.best(rows, tried)))
    return found
