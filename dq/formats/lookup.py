"""Codes that index a table of each row: grids of any shape. SqueezeLLM, 2306.07629; NormalFloat: QLoRA, 2305.14314.

    x̂[r, k] = table[r, code[r, k]] · s        table: int8 (rows, 2^b), rising; s: fp32 per block

A table holds whole numbers of −127 … 127 where the papers have 16-bit values: with one scale a row they are within
1/254 of its largest value, which costs 0.02 dB at 4 bits, take half the bytes, and an 8-bit product with one scale a
row takes weights as they come out of the table. Where nobody gives a table all rows have NormalFloat's, quantiles of a
normal distribution with an exact 0, and scales that cover the range. Rounding is to the nearest of the row's values,
on a tie to the even code.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, FormatError, Granularity, Scales, block_absmax

TOP = 127  # largest value of a table


@cache
def normal(bits: int) -> tuple[int, ...]:
    """NormalFloat's values for codes 0 … 2^bits − 1: from −TOP to TOP, 0 among them."""
    count = 2**bits
    end = 1 - (1 / count + 1 / (count - 1)) / 4
    shares = [torch.linspace(0.5, end, count // 2 + more, dtype=torch.float64) for more in (0, 1)]
    sides = [torch.special.ndtri(share) for share in shares]
    below, above = (side / side[-1] * TOP for side in sides)
    return tuple(torch.cat([-below.flip(0), above[1:]]).round().int().tolist())


@dataclass(frozen=True, eq=False)
class Lookup(Format):
    """One table a row, for weights. levels: the table of the rows at hand, int8 (rows, 2^bits) or (1, 2^bits)."""

    levels: torch.Tensor | None = None
    signed: ClassVar[bool] = False
    tabled: ClassVar[bool] = True

    def of(self, table: torch.Tensor | None) -> "Lookup":
        return self if table is None else replace(self, levels=table)

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """absmax / TOP per block, at least SCALE_FLOOR, and NormalFloat's table for every row."""
        granularity = self._resolve(granularity)
        scale = (block_absmax(x, granularity) / TOP).clamp_(min=SCALE_FLOOR)
        return Scales(scale, table=self._default(x.device).expand(len(scale), -1).contiguous())

    def _default(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([normal(self.bits)], dtype=torch.int8, device=device)

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        table = self._default(x.device) if given.table is None else given.table
        shape = (len(scale), 2**self.bits)
        if table.dtype is not torch.int8 or table.shape not in (shape, (1, shape[1])):
            raise FormatError(f"{self.name}: got a {table.dtype} table {tuple(table.shape)}, expected int8 {shape}")
        return Scales(scale.float(), table=table.expand(shape).contiguous())

    def _values(self, device: torch.device) -> torch.Tensor:
        """fp32 (rows | 1, 2^bits)."""
        return (self._default(device) if self.levels is None else self.levels).float()

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        values = self._values(units.device)
        rows = units.reshape(len(values), units.numel() // max(len(values), 1)).contiguous()
        middle = (values[:, 1:] + values[:, :-1]) / 2
        below, above = (torch.searchsorted(middle, rows, right=right) for right in (False, True))
        return torch.where(below % 2 == 0, below, above).to(torch.int8).reshape(units.shape)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        values = self._values(codes.device)
        rows = codes.reshape(len(values), codes.numel() // max(len(values), 1))
        return values.gather(1, rows.long()).reshape(codes.shape)

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return self.values_of(self.codes_of(units))

    def limits(self) -> tuple[float, float]:
        return -TOP - 0.5, TOP + 0.5

    def grid(self) -> torch.Tensor:
        values = self._values(torch.device("cpu"))
        return values[0] if self.levels is None else self.levels.float()


FORMATS: dict[str, Format] = {f"lut{b}": Lookup(f"lut{b}", b, Granularity("channel")) for b in (3, 4)}
