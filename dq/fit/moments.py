"""Second moments of a layer's input as its rounded weight meets it: smoothed, rotated, with the noise of its rounding.

    E[q(z) q(z)^T] = R^T diag(s) E[x x^T] diag(s) R + diag(noise),   z = (x * s) R,   noise = E[(q(z) - z)^2]

x, z (columns,), s (in,) repeated over a kernel's taps. Rounding errors count as uncorrelated with z and each other.
"""

from __future__ import annotations

import torch

from dq.fit.drafts import DraftLinear
from dq.kernels import reference
from dq.layers import hadamard
from dq.trace.seen import LayerSeen


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


@torch.no_grad()
def noise(seen: LayerSeen, draft: DraftLinear) -> torch.Tensor:
    """(columns,) mean square that activation rounding adds to each column of z; 0 without such rounding.

    Measured for dynamic scales; for stored ones that of a uniform error, mean over the steps.
    """
    plan, taps = draft.plan, draft.plan.columns // draft.plan.shape[1]
    if draft.act_scale is not None:
        steps = draft.act_scale.detach().square().mean(0) / 12
        return torch.cat([step.expand(last - first) for step, (first, last) in zip(steps, plan.parts, strict=True)])
    if plan.act is None:
        return torch.zeros(plan.columns, device=seen.gram.device)
    z = draft.transform(seen.hat.float())
    dim = -1 if plan.kind == "linear" else 1
    error = reference.input_rounder(plan, dim)(z, None) - z
    return error.square().movedim(dim, -1).flatten(0, -2).mean(0).repeat_interleave(taps)
