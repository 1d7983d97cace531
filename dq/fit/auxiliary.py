"""A help beside a rounded weight that fades while it is trained, and is gone at the end. QVGen, arXiv 2505.11497.

    W_t = snap(u) s + up diag(gamma) down,    gamma = 1 in the first half of the columns, f(t) in the second

up (rows, r), down (r, columns) begin as the best rank-r part of what rounding left of the weight, and see the rounded
input, as the weight does. In each phase f falls from 1 to 0 by a cosine; then the second half is dropped, the rest
taken apart again by its singular values, largest first, and r halved: 32, 16, ..., 1, 0. The first steps then train a
nearly exact layer, whose gradients are small, and rounding is taken on a direction after the other.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dq.fit import lowrank

FADED = 0.75  # share of the updates after which it is gone; what is left trains what is shipped


def phases(rank: int) -> int:
    """How often a rank is halved until none is left."""
    return int(math.log2(rank)) + 1


def place(share: float, rank: int) -> tuple[int, float]:
    """(phase, f) after a share of all updates; the phase after the last one is that of plain training."""
    at = share / FADED * phases(rank)
    phase = min(int(at + 1e-9), phases(rank))
    return phase, 0.5 * (1 + math.cos(math.pi * min(max(at - phase, 0.0), 1.0)))


class Auxiliary:
    """The help of one layer: `down` (r, columns) and `up` (rows, r), whose columns beyond a phase's rank are zeros."""

    def __init__(self, error: torch.Tensor, rank: int):
        self.rank = min(rank, *error.shape)
        down, up = lowrank.factors(error, self.rank)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.gamma = torch.ones(self.rank, device=error.device)

    @torch.no_grad()
    def product(self) -> torch.Tensor:
        """(rows, columns) what stands beside the rounded weight."""
        return (self.up * self.gamma) @ self.down

    @torch.no_grad()
    def back(self, grad: torch.Tensor) -> None:
        """Gradients of both factors from that of the weight (rows, columns)."""
        self.up.grad = (grad @ self.down.t()) * self.gamma
        self.down.grad = self.gamma[:, None] * (self.up.t() @ grad)

    def fade(self, phase: int, factor: float) -> None:
        """Set gamma for a place in the schedule."""
        rank = self.rank >> phase
        self.gamma.fill_(0.0)
        self.gamma[:rank] = factor
        self.gamma[: rank // 2] = 1.0

    @torch.no_grad()
    def halve(self, phase: int) -> None:
        """At the end of a phase: drop what has faded, and sort the rest by singular values."""
        kept = self.rank >> (phase + 1)
        product = self.up[:, :kept] @ self.down[:kept]
        self.up.zero_()
        self.down.zero_()
        if kept:
            down, up = lowrank.factors(product, kept)
            self.up[:, :kept], self.down[:kept] = up, down
