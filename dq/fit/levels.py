"""Tables of values for the rows of a weight: weighted k-means in one dimension, twin logarithms, even grids.

    minimise over c:   sum_k h_rk min_i (w_rk - c_ri)^2        w, h (rows, columns), c (rows, 2^bits) rising

Rows are sorted once and their weighted moments added up, so that the error and the centres of any table come from the
places where its midpoints fall: a table costs 2^bits searches a row, not a pass over the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dq.formats.base import SCALE_FLOOR, Scales
from dq.formats.lookup import TOP
from dq.plan import LayerPlan

TURNS = 50  # of Lloyd's algorithm
QUANTILES = (0.98, 0.99, 0.999, 0.9999, 1.0)  # ends of a grid, as shares of a row's values
OFFSETS = (0.0, *(0.03 * 100 ** (i / 11) for i in range(12)))  # added before the logarithm, in units of a row's rms
SMALLEST = 1e-3  # of a row's rms: where a logarithm without offset ends


class Rows:
    """Values (rows, columns) that count by weights of that shape, or (columns,); all ones without."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None = None):
        weights = torch.ones_like(values) if weights is None else weights.expand_as(values)
        self.values, order = values.double().sort(1)
        mass = weights.double().gather(1, order)
        sums = [mass * self.values**power for power in range(3)]
        self.sums = [F.pad(each.cumsum(1), (1, 0)) for each in sums]
        self.rms = self.values.square().mean(1, keepdim=True).sqrt().clamp(min=SCALE_FLOOR)

    def moments(self, table: torch.Tensor) -> list[torch.Tensor]:
        """Sums of weight, weight x value, weight x value^2 (rows, count) nearest to each value of a rising table."""
        cuts = torch.searchsorted(self.values, (table[:, 1:] + table[:, :-1]) / 2)
        ends = torch.zeros_like(cuts[:, :1]), torch.full_like(cuts[:, :1], self.values.shape[1])
        cuts = torch.cat([ends[0], cuts, ends[1]], 1)
        return [each.gather(1, cuts).diff(dim=1) for each in self.sums]

    def error(self, table: torch.Tensor) -> torch.Tensor:
        """(rows,) weighted squared error of rounding to a rising table (rows, count)."""
        mass, first, second = self.moments(table)
        return (second - 2 * table * first + table.square() * mass).sum(1)

    def quantile(self, share: float, sign: int) -> torch.Tensor:
        """(rows, 1) the magnitude below which a share of a row's values of one sign lies; 0 where it has none."""
        first = torch.searchsorted(self.values, torch.zeros_like(self.rms))
        count = self.values.shape[1] - first if sign > 0 else first
        place = (share * (count - 1)).round().long().clamp(min=0)
        index = (first + place) if sign > 0 else (first - 1 - place)
        found = self.values.gather(1, index.clamp(0, self.values.shape[1] - 1)).abs()
        return torch.where(count > 0, found, 0.0)


def best(rows: Rows, tables: list[torch.Tensor]) -> torch.Tensor:
    """Of tables (rows, count), for each row the one of least error."""
    errors = torch.stack([rows.error(table) for table in tables])
    index = errors.argmin(0).reshape(1, -1, 1).expand(1, *tables[0].shape)
    return torch.stack(tables).gather(0, index)[0]


@torch.no_grad()
def kmeans(rows: Rows, bits: int) -> torch.Tensor:
    """Centres (rows, 2^bits) by Lloyd's algorithm from even spacing, even counts and between; the best in each row."""
    count, found = 2**bits, []
    share = (torch.arange(count, device=rows.rms.device, dtype=torch.float64) + 0.5) / count
    counts = rows.values[:, (share * rows.values.shape[1]).long()]
    evenly = torch.lerp(rows.values[:, :1], rows.values[:, -1:], torch.linspace(0, 1, count).to(share))
    for table in (evenly, counts, (evenly + counts) / 2):
        for _ in range(TURNS):
            mass, first, _ = rows.moments(table)
            moved = torch.where(mass > 0, first / mass.clamp(min=torch.finfo(torch.float64).tiny), table)
            if torch.equal(moved, table):
                break
            table = moved
        found.append(table)
    return best(rows, found)


@torch.no_grad()
def uniform(rows: Rows, bits: int) -> torch.Tensor:
    """Evenly spaced tables (rows, 2^bits) between the best of QUANTILES at either end."""
    steps = torch.linspace(0, 1, 2**bits, device=rows.rms.device, dtype=torch.float64)
    ends = [(rows.quantile(low, -1), rows.quantile(high, 1)) for low in QUANTILES for high in QUANTILES]
    return best(rows, [torch.lerp(-low, high, steps) for low, high in ends])


@torch.no_grad()
def twin_log(rows: Rows, bits: int) -> torch.Tensor:
    """Tables (rows, 2^bits) that are even in log2(|w| + eta) for either sign; end of each sign and eta searched.

    The ends of the signs do not depend on each other: one is searched with the other as it is.
    """
    half, tables = 2 ** (bits - 1), []
    for offset in OFFSETS:
        eta = offset * rows.rms
        sides = [[_side(rows, sign, share, eta, half) for share in QUANTILES] for sign in (-1, 1)]
        low = best(rows, [torch.cat([-side.flip(1), sides[1][-1]], 1) for side in sides[0]])[:, :half]
        tables.append(best(rows, [torch.cat([low, side], 1) for side in sides[1]]))
    return best(rows, tables)


def _side(rows: Rows, sign: int, share: float, eta: torch.Tensor, count: int) -> torch.Tensor:
    """Rising magnitudes (rows, count) from the smallest of a sign to the quantile."""
    least = SMALLEST * rows.rms
    first, last = ((rows.quantile(each, sign).clamp(min=least) + eta).log2() for each in (0.0, share))
    steps = torch.linspace(0, 1, count, device=eta.device, dtype=torch.float64)
    return torch.lerp(first, torch.maximum(first, last), steps).exp2() - eta


def tables(weight: torch.Tensor, plan: LayerPlan, count: torch.Tensor | None = None) -> list[Scales]:
    """Scales with tables by `kmeans` for each part of a weight (rows, columns): one a row, or one of all of it.

    count (columns,): what each column counts; all alike without. The plan's weight format has tables.
    """
    found = []
    for first, last in plan.parts:
        part = weight[:, first:last]
        mine = None if count is None else count[first:last].expand_as(part)
        if plan.weight.grain.kind == "tensor":
            part, mine = part.reshape(1, -1), None if mine is None else mine.reshape(1, -1)
        found.append(stored(kmeans(Rows(part, mine), plan.weight.spec.bits)))
    return found


def stored(table: torch.Tensor) -> Scales:
    """Real values (rows, count), rising, as a format with tables holds them: int8 and a scale a row."""
    scale = (table.abs().amax(1, keepdim=True) / TOP).clamp(min=SCALE_FLOOR)
    return Scales(scale.float(), table=(table / scale).round().to(torch.int8))
