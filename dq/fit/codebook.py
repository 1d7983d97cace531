"""Codebooks of layers (formats/codebook.py): k-means, and assignment that makes up for its own errors.

    minimise tr(E H E^T),  E = W − Ŵ,  H = R R^T,  B = R diag(R)^-1,  Ŵ[r, vector i] = book[code[r, i]]
    code[r, i] = argmin_c | (W_i B_ii + sum over j < i of E_j B_ji − c B_ii) diag(R_ii) |²

W, Ŵ (rows, columns), H = E[x^T x] (columns, columns); i, j number vectors of `span` columns, so that B_ji is (span,
span). The second line is GPTQ's (dq/fit/rounding.py) for several columns at once, as in GPTVQ (arXiv 2402.15319) and
QuIP# (2402.04396): exact for what the columns of a vector owe each other. k-means weighs column k by H_kk.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dq.fit import rounding
from dq.formats import codebook
from dq.formats.base import Scales, check_finite
from dq.formats.codebook import Codebook
from dq.plan import LayerPlan, Plan, TensorPlan

VECTORS = 16  # of a layer for each entry, at least: fewer entries for small layers
FALLBACK = "int8/channel"  # for layers whose rows are no whole number of vectors
LEAST = 1e-4  # smallest weight of a column, as a share of the mean: unseen inputs count a little


def prepared(plan: Plan) -> Plan:
    """The plan with codebooks that its layers can afford."""
    return replace(plan, layers={name: _affordable(layer) for name, layer in plan.layers.items()})


def _affordable(layer: LayerPlan) -> LayerPlan:
    spec = layer.weight.spec
    if not isinstance(spec, Codebook):
        return layer
    entries = min(spec.count, 2 ** ((layer.rows * layer.columns // spec.span // VECTORS).bit_length() - 1))
    if layer.columns % spec.span or entries < 2:
        reason = f"rows of {layer.columns} weights do not fill vectors of {spec.name}: int8"
        return replace(layer, weight=TensorPlan.parse(FALLBACK), reason=reason)
    return replace(layer, weight=TensorPlan.parse(f"vq{entries}x{spec.span}"))


def vectors(matrix: torch.Tensor, spec: Codebook) -> torch.Tensor:
    """(rows, columns) -> (rows · columns / span, span)."""
    return matrix.reshape(-1, spec.span)


def weights(moments: torch.Tensor, rows: int, spec: Codebook) -> torch.Tensor:
    """How much each value of each vector counts, by the second moments (columns,) of the input."""
    share = (moments / moments.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=LEAST)
    return vectors(share.expand(rows, -1), spec)


@torch.no_grad()
def start(weight: torch.Tensor, spec: Codebook, moments: torch.Tensor, seed: int) -> Scales:
    """The codebook that k-means finds for (rows, columns), columns weighed by `moments` (columns,)."""
    counted = weights(check_finite(moments, "second moments of the input"), len(weight), spec)
    return spec.stored(codebook.kmeans(vectors(weight, spec), spec.count, counted, seed))


def decoded(book: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """book (entries, span), codes (rows, columns / span) -> (rows, columns)."""
    return book[codes].flatten(1)


@torch.no_grad()
def assigned(weight: torch.Tensor, spec: Codebook, scales: Scales, moments: torch.Tensor) -> torch.Tensor:
    """The nearest code of every vector, int64 (rows, columns / span)."""
    counted = weights(moments, len(weight), spec)
    return codebook.nearest(vectors(weight, spec), spec.book(scales), counted)[0].reshape(len(weight), -1)


@torch.no_grad()
def compensated(
    weight: torch.Tensor, spec: Codebook, scales: Scales, gram: torch.Tensor, damp: float = 0.01
) -> torch.Tensor:
    """Codes by the equation above, vectors of large moments first: int64 (rows, columns / span). damp as in `gptq`."""
    book, span = spec.book(scales), spec.span
    met = rounding.factor(gram, damp, span)
    wanted = weight.t()[met.columns]
    gap = torch.empty_like(wanted)
    codes = torch.empty((len(wanted) // span, len(weight)), dtype=torch.int64, device=weight.device)
    block = max(rounding.BLOCK // span, 1) * span
    for first in range(0, len(wanted), block):
        last = min(first + block, len(wanted))
        owed = met.back[:first, first:last].t() @ gap[:first]
        for a in range(first, last, span):
            own, b = owed[a - first : a - first + span], a + span
            inner, size = met.back[a:b, a:b], met.pivot[a:b].sqrt()
            own.addmm_(met.back[first:a, a:b].t(), gap[first:a]).addmm_(inner.t(), wanted[a:b])
            picked, _ = codebook.nearest(own.t() * size, book @ inner * size)
            gap[a:b] = wanted[a:b] - book[picked].t()
            codes[int(met.columns[a]) // span] = picked
    return codes.t()
