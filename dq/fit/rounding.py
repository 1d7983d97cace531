"""Weights onto the grid of their format: to nearest, by GPTQ so that later columns make up for earlier errors, and by
coordinate descent, in which all columns make up for all others.

    minimise tr(E H E^T),  E = W - Ŵ,  H = R R^T,  R upper triangular,  B = R diag(R)^-1
    Ŵ_k = Q(W_k + sum over j < k of E_j B_jk),  column after column

W, Ŵ (rows, columns), H = E[x^T x] (columns, columns), Q the grid of the column's scale block. GPTQ, arXiv 2210.17323,
in the equivalent form of LDLQ (QuIP, arXiv 2307.13304): it needs one Cholesky factor of H where GPTQ inverts H too.
Scales are fitted beforehand, so any element-wise grid and any column order will do. Deviations: inputs that were never
seen are rounded to nearest, not set to 0; a row that GPTQ makes worse than nearest stays at nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from dq.formats.base import SCALE_FLOOR, Format, Granularity, Scales, block_view, check_finite
from dq.formats.integer import Integer
from dq.plan import LayerPlan

BLOCK = 128  # columns rounded between two updates by the earlier ones
WIDE = 512  # columns multiplied at once where order does not matter
ATTEMPTS = 24  # doublings of the damping before a matrix is given up as not positive
FIRST_DAMP = 1e-6  # what doubling starts from if no damping was asked for
SMALLEST = 0.6  # end of the scale search, as a share of the scale that covers the range
LARGER = (2.0, 1.5)  # also tried for floating grids: the largest value then meets a denser binade
FACTORS = 20
SWEEPS = 3  # of coordinate descent


@torch.no_grad()
def nearest(
    weight: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales] | None = None
) -> tuple[torch.Tensor, list[Scales]]:
    """Round (rows, columns) to nearest -> (fp32 weight on the grid, scales of each part; fitted if not given)."""
    weight = weight.float()
    scales = fit_scales(weight, plan) if scales is None else list(scales)
    return on_grid(weight, plan, scales), scales


def fit_scales(weight: torch.Tensor, plan: LayerPlan) -> list[Scales]:
    """Scales that cover the range of each part."""
    spec, grain = plan.weight.spec, plan.weight.grain
    return [spec.fit(weight[:, first:last].float(), grain) for first, last in plan.parts]


def on_grid(weight: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales]) -> torch.Tensor:
    """decode(encode(weight)) under given scales: what a packed layer of this weight holds."""
    spec, grain = plan.weight.spec, plan.weight.grain
    pairs = zip(plan.parts, scales, strict=True)
    parts = [spec.decode(spec.encode(weight[:, first:last], grain, *scale), grain) for (first, last), scale in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.no_grad()
def gptq(
    weight: torch.Tensor,
    plan: LayerPlan,
    gram: torch.Tensor,
    damp: float = 0.01,
    order: bool = True,
    scales: Sequence[Scales] | None = None,
    search: bool = False,
) -> tuple[torch.Tensor, list[Scales]]:
    """Round (rows, columns) under the input's second moments -> (fp32 weight on the grid, scales of each part).

    gram    (columns, columns) mean of hat^T hat; hat: the input as the rounded weight meets it
    damp    added to the diagonal, as a share of its mean; doubled until the matrix has a Cholesky factor
    order   columns of large moments first (scales do not depend on it)
    scales  given ones instead of fitted ones; search: try those of `mse_scales` too and keep the better
    Never a larger error than nearest rounding on these moments. FormatError if a moment is not finite.
    """
    weight, gram = weight.float(), check_finite(gram.float(), "second moments of the input")
    met = factor(gram, damp, int(order))
    candidates = [list(scales)] if scales is not None else [fit_scales(weight, plan)]
    if search and scales is None:
        candidates.append(mse_scales(weight, plan, gram.diagonal()))
    best, least, kept = None, torch.inf, candidates[0]
    for candidate in candidates:
        rounded, loss = _descend(weight, plan, candidate, met)
        plain = on_grid(weight, plan, candidate)
        plain_loss = _quadratic(plain - weight, gram)
        rounded = torch.where((loss < plain_loss)[:, None], rounded, plain)
        total = float(torch.minimum(loss, plain_loss).double().sum())
        if total < least:
            best, least, kept = rounded, total, candidate
    return best, kept


@torch.no_grad()
def coordinate_descent(
    weight: torch.Tensor, plan: LayerPlan, gram: torch.Tensor, sweeps: int = SWEEPS
) -> tuple[torch.Tensor, list[Scales]]:
    """Round (rows, columns), each column again and again -> (fp32 weight on the grid, scales of each part).

    Ŵ_k = Q(W_k + sum over j != k of E_j H_jk / H_kk),  E = W - Ŵ,  from Ŵ = W on, large |W_k| H_kk^1/2 first

    gram    as in `gptq`: its diagonal weighs the search for the first scales, too
    sweeps  over all columns, the scales fitted to the codes after each; 0: to nearest. The best one stays
    COMQ, arXiv 2403.07134, on moments in place of inputs; here one order for all rows. Errors as of `gptq`.
    """
    weight, gram = weight.float(), check_finite(gram.float(), "second moments of the input")
    scales = mse_scales(weight, plan, gram.diagonal())
    best, kept, now = on_grid(weight, plan, scales), scales, weight
    least = error(best, weight, gram)
    for _ in range(sweeps):
        now = _swept(weight, now, plan, scales, gram)
        now, scales = _rescaled(weight, now, plan, scales, gram)
        loss = error(now, weight, gram)
        if loss < least:
            best, kept, least = now, scales, loss
    return best, kept


def _swept(
    weight: torch.Tensor, now: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales], gram: torch.Tensor
) -> torch.Tensor:
    """`now` (rows, columns) with each column moved once to the best point of its grid, the others as they are then."""
    columns = (weight.norm(dim=0) * gram.diagonal().clamp(min=0).sqrt()).argsort(descending=True, stable=True)
    grid, order = _Grid(weight.shape[0], plan, scales, columns), columns.tolist()
    wanted, gram = weight.t()[columns], gram[columns][:, columns]
    gap, power = wanted - now.t()[columns], gram.diagonal().clone()
    out = torch.empty_like(wanted)
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        pull, inner = gram[first:last] @ gap, gram[first:last, first:last]
        for i in range(last - first):
            k = first + i
            target = wanted[k] + (pull[i] / power[k] - gap[k] if power[k] > 0 else 0)
            rounded = grid.round(target, k)
            move = wanted[k] - rounded - gap[k]
            pull.addr_(inner[i], move)
            gap[k] += move
            out[order[k]] = rounded
    return on_grid(out.t().contiguous(), plan, scales)


def _rescaled(
    weight: torch.Tensor, now: torch.Tensor, plan: LayerPlan, scales: list[Scales], gram: torch.Tensor
) -> tuple[torch.Tensor, list[Scales]]:
    """-> (`now` under, the scales): s_b + <Q_b, (E H)_b> / <Q_b, Q_b H_bb>, one block after the other.

    Q_b (rows, width) codes of the block; nothing changes but under scales of one level of symmetric integers.
    """
    spec, grain = plan.weight.spec, plan.weight.grain
    if not isinstance(spec, Integer) or spec.affine or grain.two_level or grain.kind == "tensor":
        return now, scales
    pull, found, now = (weight - now) @ gram, [], now.clone()
    for (first, last), scale in zip(plan.parts, scales, strict=True):
        steps = scale.scale.clone()
        for block, start in enumerate(range(first, last, grain.width(last - first))):
            own = slice(start, min(start + grain.width(last - first), last))
            codes = now[:, own] / steps[:, block, None]
            reach = codes @ gram[own]
            size = (reach[:, own] * codes).sum(1)
            more = (pull[:, own] * codes).sum(1) / size
            more = torch.where((size > 0) & (steps[:, block] + more > SCALE_FLOOR), more, 0)
            steps[:, block] += more
            pull -= more[:, None] * reach
            now[:, own] = codes * steps[:, block, None]
        found.append(scale._replace(scale=steps))
    return on_grid(now, plan, found), found


@torch.no_grad()
def error(rounded: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """E|hat Ŵ^T - hat W^T|^2, summed over the rows of W. Moments as in `gptq`."""
    return float(_quadratic(rounded.float() - weight.float(), gram.float()).double().sum())


@torch.no_grad()
def mse_scales(
    weight: torch.Tensor, plan: LayerPlan, weights: torch.Tensor | None = None, shrink: int = FACTORS
) -> list[Scales]:
    """Scales of each part whose blocks have the least squared error, searched among shares 1.0 ... 0.6 of the range.

    weights (columns,) counts columns by their importance, e.g. the diagonal of gram.
    """
    weight, spec, grain = weight.float(), plan.weight.spec, plan.weight.grain
    weights = torch.ones(weight.shape[1], device=weight.device) if weights is None else weights.float()
    found = []
    for first, last in plan.parts:
        found.append(_search(weight[:, first:last], spec, grain, weights[first:last], shrink))
    return found


def _search(part: torch.Tensor, spec: Format, grain: Granularity, weights: torch.Tensor, shrink: int) -> Scales:
    if grain.two_level and isinstance(spec, Integer):
        free = _search(part, spec, replace(grain, two_level=False), weights, shrink)
        return spec.two_level(free.scale)
    start = spec.fit(part, grain)
    uniform = bool((spec.grid().diff().diff() == 0).all())
    factors = [*torch.linspace(1.0, SMALLEST, shrink).tolist(), *(() if uniform else LARGER)]
    best, least = start, torch.full_like(start.scale, torch.inf, dtype=torch.float32)
    for factor in factors:
        tried = scaled(spec, start, factor)
        loss = _block_sum((spec.fake(part, grain, *tried) - part).square_().mul_(weights), grain)
        best = best._replace(scale=torch.where(loss < least, tried.scale, best.scale))
        least = torch.minimum(loss, least)
    return best


def scaled(spec: Format, scales: Scales, factor: float) -> Scales:
    """The same scales, steps times `factor` (as near as the format can store them), zero points kept."""
    if not spec.fixed:
        return scales._replace(scale=scales.scale * factor)
    if factor == 1.0:
        return scales  # storing a stored scale again must not move it
    step = spec.step(scales.scale, scales.scale_global) * factor
    return scales._replace(scale=spec.store(step, scales.scale_global))


def _block_sum(values: torch.Tensor, grain: Granularity) -> torch.Tensor:
    """Sum per scale block, shaped as the scale."""
    sums = block_view(values, grain).sum(-1)
    return sums.sum().reshape(1, 1) if grain.kind == "tensor" else sums


def _quadratic(matrix: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Per row r: r gram r^T, from the upper triangle of the symmetric gram: half the work."""
    total = matrix.new_zeros(matrix.shape[0])
    for first in range(0, gram.shape[0], WIDE):
        last = min(first + WIDE, gram.shape[0])
        own = matrix[:, first:last]
        row = own @ gram[first:last, first:last]
        if first:
            row.addmm_(matrix[:, :first], gram[:first, first:last], alpha=2)
        total += (row * own).sum(1)
    return total


