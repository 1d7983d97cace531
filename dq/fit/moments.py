"""Second moments of a layer's input as its rounded weight meets it: smoothed, rotated, with the noise of its rounding.

    E[q(z) q(z)^T] = R^T diag(s) E[x x^T] diag(s) R + diag(noise),   z = (x * s) R,   noise = E[(q(z) - z)^2]

x, z (columns,), s (in,) repeated over a kernel's taps. Rounding errors count as uncorrelated with z and each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dq.fit import rounding
from dq.fit.drafts import DraftLinear, input_rounder
from dq.formats.integer import Integer
from dq.layers import hadamard
from dq.trace.seen import LayerSeen

RIDGES = (0.0003, 0.003, 0.03, 0.3)  # shares of its own power that are added to each channel's
JUDGED = 256  # output rows by which one of them is chosen
SOLVED_DAMP = 1e-5  # of moments that are inverted: they have their noise on the diagonal


def transformed(seen: LayerSeen, draft: DraftLinear) -> torch.Tensor:
    """E[z z^T] (columns, columns) fp32 under the smoothing and rotation of a draft."""
    return _turn(_turn(seen.gram, draft).t(), draft)


def _turn(matrix: torch.Tensor, draft: DraftLinear) -> torch.Tensor:
    """(columns, n) moments of raw inputs -> of transformed ones, along the first axis."""
    inputs = draft.plan.shape[1]
    blocks = matrix.reshape(inputs, -1)
    if draft.smooth is not None:
        blocks = blocks * draft.smooth.detach()[:, None]
    if draft.plan.rotate:
        blocks = hadamard.rotate(blocks, draft.plan.rotate, 0)
    if draft.permute is not None:
        blocks = blocks[draft.permute]
    return blocks.reshape(matrix.shape)


def rounded(seen: LayerSeen, draft: DraftLinear) -> torch.Tensor:
    """E[q(z) q(z)^T] (columns, columns) fp32: what GPTQ rounds the weight against."""
    return transformed(seen, draft) + noise(seen, draft).diag()


@dataclass(frozen=True, eq=False)
class Met:
    """What the rounded weight of a draft meets: q(z) = z + noise.

    clean (columns, columns): H = E[z z^T]; noise (columns,): D, 0 without rounding; inverse: of H + D, None without
    """

    clean: torch.Tensor
    noise: torch.Tensor
    inverse: torch.Tensor | None

    @property
    def rounded(self) -> torch.Tensor:
        """H + D."""
        return self.clean + self.noise.diag()

    def target(self, weight: torch.Tensor) -> torch.Tensor:
        """W H (H + D)^-1 (rows, columns): the weight of q(z) that comes nearest to W z. W itself without noise."""
        return weight if self.inverse is None else weight - (weight * self.noise) @ self.inverse

    def lost(self) -> torch.Tensor:
        """(H^-1 + D^-1)^-1: the norm of what even that weight leaves, of which a low-rank branch takes the most."""
        if self.inverse is None:
            return self.clean
        return self.noise.diag() - self.noise[:, None] * self.inverse * self.noise

    def error(self, rounded: torch.Tensor, rest: torch.Tensor) -> float:
        """E|W z - L z - Q q(z)|^2 over the rows: Q = `rounded`, W - L - Q = `rest`; without D if W is not solved."""
        missed = rounding.error(rest, torch.zeros_like(rest), self.clean)
        return missed if self.inverse is None else missed + float(rounded.square().sum(0) @ self.noise)


@torch.no_grad()
def met(seen: LayerSeen, draft: DraftLinear, solved: bool = True) -> Met:
    """The moments of a draft; `solved`, of a linear: with a ridge on H, chosen by rows that a trial was not made of.

    Without one, directions that the calibration did not see count as noise alone and are let go of: fitted to a single
    prompt, a block of tiny-pixart has 6 times the error on another. W itself is kept where it serves those rows best.
    """
    clean, added = transformed(seen, draft), noise(seen, draft)
    ridge = _ridge(seen, draft, added) if solved and draft.plan.kind == "linear" and float(added.sum()) > 0 else None
    if ridge is None:
        return Met(clean, added, None)
    clean, factor = _ridged(clean, added, ridge)
    return Met(clean, added, torch.cholesky_inverse(factor))


def _ridged(clean: torch.Tensor, added: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (H with a ridge, lower Cholesky factor of that plus D)."""
    clean = clean + ridge * clean.diagonal().diag()
    return clean, rounding.cholesky(clean + added.diag(), SOLVED_DAMP)[0]


def _ridge(seen: LayerSeen, draft: DraftLinear, added: torch.Tensor) -> float | None:
    """The one of RIDGES whose weight, made of the earlier half of the rows, errs least on the later; None for W."""
    z = draft.transform(seen.hat.float())
    half, q = len(z) // 2, input_rounder(draft.plan)(z, None, seen.phase)
    weight = draft.weight.data[:: -(-draft.plan.rows // JUDGED)]
    clean, wanted = z[:half].t() @ z[:half] / max(half, 1), z[half:] @ weight.t()
    best, least = None, float((q[half:] @ weight.t() - wanted).square().sum())
    for ridge in RIDGES if half else ():
        less = torch.cholesky_solve((weight * added).t(), _ridged(clean, added, ridge)[1])
        error = float((q[half:] @ (weight.t() - less) - wanted).square().sum())
        if error < least:
            best, least = ridge, error
    return best


@torch.no_grad()
def noise(seen: LayerSeen, draft: DraftLinear) -> torch.Tensor:
    """(columns,) mean square that activation rounding adds to each column of z; 0 without such rounding.

    Measured, each row rounded as in its phase; for stored scales of integers that of a uniform error, mean over steps.
    """
    plan, taps = draft.plan, draft.plan.columns // draft.plan.shape[1]
    if draft.act_scale is not None and plan.act is not None and isinstance(plan.act.spec, Integer):
        steps = draft.act_scale.detach().square().mean(0) / 12
        return torch.cat([step.expand(last - first) for step, (first, last) in zip(steps, plan.parts, strict=True)])
    if plan.act is None:
        return torch.zeros(plan.columns, device=seen.gram.device)
    z = draft.transform(seen.hat.float())
    dim = -1 if plan.kind == "linear" else 1
    stored = None if draft.act_scale is None else draft.act_scale.detach().mean(0)
    error = input_rounder(plan)(z, stored, seen.phase) - z
    return error.square().movedim(dim, -1).flatten(0, -2).mean(0).repeat_interleave(taps)
