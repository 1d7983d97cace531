"""The low-rank branch: the best rank-r part of a weight in the norm of its input, and its alternation with rounding.

    minimise |(W - up down) gram^1/2|_F:   up = U_r,  down = U_r^T W,  U_r = leading eigenvectors of W gram W^T

W (rows, columns), gram (columns, columns), down (rank, columns), up (rows, rank). This is the truncated SVD of
W gram^1/2 multiplied by gram^-1/2 again, without either root: nothing is inverted, so gram may be singular. U_r by
subspace iteration from a seeded start (Halko et al., arXiv 0909.4061), by `eigh` where the matrix is small. SVDQuant
(arXiv 2411.05007) takes full SVDs of W alone and alternates them with rounding as `refine` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dq.formats.base import Scales

SMALL = 256  # rows up to which the eigenvectors are computed exactly
SPARE = 16  # directions iterated beyond the rank
TURNS = 4  # each squares the ratio of singular values twice


@torch.no_grad()
def factors(
    weight: torch.Tensor, rank: int, gram: torch.Tensor | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> down (rank, columns), up (rows, rank), fp32, equal norms per component; zeros beyond the matrix's own rank.

    gram None: plain truncated SVD. The same seed gives the same factors; no global random state is used.
    """
    weight = weight.float()
    rows, columns = weight.shape
    useful = min(rank, rows, columns)
    up = _leading(weight, useful, None if gram is None else gram.float(), seed)
    down = up.t() @ weight
    size = down.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    up, down = up * size, down / size[:, None]
    spare = rank - useful
    return torch.cat([down, down.new_zeros(spare, columns)]), torch.cat([up, up.new_zeros(rows, spare)], 1)


def _leading(weight: torch.Tensor, count: int, gram: torch.Tensor | None, seed: int) -> torch.Tensor:
    """(rows, count) orthonormal: leading left singular vectors of weight gram^1/2."""
    rows = weight.shape[0]
    if count == 0:
        return weight.new_zeros(rows, 0)
    if rows <= max(SMALL, count + SPARE):
        wide = weight.double()
        inner = wide @ wide.t() if gram is None else wide @ (gram.double() @ wide.t())
        return torch.linalg.eigh(inner).eigenvectors[:, -count:].flip(1).float()
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rows, count + SPARE, generator=generator).to(weight.device)
    for turn in range(TURNS + 1):
        seen = weight.t() @ basis
        weighed = seen if gram is None else gram @ seen
        if turn < TURNS:
            basis = torch.linalg.qr(weight @ weighed).Q
    inner = seen.double().t() @ weighed.double()
    return basis @ torch.linalg.eigh(inner).eigenvectors[:, -count:].flip(1).float()


@torch.no_grad()
def refine(
    weight: torch.Tensor,
    rank: int,
    round_: Callable[[torch.Tensor], tuple[torch.Tensor, list[Scales]]],
    gram: torch.Tensor | None,
    error: Callable[[torch.Tensor, torch.Tensor], float],
    iterations: int = 8,
    seed: int = 0,
) -> tuple[torch.Tensor, list[Scales], torch.Tensor, torch.Tensor]:
    """Alternate L = SVD_r(W - Ŵ) and Ŵ = round(W - L), from Ŵ = 0 -> (Ŵ, scales, down, up) of the least error.

    round_  e.g. lambda rest: rounding.nearest(rest, plan)
    error   of Ŵ and L. Ends once that no longer falls. The first turn is one SVD and one rounding: never worse than it
    """
    best, least, rounded = None, torch.inf, torch.zeros_like(weight)
    for _ in range(max(1, iterations)):
        down, up = factors(weight - rounded, rank, gram, seed)
        branch = up @ down
        rounded, scales = round_(weight - branch)
        loss = error(rounded, branch)
        if best is not None and not loss < least:
            break
        best, least = (rounded, scales, down, up), loss
    return best