def cholesky(gram: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (lower Cholesky factor of gram + diag(added), added (columns,)). Inputs never seen count as average ones."""
    diagonal = gram.diagonal()
    seen = diagonal > 0
    mean = float(diagonal[seen].mean()) if bool(seen.any()) else 1.0
    for _ in range(ATTEMPTS):
        added = torch.where(seen, damp * mean, (1 + damp) * mean - diagonal)
        for dtype in (torch.float32, torch.float64):
            damped = gram.to(dtype, copy=True)
            damped.diagonal().add_(added.to(dtype))
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed) and bool(factor.diagonal().float().gt(0).all()):
                return factor.float(), added
        damp = max(2 * damp, FIRST_DAMP)
    raise torch.linalg.LinAlgError(f"second moments have no Cholesky factor at damping {damp:g}")


class Factor(NamedTuple):
    """In the order of `columns`. back (columns, columns): B; pivot (columns,): diag(R)^2; added (columns,)"""

    back: torch.Tensor
    pivot: torch.Tensor
    added: torch.Tensor
    columns: torch.Tensor


def factor(gram: torch.Tensor, damp: float, run: int = 1) -> Factor:
    """R is the Cholesky factor of the matrix with its order reversed: gram = R R^T, R upper triangular.

    run  so many neighbours stay together where columns of large moments go first; 0: the columns' own order
    """
    columns = torch.arange(gram.shape[0], device=gram.device)
    if run:
        first = gram.diagonal().reshape(-1, run).sum(1).argsort(descending=True, stable=True)
        columns = columns.reshape(-1, run)[first].reshape(-1)
    reverse = columns.flip(0)
    lower, added = cholesky(gram[reverse][:, reverse], damp)
    diagonal = lower.diagonal()
    back = (lower / diagonal).flip(0, 1).contiguous()
    return Factor(back, diagonal.flip(0).square(), added.flip(0), columns)


class _Grid:
    """Rounds one column at a time. columns: the matrix's column numbers in the order they are asked for."""

    def __init__(self, rows: int, plan: LayerPlan, scales: Sequence[Scales], columns: torch.Tensor):
        spec, grain = plan.weight.spec, plan.weight.grain
        steps, zeros, where, forms, start = [], [], [], [], 0
        for (first, last), scale in zip(plan.parts, scales, strict=True):
            step = spec.step(scale.scale, scale.scale_global)
            steps.append(step.t().expand(-1, rows))
            zeros.append(None if scale.zero is None else scale.zero.float().t().expand(-1, rows))
            where += [start + k // grain.width(last - first) for k in range(last - first)]
            forms += [spec.of(scale.table)] * step.shape[1]
            start += step.shape[1]
        self.step = torch.cat(steps).contiguous()
        self.divisor = self.step.masked_fill(self.step == 0, torch.inf)
        self.zero = None if zeros[0] is None else torch.cat(zeros).contiguous()
        self.where = [where[k] for k in columns.tolist()]
        self.forms = forms

    def round(self, values: torch.Tensor, k: int) -> torch.Tensor:
        """values (rows,) of the k-th column in order -> their nearest grid points."""
        block = self.where[k]
        units, form = values / self.divisor[block], self.forms[block]
        if self.zero is None:
            return form.snap(units).mul_(self.step[block])
        zero = self.zero[block]
        return form.snap(units.round_().add_(zero)).sub_(zero).mul_(self.step[block])


def _descend(
    weight: torch.Tensor, plan: LayerPlan, scales: Sequence[Scales], met: Factor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (weight on the grid, its error r gram r^T per row). Matrices are held transposed: a column is contiguous."""
    grid = _Grid(weight.shape[0], plan, scales, met.columns)
    wanted, order = weight.t()[met.columns], met.columns.tolist()
    gap, out = torch.empty_like(wanted), torch.empty_like(wanted)
    loss = wanted.new_zeros(wanted.shape[1])
    for first in range(0, wanted.shape[0], BLOCK):
        last = min(first + BLOCK, wanted.shape[0])
        target = torch.addmm(wanted[first:last], met.back[:first, first:last].t(), gap[:first])
        inner = met.back[first:last, first:last].t().contiguous()
        for i in range(last - first):
            value = target[i]
            if i:
                value.addmv_(gap[first : first + i].t(), inner[i, :i])
            rounded = grid.round(value, first + i)
            torch.sub(wanted[first + i], rounded, out=gap[first + i])
            out[order[first + i]] = rounded
            value.sub_(rounded)
        loss += met.pivot[first:last] @ target.square_()
        loss -= met.added[first:last] @ gap[first:last].square()
    return on_grid(out.t().contiguous(), plan, scales), loss.clamp_(min=0)
