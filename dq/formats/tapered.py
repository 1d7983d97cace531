"""HiF8: 8 bits whose mantissa shrinks as the exponent grows. Luo et al., Ascend HiFloat8, arXiv 2409.16626.

    x̂ = hif8(x / s) · s,   s = absmax / 15,   hif8(u) = sign(u) ⌊|u| / d + ½⌋ d,   d = 2^(e − m(e)),  e = ⌊log2 |u|⌋

x: (rows, K). A code is sign | dot | exponent | mantissa in an int8; the dot, a prefix of 2 to 4 bits, says how many
bits the exponent has. The exponent is sign and magnitude, its leading 1 not stored:

    dot    |e|       m   value                      dot    |e|   m   value
    11     8 … 15    1   2^e (1 + M / 2)            001    1     3   2^e (1 + M / 8)
    10     4 … 7     2   2^e (1 + M / 4)            0001   0     3   1 + M / 8
    01     2, 3      3   2^e (1 + M / 8)            0000   –     3   2^(M − 23), M = 1 … 7; M = 0: 0, or NaN (0x80)

The largest number is 2^15 (the pattern above it is Inf), the smallest 2^-22; there is no −0. Ties round away from 0,
as defined; values beyond the largest saturate where the definition gives Inf from 1.25 · 2^15 on. A scale of
absmax / 15 puts the largest value where mantissas have 3 bits (OSP-Next); scaled to 2^15, normal data lose 12 dB.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, Granularity, Scales, block_absmax

TOP = 15.0  # where the largest value of a block goes, in units of the step
LARGEST = 2.0**15
LEAST = -22  # exponent of the smallest number
NAN = 0x80
# least |e|, mantissa bits and first magnitude pattern of each dot; dots of one exponent sign bit and more
DOTS = ((8, 1, 0b1100000), (4, 2, 0b1000000), (2, 3, 0b0100000), (1, 3, 0b0010000))


def value(code: int) -> float:
    """The number that a pattern 0 ... 255 stands for."""
    sign, magnitude = -1.0 if code & 0x80 else 1.0, code & 0x7F
    for least, bits, first in DOTS:
        if magnitude >= first:
            field, mantissa = divmod(magnitude - first, 2**bits)
            exponent = least + field % least  # the field is the exponent's sign and what follows its leading 1
            exponent = -exponent if field >= least else exponent
            top = magnitude == 0b1101111
            return sign * (torch.inf if top else 2.0**exponent * (1 + mantissa / 2**bits))
    if magnitude >= 0b0001000:
        return sign * (1 + (magnitude & 7) / 8)
    return sign * 2.0 ** (magnitude - 23) if magnitude else (torch.nan if code == NAN else 0.0)


@cache
def _values() -> tuple[float, ...]:
    return tuple(value(code) for code in range(256))


@cache
def _patterns() -> tuple[int, ...]:
    """The pattern of 2^e for e = -22 ... 15; mantissas count up from it."""
    code = {number: pattern for pattern, number in enumerate(_values())}
    return tuple(code[2.0**e] for e in range(LEAST, 16))


@dataclass(frozen=True)
class HiF8(Format):
    """The one tapered format: 253 finite values."""

    signed: ClassVar[bool] = False

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """absmax / 15 per block, at least SCALE_FLOOR."""
        return Scales((block_absmax(x, self._resolve(granularity)) / TOP).clamp_(min=SCALE_FLOOR))

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return self._rounded(units)[0].copysign_(units) + 0.0  # no −0

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        """See `Format.codes_of`, ties away from 0. NaN becomes the NaN pattern."""
        magnitude, mantissa = self._rounded(units)
        field = (magnitude.view(torch.int32) >> 23) - 127
        first = torch.tensor(_patterns(), dtype=torch.int32, device=units.device)
        code = first[(field - LEAST).clamp_(0, len(_patterns()) - 1)]
        code += (magnitude.view(torch.int32) & 0x7FFFFF) >> (23 - mantissa)
        code |= torch.signbit(units).to(torch.int32) << 7
        code.masked_fill_(magnitude == 0, 0).masked_fill_(units.isnan(), NAN)
        return code.to(torch.int8)

    def _rounded(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> fp32 magnitudes on the grid, int32 mantissa bits at each."""
        magnitude = units.abs().clamp_(max=LARGEST)
        exponent, bits = self._binade(magnitude)
        inverse = ((127 + bits - exponent) << 23).view(torch.float32)  # 1 / spacing, a power of two
        whole = (magnitude * inverse).floor_()
        whole += (magnitude * inverse - whole >= 0.5).to(torch.float32)
        rounded = (whole / inverse).clamp_(max=LARGEST)
        return rounded, self._binade(rounded)[1]  # a carry may have left the binade

    def _binade(self, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 exponent of each magnitude, not below that of the smallest number, and mantissa bits there."""
        exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp_(min=LEAST)
        size = exponent.abs()
        return exponent, 3 - (size > 3).to(torch.int32) - (size > 7).to(torch.int32) - (size > 15).to(torch.int32)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        table = torch.tensor(_values(), dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32) & 0xFF).reshape(codes.shape)

    def limits(self) -> tuple[float, float]:
        return -1.25 * LARGEST, 1.25 * LARGEST

    def grid(self) -> torch.Tensor:
        table = torch.tensor(_values(), dtype=torch.float32)
        return torch.unique(table[table.isfinite()])


FORMATS: dict[str, Format] = {"hif8": HiF8("hif8", 8, Granularity("channel"))}
