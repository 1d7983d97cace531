"""A layer's codebook and codes while they are trained. PV-Tuning, Malinovskii et al., arXiv 2405.14852.

    Ŵ_v = book[code_v],    V: book <- Adam(dL/dbook),    P: code_v = argmin_c |book[c] - (Ŵ_v + reach m_v / |m_v|)|²

v (n,) vectors of `span` neighbours of a row, book (entries, span), m (n, span) the mean of -dL/dŴ over the last
updates. Codes are no numbers that a small step could move: the P-step takes a step as long as entries are apart, for
the share TAU of the vectors with the largest |m_v| and no others, so that the loss falls although each of them jumps.
Nothing passes straight through a choice of codes; it does through the rounding of entries to the whole numbers that
are stored. TAU falls with the learning rate. Deviations: both steps in every update, where the paper alternates whole
phases; means instead of Adam's directions, whose first say nothing of how much a vector matters, and a TAU for updates
of a few calls (0.002 and the paper's 0.01 gained nothing at all there); TAU and reach are fixed, there is no trust
ratio.
"""

from __future__ import annotations

import torch
from torch import nn

from dq.fit.rounded import Weight
from dq.formats.codebook import Codebook, nearest
from dq.kernels import Tensors

TAU = 0.0002  # of the vectors, that an update may give another code
MEMORY = 0.9  # what an update keeps of the mean gradient
REACH = 1.0  # of the distance of an entry to its nearest other one


class Vectors(Weight):
    """The rounded weight of a layer with one codebook, as entries and codes.

    push (n, span): m; code (n,), whole numbers in fp32, so that they are kept and restored as all that is trained
    """

    def __init__(self, plan, tensors: Tensors):
        super().__init__(plan, tensors)
        spec = plan.weight.spec.of(tensors.table)
        assert isinstance(spec, Codebook), "others have a value for each weight"
        self.form, scale = spec, tensors.scale.float().reshape(())
        self.book = nn.Parameter(spec.entry_units() * scale)
        found = spec.unpack(tensors.weight, plan.columns).reshape(-1).to(torch.int32) & (spec.count - 1)
        self.code = nn.Parameter(found.float(), requires_grad=False)
        self.push: nn.Parameter | None = None
        self.moves = False

    def units(self) -> list[nn.Parameter]:
        self.push = nn.Parameter(torch.zeros(len(self.code), self.form.span, device=self.code.device))
        return [self.push, self.code]

    def logs(self) -> list[nn.Parameter]:
        """The entries: they are what steps are elsewhere."""
        self.moves = True
        return [self.book]

    @property
    def entries(self) -> torch.Tensor:
        """(entries, span) as they will be stored: whole numbers of a scale."""
        book = self.book.detach()
        return self.form.book(self.form.stored(book)) if self.moves else book

    def size(self) -> float:
        return float(self.book.detach().square().mean().sqrt())

    def gaps(self) -> list[float]:
        return [0.0, 1.0]  # codes get no gradient, so that no step moves them either

    @torch.no_grad()
    def gap(self) -> float:
        """The mean distance of an entry to its nearest other one, a coordinate."""
        far = torch.cdist(self.entries, self.entries)
        far.fill_diagonal_(torch.inf)
        return float(far.amin(1).mean()) / self.form.span**0.5

    @torch.no_grad()
    def jump(self, share: float) -> int:
        """The P-step of an update, of `share` of TAU, by the gradient it left. -> vectors with another code."""
        if self.push is None or self.push.grad is None:
            return 0
        self.push.mul_(MEMORY).sub_(self.push.grad, alpha=1 - MEMORY)
        far = self.push.square().sum(1)
        most = far.topk(max(1, round(len(far) * TAU * share))).indices
        most = most[far[most] > 0]
        before, book = self.code[most].clone(), self.entries
        along = self.push[most] / far[most].sqrt()[:, None]
        wanted = book[before.long()] + along * (REACH * self.gap() * self.form.span**0.5)
        if len(most):
            self.code[most] = nearest(wanted, book)[0].float()
        jumped = self.code[most] != before
        self.push[most[jumped]] = 0.0  # what was known of it is used
        return int(jumped.sum())

    def rounded(self, helped: bool = False) -> torch.Tensor:
        return self.entries[self.code.long()].reshape(self.plan.rows, -1)

    def back(self, grad: torch.Tensor | None) -> None:
        wide = (
            self.book.new_zeros(len(self.code), self.form.span) if grad is None else grad.reshape(-1, self.form.span)
        )
        if self.moves:
            self.book.grad = torch.zeros_like(self.book).index_add_(0, self.code.long(), wide)
        if self.push is not None:
            self.push.grad, self.code.grad = wide.clone(), torch.zeros_like(self.code)

    def stored(self) -> dict[str, torch.Tensor]:
        found = {}
        if self.moves:
            scales = self.form.stored(self.book.detach())
            assert scales.table is not None, "a codebook has one"
            found |= {"scale": scales.scale, "table": scales.table}
        if self.push is not None:
            codes = self.code.reshape(self.plan.rows, -1).to(torch.int32).to(torch.int8)
            found["weight"] = self.spec.pack(codes)
        return found


def weight_of(plan, tensors: Tensors) -> Weight:
    """The rounded weight of a layer, in the way that its format is trained."""
    alone = isinstance(plan.weight.spec, Codebook) and len(plan.parts) == 1
    return Vectors(plan, tensors) if alone else Weight(plan, tensors)
