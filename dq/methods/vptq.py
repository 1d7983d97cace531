"""VPTQ: vectors of a codebook, assigned so that later columns make up for earlier ones. Liu et al., arXiv 2409.17066.

    code[r, i] = argmin_c |W_i + what the vectors before i owe - c|^2     in the norm of dq/fit/codebook.py

W (out, in), vectors i of 4 neighbours of a row; second moments of inputs as the quantized units before give them.
Deviations: the paper's vectors are 8 values of one column; here rows are stored in order, and what the 4 columns of a
vector owe each other is counted. A codebook has 256 entries (2 bits a weight), not 65536, which would outweigh layers
of less than 4 million weights; there is no residual codebook, none for columns of outliers. Entries stay where k-means
puts them: moved by least squares to the vectors that took them, layers of tiny-pixart gain 0.1 dB.
Option `compensate`: False assigns every vector to its nearest entry, columns weighed by the diagonal of the moments.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dq.families import Family
from dq.fit import codebook, moments, rounding
from dq.fit.drafts import DraftLinear, draft
from dq.formats.codebook import Codebook
from dq.plan import Plan, Recipe
from dq.trace.seen import LayerSeen, Needs, Seen, Unit

NEEDS = Needs(rows=1024, gram=True, hat=True)
FEW_CALLS = True
RECIPES = (Recipe("vptq-w2", ("vq256x4", None), ("vq256x4", None), method="vptq", status="experimental"),)


def smooths(options: Mapping) -> bool:
    return False


def prepare(model: nn.Module, plan: Plan, family: Family, options: Mapping) -> Plan:
    """Smaller codebooks for small layers."""
    return codebook.prepared(plan)


def fit(unit: Unit, seen: Seen, options: Mapping) -> dict[str, DraftLinear]:
    """Drafts of the unit's layers that have codebooks."""
    made = {}
    for name, plan in unit.layers.items():
        spec = plan.weight.spec
        if name in seen.layers and isinstance(spec, Codebook):
            made[name] = draft(unit.layer(name), plan)
            _round(made[name], spec, seen.layers[name], seen.seed, **options)
    return made


def _round(made: DraftLinear, spec: Codebook, layer: LayerSeen, seed: int, compensate: bool = True) -> None:
    weight, gram = made.weight.data.reshape(made.plan.rows, -1), moments.rounded(layer, made)
    scales = codebook.start(weight, spec, gram.diagonal(), seed)
    book = spec.book(scales)
    rounded = codebook.decoded(book, codebook.assigned(weight, spec, scales, gram.diagonal()))
    if compensate:
        better = codebook.decoded(book, codebook.compensated(weight, spec, scales, gram))
        rounded = min(rounded, better, key=lambda found: rounding.error(found, weight, gram))
    made.weight.data.copy_(rounded.reshape(made.plan.shape))
    made.scales = [scales]
