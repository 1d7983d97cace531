"""What the layers of one unit see while calibration calls run through it: samples, ranges and second moments.

Calls are dealt into a fixed number of pieces. Every piece is summed up by itself, in call order, and the pieces are
joined in their order: the result is the same to the bit, whoever worked on which piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from dq.layers import geometry
from dq.trace.classes import storable
from dq.trace.seen import LayerSeen, Needs, Unit

GRAM_ROWS = 8192  # rows that go into second moments; twice the columns where that is more
CROP = 64  # pixels of the piece of a map that is sampled: enough for its middle to see what its outputs need


@dataclass(frozen=True)
class CallInfo:
    """One calibration call, as statistics see it.

    index     place among all calls
    rank      place in a random order of all calls: odd rows and crops are shared out along it
    bucket    step bucket
    phase     by the plan's switches
    branches  guidance branch of each batch row
    seed      of the positions sampled in this call
    """

    index: int
    rank: int
    bucket: int
    branches: tuple[int, ...]
    seed: int
    phase: int = 0

    def share(self, total: int, calls: int) -> int:
        """How many of `total` things this call gives."""
        return total * (self.rank + 1) // calls - total * self.rank // calls

    def branch_of(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Branch of each of these rows out of `count`, which are spread evenly over the batch."""
        return torch.tensor(self.branches)[rows * len(self.branches) // count]

    def segments(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(branch, first, last) of the longest runs of rows out of `count` that belong to one branch."""
        size, first = len(self.branches), 0
        for branch, run in groupby(self.branches):
            last = first + len(list(run))
            start, stop = (-(-edge * count // size) for edge in (first, last))
            if stop > start:
                yield branch, start, stop
            first = last


@storable("sums")
@dataclass
class Sums:
    """Statistics of one layer over some calls: fields as in LayerSeen, samples by call, moments not yet divided."""

    source: str = ""
    x: list[torch.Tensor] = field(default_factory=list)
    hat: list[torch.Tensor] = field(default_factory=list)
    bucket: list[torch.Tensor] = field(default_factory=list)
    branch: list[torch.Tensor] = field(default_factory=list)
    phase: list[torch.Tensor] = field(default_factory=list)
    gram: torch.Tensor | None = None
    rows: int = 0
    absmax: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    def add(self, other: Sums) -> None:
        """Join the statistics of later calls to these."""
        for name in ("x", "hat", "bucket", "branch", "phase"):
            getattr(self, name).extend(getattr(other, name))
        joins = {"gram": torch.add, "absmax": torch.maximum, "low": torch.minimum, "high": torch.maximum}
        for name, join in joins.items():
            self._join(name, join, getattr(other, name))
        self.rows += other.rows

    def _join(self, name: str, join: Callable, value: torch.Tensor | None) -> None:
        mine = getattr(self, name)
        if mine is None or value is None:
            setattr(self, name, value if mine is None else mine)
        else:
            join(mine, value, out=mine)


class _Taken(NamedTuple):
    """Samples from one call of a layer whose input has `shape` and falls into `count` rows or maps."""

    shape: torch.Size
    count: int
    sample: torch.Tensor | None
    rows: torch.Tensor | None


class Observer:
    """Hooks on the planned layers of one unit that sum up what a method needs.

    calls    number of calibration calls in all
    buckets  number of step buckets; steps: of those that any call falls into, all of them by default
    twice    whether a quantized stream runs as well, after the full one, call by call
    apart    layers whose input is to be taken for their own although another layer had the same one at first
    """

    def __init__(
        self,
        unit: Unit,
        needs: Needs,
        calls: int,
        buckets: int,
        twice: bool,
        apart: frozenset[str] = frozenset(),
        steps: int | None = None,
    ):
        self.needs = needs
        self.calls = calls
        self.buckets = buckets
        self.steps = buckets if steps is None else steps
        self.twice = twice
        self.apart = apart
        self.name = unit.name
        self.layers = {name: _Layer(unit.layer(name), "expert" in name) for name in unit.layers}
        self.sums: dict[str, Sums] = {}
        self.torn: set[str] = set()  # layers that once shared an input and once did not

    def take(self) -> dict[str, Sums]:
        """The sums since the last take."""
        sums, self.sums = self.sums, {}
        return sums

    @contextmanager
    def watch(self, call: CallInfo, hat: bool) -> Iterator[Callable[[tuple, dict], None]]:
        """Record one call of the unit: first under the full stream, then, if both run, under the quantized one.

        Gives a function to be told the unit's own inputs: a unit that is itself a layer is being called already, and
        hooks set now would come too late.
        """
        self._call = call
        self._draws = {}
        self._inputs = {}
        if not hat:
            self._taken = {name: [] for name in self.layers}

        def hook(name: str) -> Callable:
            def before(_, args, kwargs):
                x = (args[0] if args else kwargs["input"]).detach()
                if x.numel():
                    (self._see_hat if hat else self._see)(name, self.layers[name].batched(x))

            return before

        own = hook(self.name) if self.name in self.layers else lambda *given: None
        inner = [(name, layer.module) for name, layer in self.layers.items() if name != self.name]
        hooks = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in inner]
        try:
            yield lambda args, kwargs: own(None, args, kwargs)
        finally:
            self._inputs = {}
            for handle in hooks:
                handle.remove()
        if hat or not self.twice:
            self._pair_rest()

    def _see(self, name: str, x: torch.Tensor) -> None:
        layer = self.layers[name]
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version, layer.columns_key)
        leader, _ = self._inputs.setdefault(key, (name, x))  # held until the call ends, or its address is used again
        sums = self.sums.setdefault(name, Sums(name if name in self.apart else leader))
        if sums.source != name:
            if sums.source != leader:
                self.torn.add(name)
            return
        if self.needs.absmax:
            self._ranges(sums, layer.per_channel(x))
        taken = self._take(layer, x)
        if taken.sample is not None:
            sums.x.append(taken.sample)
            sums.bucket.append(torch.full((len(taken.sample),), self._call.bucket))
            sums.phase.append(torch.full((len(taken.sample),), self._call.phase))
            sums.branch.append(self._call.branch_of(self._positions(taken.count, len(taken.sample)), taken.count))
        self._taken[name].append(taken)

    def _see_hat(self, name: str, x: torch.Tensor) -> None:
        """The same rows as in the full stream, or those themselves where a router may send other tokens here."""
        layer, waiting = self.layers[name], self._taken[name]
        if waiting:
            full = waiting.pop(0)
            matched = not layer.routed and full.shape == x.shape
            self._pair(name, full, self._take(layer, x) if matched else full)

    def _pair_rest(self) -> None:
        """What the quantized stream did not call, or all without such a stream."""
        for name, waiting in self._taken.items():
            for taken in waiting:
                self._pair(name, taken, taken)
        self._taken = {}

    def _pair(self, name: str, full: _Taken, hat: _Taken) -> None:
        sums = self.sums[name]
        if self.twice and hat.sample is not None:
            sums.hat.append(hat.sample)
        if full.rows is not None:
            self._moments(sums, hat.rows)

    def _take(self, layer: _Layer, x: torch.Tensor) -> _Taken:
        """The sampled rows of x, and the sampled rows of columns."""
        count, sample, columns = layer.count(x), None, None
        if most := self._most(layer, x):
            sample = layer.picked(x, self._positions(count, most).to(x.device))
        if self.needs.gram and layer.has_gram:
            picked = self._positions(layer.positions(x), self._call.share(layer.gram_rows, self.calls))
            columns = layer.columns(x, picked)
        return _Taken(x.shape, count, sample, columns)

    def _most(self, layer: _Layer, x: torch.Tensor) -> int:
        """How many rows or crops this call gives: `rows` in all or for each step, a crop of every call at least."""
        rows = self.needs.rows * (self.steps if self.needs.steps else 1)
        if not rows or layer.linear:
            return self._call.share(rows, self.calls)
        return self._call.share(max(self.calls, rows // prod(layer.crop(x))), self.calls)

    def _positions(self, count: int, most: int) -> torch.Tensor:
        """`most` of `count` positions, rising; the same for all layers with that count, and for both streams."""
        if count not in self._draws:
            self._draws[count] = torch.randperm(count, generator=torch.Generator().manual_seed(self._call.seed))
        return self._draws[count][:most].sort().values

    def _moments(self, sums: Sums, rows: torch.Tensor) -> None:
        if sums.gram is None:
            sums.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
        sums.gram.addmm_(rows.t(), rows)
        sums.rows += len(rows)

    def _ranges(self, sums: Sums, x: torch.Tensor) -> None:
        """x (n, inner, channels): n rows or maps spread over the batch."""
        if sums.absmax is None:
            sums.absmax = torch.zeros(self.buckets, 2, x.shape[2], device=x.device)
            sums.low = torch.full((self.buckets, 2), torch.inf, device=x.device)
            sums.high = torch.full((self.buckets, 2), -torch.inf, device=x.device)
        for branch, first, last in self._call.segments(len(x)):
            place = (self._call.bucket, branch)
            low, high = (bound(x[first:last], dim=(0, 1)).float() for bound in (torch.amin, torch.amax))
            sums.absmax[place] = torch.maximum(sums.absmax[place], torch.maximum(-low, high))
            sums.low[place] = torch.minimum(sums.low[place], low.amin())
            sums.high[place] = torch.maximum(sums.high[place], high.amax())


class _Layer:
    """How the input of one layer falls into rows, positions and columns.

    routed  its rows are chosen by a router, so that those of two streams need not be of the same tokens
    """

    def __init__(self, module: nn.Module, routed: bool):
        self.module: Any = module
        self.routed = routed
        self.linear = isinstance(module, nn.Linear)
        self.dims = 0 if self.linear else len(module.kernel_size)
        self.has_gram = self.linear or module.groups == 1
        width = prod(module.weight.shape[1:])
        self.gram_rows = max(GRAM_ROWS, 2 * width)

    @cached_property
    def columns_key(self) -> tuple:
        """Equal for layers that make the same columns of the same input."""
        return () if self.linear else (self.module.kernel_size, *geometry(self.module))

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.linear or x.dim() == self.dims + 2 else x.unsqueeze(0)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """(n, in) rows of a linear, (n, in, *space) maps of a convolution."""
        return x.reshape(-1, x.shape[-1]) if self.linear else x

    def crop(self, x: torch.Tensor) -> list[int]:
        """Sides of the crops that maps are cut into: about CROP pixels, and at least what one output is made of."""
        side, steps = round(CROP ** (1 / self.dims)), zip(self.module.kernel_size, self.module.dilation, strict=True)
        return [
            min(size, max(side, step * (kernel - 1) + 1))
            for size, (kernel, step) in zip(x.shape[2:], steps, strict=True)
        ]

    def count(self, x: torch.Tensor) -> int:
        """Rows of a linear's input, crops in a convolution's maps."""
        return x.numel() // x.shape[-1] if self.linear else len(x) * prod(self._places(x))

    def _places(self, x: torch.Tensor) -> list[int]:
        return [size // side for size, side in zip(x.shape[2:], self.crop(x), strict=True)]

    def picked(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(k, in) rows or (k, in, *crop) crops of the input at these of its `count` positions."""
        if self.linear:
            return self.rows(x).index_select(0, positions)
        places, tiles = self._places(x), x
        for dim, side in enumerate(self.crop(x)):
            tiles = tiles.unfold(2 + dim, side, side)
        where = torch.unravel_index(positions, (len(x), *places))
        return tiles[(where[0], slice(None), *where[1:])]

    def per_channel(self, x: torch.Tensor) -> torch.Tensor:
        """(n, inner, in) view of x."""
        return self.rows(x).unsqueeze(1) if self.linear else x.flatten(2).transpose(1, 2)

    def positions(self, x: torch.Tensor) -> int:
        """Number of outputs, each made of one row of columns."""
        return x.numel() // x.shape[-1] if self.linear else len(x) * prod(self._out_space(x))

    def _out_space(self, x: torch.Tensor) -> list[int]:
        module, pads = self.module, self.module._reversed_padding_repeated_twice
        padded = [size + sum(pads[-2 * dim - 2 :][:2]) for dim, size in enumerate(x.shape[2:])]
        sizes = zip(padded, module.kernel_size, module.stride, module.dilation, strict=True)
        return [(size - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, step in sizes]

    def columns(self, x: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """(k, columns) fp32: what the weight, as a matrix, is multiplied with at the picked outputs."""
        picked = picked.to(x.device)
        if self.linear:
            return self.rows(x).index_select(0, picked).float()
        conv, space = self.module, self._out_space(x)
        if any(conv._reversed_padding_repeated_twice):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        start, taps = torch.zeros_like(picked), torch.zeros(1, dtype=torch.long, device=x.device)
        corner, pitch = picked, 1
        for dim in reversed(range(self.dims)):
            start = start + (corner % space[dim]) * conv.stride[dim] * pitch
            corner = corner // space[dim]
            steps = torch.arange(conv.kernel_size[dim], device=x.device) * conv.dilation[dim] * pitch
            taps = (steps[:, None] + taps).flatten()
            pitch *= x.shape[2 + dim]
        found = x.flatten(2)[corner[:, None], :, start[:, None] + taps]  # (k, taps, in)
        return found.transpose(1, 2).flatten(1).float()


def join(pieces: Sequence[dict[str, Sums]]) -> tuple[dict[str, Sums], set[str]]:
    """-> (the sums of all pieces, in order; layers whose shared input is not shared in every piece)."""
    total: dict[str, Sums] = {}
    torn: set[str] = set()
    for piece in pieces:
        for name, sums in piece.items():
            if name not in total:
                total[name] = sums
            elif total[name].source != sums.source:
                torn.add(name)
            else:
                total[name].add(sums)
    return total, torn


def finish(sums: dict[str, Sums]) -> dict[str, LayerSeen]:
    """What the layers saw. Layers with a shared input share every tensor."""
    seen = {name: _finish(item) for name, item in sums.items() if item.source == name}
    return {name: seen[name] if name in seen else replace(seen[item.source]) for name, item in sums.items()}


def _finish(sums: Sums) -> LayerSeen:
    same = [part for part in sums.x if part.shape[1:] == sums.x[0].shape[1:]]  # maps of other sizes cannot be stacked
    kept = [part.shape[1:] == sums.x[0].shape[1:] for part in sums.x]
    x = _stack(same)
    hat = _stack([part for part, keep in zip(sums.hat, kept, strict=True) if keep]) if sums.hat else x
    bucket, branch, phase = (
        _stack([part for part, keep in zip(parts, kept, strict=True) if keep]).long()
        for parts in (sums.bucket, sums.branch, sums.phase)
    )
    seen = LayerSeen(x, hat, bucket, branch, sums.absmax, sums.low, sums.high, source=sums.source, phase=phase)
    if sums.low is not None:
        for bound in (sums.low, sums.high):
            bound[bound.isinf()] = 0
    if sums.gram is not None:
        seen.gram = sums.gram.div_(sums.rows)
    return seen


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0)
