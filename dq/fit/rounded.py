"""The rounded weight of a layer as units and steps that can be trained, and its bytes: see `trainable`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq.fit.auxiliary import Auxiliary
from dq.formats.base import block_view
from dq.kernels import Tensors, reference


@dataclass(frozen=True)
class Slice:
    """Columns of a weight that were rounded as a matrix of their own, and the scales that are theirs."""

    form: Any
    columns: slice
    blocks: slice
    of: torch.Tensor  # (columns,) which of its blocks a column belongs to


class Weight:
    """The rounded weight of a layer, part by part, as units and steps."""

    def __init__(self, plan, tensors: Tensors):
        self.plan, self.tensors, self.spec = plan, tensors, plan.weight.spec
        codes = self.spec.unpack(tensors.weight, plan.columns)
        table, span = reference.tables(plan), self.spec.span
        self.slices, values = [], []
        pairs = enumerate(zip(plan.parts, reference.scale_columns(plan), strict=True))
        for i, ((first, last), (left, right)) in pairs:
            form = self.spec.of(table(tensors, i))
            width = plan.weight.grain.width(last - first)
            of = torch.arange(last - first, device=codes.device) // width
            self.slices.append(Slice(form, slice(first, last), slice(left, right), of))
            part = codes[:, first // span : last // span].contiguous()
            found = form.values_of(block_view(part, plan.weight.grain)).reshape(len(part), -1)
            values.append(found[:, : last - first])
        self.values = torch.cat(values, 1)
        if tensors.zero is not None:
            self.values -= self._wide(tensors.zero.float())
        self.log: nn.Parameter | None = None
        self.unit: nn.Parameter | None = None
        self.start = self.values
        self.low: tuple[nn.Parameter, nn.Parameter] | None = None
        self.help: Auxiliary | None = None

    @torch.no_grad()
    def aim(self, weight: torch.Tensor) -> None:
        """Let units begin at a weight (rows, columns) where it rounds to the codes."""
        if not self._free:
            return
        wide = self._wide(self.steps())
        grid = self.spec.grid().to(wide.device)
        wanted = weight.float() / wide.masked_fill(wide == 0, torch.inf)
        zero = 0.0 if self.tensors.zero is None else self._wide(self.tensors.zero.float())
        self.unit = nn.Parameter((wanted + zero).clamp(grid[0], grid[-1]) - zero)
        same = self.codes() == self.spec.unpack(self.tensors.weight, self.plan.columns)
        self.start = torch.where(same, self.unit.detach(), self.values)
        self.unit.data = self.start.clone()

    @property
    def _free(self) -> bool:
        """Whether codes may move: not those of several weights or of a stored table."""
        return self.spec.span == 1 and not self.spec.tabled

    @torch.no_grad()
    def factors(self, rank: int) -> list[nn.Parameter]:
        """(A, B) by whose product units move from now on; none where codes may not."""
        if not self._free:
            return []
        rank = min(rank, *self.values.shape)
        down, bound = torch.empty(rank, self.values.shape[1]), self.values.shape[1] ** -0.5
        seeded = torch.Generator().manual_seed(rank * self.plan.rows + self.plan.columns)
        down.uniform_(-bound, bound, generator=seeded)
        down, up = down.to(self.values.device), self.values.new_zeros(self.plan.rows, rank)
        self.low = nn.Parameter(down), nn.Parameter(up)
        return list(self.low)

    def helped(self, weight: torch.Tensor, rank: int) -> list[nn.Parameter]:
        """Put beside the weight what it lacks of one in full precision (rows, columns), as far as `rank` goes."""
        if not self._free:
            return []
        self.help = Auxiliary(weight.float() - self.values * self._wide(self.steps()), rank)
        return [self.help.down, self.help.up]

    @property
    def carrier(self) -> str | None:
        """The tensor of scales that is stored as fp32."""
        if self.tensors.scale_global is not None:
            return "scale_global"
        return "scale" if self.tensors.scale.dtype is torch.float32 else None

    def units(self) -> list[nn.Parameter]:
        """The trained weight; none for codes of several weights or of a stored table, which stay what they are."""
        if not self._free:
            return []
        self.unit = nn.Parameter(self.start.clone())
        return [self.unit]

    @torch.no_grad()
    def gaps(self) -> list[float]:
        """The mean distance of neighbouring values of the grid where the units are, in steps: 1 for integers."""
        grid = self.spec.grid().to(self.values.device).unique()
        at = torch.searchsorted(grid, self.values.contiguous()).clamp(1, len(grid) - 1)
        return [float((grid[at] - grid[at - 1]).mean())]

    def size(self) -> float:
        """By how much a rate of 1 moves what `logs` gives: a share of all of it."""
        return 1.0

    def logs(self) -> list[nn.Parameter]:
        if self.carrier is None:
            return []
        self.log = nn.Parameter(torch.zeros_like(getattr(self.tensors, self.carrier)))
        return [self.log]

    def _wide(self, blocks: torch.Tensor) -> torch.Tensor:
        """One value for every weight from one for every block of scales: (rows | 1, blocks) -> (rows, columns)."""
        parts = [blocks[:, each.blocks].index_select(1, each.of) for each in self.slices]
        wide = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return wide.expand(self.plan.rows, -1)

    def scales(self) -> dict[str, torch.Tensor]:
        """The stored scales as they now are."""
        own = {name: getattr(self.tensors, name) for name in ("scale", "scale_global")}
        if self.log is not None and self.carrier is not None:
            own[self.carrier] = own[self.carrier] * self.log.detach().exp()
        return {name: value for name, value in own.items() if value is not None}

    def steps(self) -> torch.Tensor:
        """(rows | 1, blocks), by the arithmetic of the run time."""
        own, two_level = self.scales(), self.plan.weight.grain.two_level
        if "scale_global" not in own:
            return self.spec.step(own["scale"])
        found = []
        for i, each in enumerate(self.slices):
            whole = own["scale_global"][:, i : i + 1] if two_level else own["scale_global"][i : i + 1]
            found.append(self.spec.step(own["scale"][:, each.blocks], whole))
        return torch.cat(found, 1)

    def snapped(self) -> torch.Tensor:
        if self.unit is None:
            return self.values
        if self.tensors.zero is None:
            return self.spec.snap(self.unit.detach().clone())
        zero = self._wide(self.tensors.zero.float())
        return self.spec.snap(self.unit.detach().round() + zero).sub_(zero)

    def rounded(self, helped: bool = False) -> torch.Tensor:
        """The weight (rows, columns) fp32; `helped`: with what stands beside it while it is trained."""
        if self.low is not None and self.unit is not None:
            down, up = self.low
            self.unit.data = self.start + up.detach() @ down.detach()
        self._step = self._wide(self.steps())
        self._snapped = self.snapped()
        weight = self._snapped * self._step
        return weight + self.help.product() if helped and self.help is not None else weight

    def back(self, grad: torch.Tensor | None) -> None:
        """Gradients of units and logs from that of the weight `rounded` gave last."""
        grad = torch.zeros_like(self._snapped) if grad is None else grad
        along = grad * self._step
        if self.help is not None:
            self.help.back(grad)
        if self.log is not None:
            self.log.grad = self._summed(along * self._snapped)
        if self.unit is not None:
            low, high = self.spec.limits()
            zero = 0.0 if self.tensors.zero is None else self._wide(self.tensors.zero.float())
            at = self.unit.detach() + zero
            self.unit.grad = along.masked_fill_((at < low) | (at > high), 0.0)
            if self.low is not None:
                down, up = self.low
                down.grad, up.grad = up.detach().t() @ self.unit.grad, self.unit.grad @ down.detach().t()
                self.unit.grad = None

    def _summed(self, each: torch.Tensor) -> torch.Tensor:
        """(rows, columns) summed over the weights of every stored fp32 scale."""
        log, found = self.log, []
        assert log is not None
        for part in self.slices:
            own = each[:, part.columns]
            count = part.blocks.stop - part.blocks.start
            if self.carrier == "scale_global":
                found.append(own.sum(1, keepdim=True))
            else:
                found.append(own.new_zeros(len(own), count).index_add_(1, part.of, own))
        total = found[0] if len(found) == 1 else torch.cat(found, 1)
        if self.carrier == "scale_global" and not self.plan.weight.grain.two_level:
            return total.sum(0)
        return total.sum(0, keepdim=True) if len(log) == 1 else total

    def jump(self, share: float) -> int:
        """After an update at `share` of the highest rate: move what no gradient's step does. -> codes that did."""
        return 0

    def stored(self) -> dict[str, torch.Tensor]:
        """The packed tensors that changed."""
        found = {}
        if self.log is not None:
            found |= self.scales()
        if self.unit is not None:
            found["weight"] = self.spec.pack(self.codes())
        return found

    def codes(self) -> torch.Tensor:
        """int8 (rows, columns): what the units round to."""
        assert self.unit is not None, "asked of codes that move"
        units = self.unit.detach()
        units = units if self.tensors.zero is None else units.round() + self._wide(self.tensors.zero.float())
        return self.spec.codes_of(units.clone())
