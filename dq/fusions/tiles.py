"""Rounded attention in plain torch, in tiles, on any device: the truth that kernels are held to. Emulated arithmetic.

    S = q^ k^T + mean(q) (k - mean(k))^T,   q^ = Q(q - mean(q)),  k^ = Q(k - mean(k))
    o = sum_t e^(m_t - M) P(e^(S_t - m_t)) V^_t / sum_t e^(m_t - M) e^(S_t - m_t)

q (..., rows, width), k and v (..., keys, width); mean(q) over QUERIES rows, mean(k) over all keys; t a tile of KEYS
keys, m_t its largest score of a row, M the largest of all. SageAttention 2 (arXiv 2411.10958) and its relatives:
`attentionplan.AttentionPlan` says what is rounded. Deviation: p is rounded under the largest score of its own tile,
where the paper has the largest so far, and tiles of 64 keys. Rows whose keys are all masked by -inf give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from dq import formats
from dq.attentionplan import LINEAR, LOG, AttentionPlan
from dq.formats.base import Format

QUERIES, KEYS = 128, 512
# which rows of queries and of keys share a scale: those with equal numbers
SHARED: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("q", "token"): lambda row: row,
    ("k", "token"): lambda row: row,
    ("q", "block"): lambda row: row // QUERIES,
    ("k", "block"): lambda row: row // 64,
    ("q", "thread"): lambda row: row // 32 * 8 + row % 8,  # of a matrix unit's operands, 16 x 8
    ("k", "thread"): lambda row: row // 64 * 4 + row % 8 // 2,
    ("q", "tensor"): lambda row: row * 0,
    ("k", "tensor"): lambda row: row * 0,
}


def attention(
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention, without dropout, as a plan rounds it: in fp32, returned in the query's dtype."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = query.float(), key.float(), value.float()
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    mask = _mask(attn_mask, is_causal, q.shape[-2], k.shape[-2], q.device)
    keys = _Keys.of(plan, k, v)
    found = [
        _rows(plan, q[..., first : first + QUERIES, :], keys, _part(mask, -2, first, first + QUERIES), factor)
        for first in range(0, q.shape[-2], QUERIES)
    ]
    return torch.cat(found, -2).to(query.dtype)


@dataclass
class _Keys:
    """Keys less their mean and values, both as they are and rounded, and where tiles of them begin and end."""

    exact: torch.Tensor
    rounded: torch.Tensor
    values: torch.Tensor
    ends: list[int]

    @classmethod
    def of(cls, plan: AttentionPlan, k: torch.Tensor, v: torch.Tensor) -> _Keys:
        apart = int(plan.start and k.shape[-2] > 1)
        if "k" in plan.smooth:
            k = k - k[..., apart:, :].mean(-2, keepdim=True)
        rounded, values = (
            torch.cat([each[..., :apart, :], _rounded(each[..., apart:, :], field, getattr(plan, field))], -2)
            for field, each in (("k", k), ("v", v))
        )
        starts = list(range(apart, k.shape[-2], KEYS))
        return cls(k, rounded, values, [*[0] * apart, *starts, k.shape[-2]])

    def tiles(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.ends)


def _rows(plan: AttentionPlan, q: torch.Tensor, keys: _Keys, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Output of at most QUERIES rows of queries."""
    mean = q.mean(-2, keepdim=True) if "q" in plan.smooth else None
    rounded = _rounded(q if mean is None else q - mean, "q", plan.q)
    shape = (*torch.broadcast_shapes(q.shape[:-2], keys.values.shape[:-2]), q.shape[-2])
    out, total = q.new_zeros(*shape, keys.values.shape[-1]), q.new_zeros(*shape, 1)
    top = torch.full_like(total, -torch.inf)
    for first, last in keys.tiles():
        apart = plan.start and last == 1 < keys.ends[-1]
        own = (keys.exact if apart else keys.rounded)[..., first:last, :].mT
        scores = (q if apart else rounded) @ own
        if mean is not None and not apart:
            scores = scores + mean @ keys.exact[..., first:last, :].mT
        scores = scores * scale
        if (added := _part(mask, -1, first, last)) is not None:
            scores = scores + added
        here = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - _finite(here))
        new = torch.maximum(top, here)
        before, now = torch.exp(top - _finite(new)), torch.exp(here - _finite(new))
        product = (weights if apart else _share(weights, plan.p)) @ keys.values[..., first:last, :]
        out, total, top = out * before + product * now, total * before + weights.sum(-1, keepdim=True) * now, new
    return out / total.masked_fill(total == 0, 1)


def _finite(top: torch.Tensor) -> torch.Tensor:
    """The largest scores, 0 for rows that have none: all of their keys are masked."""
    return top.masked_fill(top == -torch.inf, 0)


def _part(mask: torch.Tensor | None, dim: int, first: int, last: int) -> torch.Tensor | None:
    """A stretch of a mask's rows or keys; what it repeats along them stays one."""
    return (
        mask if mask is None or mask.shape[dim] == 1 else mask.narrow(dim, first, min(last, mask.shape[dim]) - first)
    )


def _mask(mask: torch.Tensor | None, causal: bool, rows: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """What is added to the scores, at least 2-d."""
    if causal:
        mask = torch.ones(rows, keys, dtype=torch.bool, device=device).tril()
    if mask is None:
        return None
    mask = mask if mask.dim() > 1 else mask[None]
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, device=device).masked_fill_(~mask, -torch.inf)
    return mask.float()


def _rounded(x: torch.Tensor, field: str, text: str) -> torch.Tensor:
    """x (..., rows, width) on the grid of "int4/thread" and the like; "" leaves it."""
    if not text or x.shape[-2] == 0:
        return x
    form, _, grain = text.partition("/")
    spec, most = _format(form)
    if field == "v":
        peak = x.abs().amax(-2 if grain == "channel" else (-2, -1), keepdim=True)
    else:
        group = SHARED[field, grain](torch.arange(x.shape[-2], device=x.device))
        each = x.abs().amax(-1)
        group = group.expand_as(each)
        peak = torch.zeros_like(each).scatter_reduce(-1, group, each, "amax").gather(-1, group)[..., None]
    step = peak / most
    return spec.snap(x / step.masked_fill(step == 0, 1)) * step


def _share(weights: torch.Tensor, text: str) -> torch.Tensor:
    """Weights of at most 1 as p's format has them."""
    if not text:
        return weights
    if found := LINEAR.match(text):
        most = 2 ** int(found[1]) - 1
        return (weights * most).round() / most
    if found := LOG.match(text):
        step, zero = float(found[2]), 2 ** int(found[1]) - 1
        code = (-weights.log2() / step).round()
        return torch.where(code < zero, torch.exp2(-step * code), 0.0)
    spec, most = _format(text)
    return spec.snap(weights * most) / most


@cache
def _format(name: str) -> tuple[Format, float]:
    """A format, and its largest value in units of the step."""
    spec = formats.get(name)
    return spec, float(spec.grid().abs().max())
