"""Second moments of a layer's input as its rounded weight meets it: smoothed, rotated, with the noise of its rounding.

    E[q(z) q(z)^T] = R^T diag(s) E[x x^T] diag(s) R + diag(noise),   z = (x * s) R,   noise = E[(q(z) - z)^2]

x, z (columns,), s (in,) repeated over a kernel's taps. Rounding errors count as uncorrelated with z and each other.
"""

from __future__ import annotations

import torch

from dq import hadamard
from dq.drafts import DraftLinear
from dq.kernels import reference
from dq.seen import LayerSeen


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
    return blocks.reshape(matrix.shape)


@torch.no_grad()
def noise(seen: LayerSeen, draft: DraftLinear) -> torch.Tensor:
    """(columns,) mean square that dynamic activation rounding adds to each column of z; 0 without such rounding."""
    plan, taps = draft.plan, draft.plan.columns // draft.plan.shape[1]
    if plan.act is None or plan.act.scale != "dynamic":
        return seen.x.new_zeros(plan.columns, dtype=torch.float32)
    z = draft.transform(seen.hat.float())
    dim = -1 if plan.kind == "linear" else 1
    error = reference.input_rounder(plan, dim)(z, None) - z
    return error.square().movedim(dim, -1).flatten(0, -2).mean(0).repeat_interleave(taps)


from dataclasses import dataclass  # noqa: E402


@dataclass(frozen=True, eq=False)
class Moments:  # being removed: use `transformed` and `noise`
    gram: torch.Tensor
    cross: torch.Tensor
    noise: torch.Tensor

    @property
    def rounded(self):
        return self.gram + self.noise.diag()


def of(seen, draft):
    return Moments(transformed(seen, draft), None, noise(seen, draft))


def compensated(weight, met, branch, start):
    """Measured to be worse than not compensating (removed soon): gives `start` back."""
    return start
