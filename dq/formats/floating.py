"""Minifloats: sign, X exponent bits, Y mantissa bits, and an fp32 scale per block. OCP FP8; FP4DiT, arXiv 2503.15465.

    x̂ = eXmY(x / s) · s,   s = absmax / max_value,   eXmY(u) = rne(u / d) · d,   d = 2^(max(⌊log2|u|⌋, 1 − bias) − Y)

x: (rows, K); bias = 2^(X-1) − 1. Rounding is to nearest, ties to even mantissa, saturating: no finite input gives Inf
or NaN. A code is the raw bit pattern sign|exponent|mantissa in an int8. e4m3 (`fp8`, max 448) and e5m2 (max 57344)
keep their NaN and Inf patterns and equal torch.float8_e4m3fn and float8_e5m2; other formats use all patterns.
Those two go through torch's own casts in eager mode (16 times faster on a CPU), and through the same bit arithmetic as
the others under torch.compile, where a cast to fp8 needs a GPU of compute capability 8.9.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, FormatError, Granularity, Scales, block_absmax


@dataclass(frozen=True)
class MiniFloat(Format):
    """eXmY with X = exponent, Y = mantissa. reserved: number of top magnitude patterns that are not numbers.

    native: the torch dtype with the same bits, if there is one.
    """

    exponent: int
    mantissa: int
    reserved: int = 0
    native: torch.dtype | None = None
    signed: ClassVar[bool] = False

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def max_value(self) -> float:
        """Largest number, in units of the step."""
        top = 2 ** (self.exponent + self.mantissa) - 1 - self.reserved
        e, m = top >> self.mantissa, top & (2**self.mantissa - 1)
        return 2.0 ** (e - self.bias) * (1 + m / 2**self.mantissa)

    @property
    def max_exponent(self) -> int:
        """⌊log2 max_value⌋."""
        return ((2 ** (self.exponent + self.mantissa) - 1 - self.reserved) >> self.mantissa) - self.bias

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """absmax / max_value per block, at least SCALE_FLOOR."""
        scale = block_absmax(x, self._resolve(granularity)) / self.max_value
        return Scales(scale.clamp_(min=SCALE_FLOOR))

    def _casts(self) -> bool:
        return self.native is not None and not torch.compiler.is_compiling()

    def _binade(self, magnitude: torch.Tensor) -> torch.Tensor:
        """int32 fp32-exponent field of each magnitude, not below that of the smallest normal number."""
        return (magnitude.view(torch.int32) >> 23).clamp_(min=128 - self.bias)

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        """See `Format.codes_of`. NaN becomes the NaN pattern where there is one (fp8), else an arbitrary code."""
        if self._casts():
            return units.clamp(-self.max_value, self.max_value).to(self.native).view(torch.int8)
        magnitude = units.abs().clamp_(max=self.max_value)
        binade = self._binade(magnitude)
        inverse = ((254 + self.mantissa - binade) << 23).view(torch.float32)  # 1 / spacing, a power of two
        code = magnitude.mul_(inverse).round_().to(torch.int32)
        code += binade.sub_(128 - self.bias) << self.mantissa
        if self.reserved:
            code.masked_fill_(units.isnan(), 2 ** (self.bits - 1) - 1)
        code |= torch.signbit(units).to(torch.int32) << (self.bits - 1)
        return code.to(torch.int8)

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        if self._casts():
            return units.clamp(-self.max_value, self.max_value).to(self.native).float()
        magnitude = units.abs().clamp_(max=self.max_value)
        binade = self._binade(magnitude)
        inverse = ((254 + self.mantissa - binade) << 23).view(torch.float32)
        spacing = ((binade - self.mantissa) << 23).view(torch.float32)
        return magnitude.mul_(inverse).round_().mul_(spacing).copysign_(units)

    def _table(self, device: torch.device) -> torch.Tensor:
        """fp32 (2^bits,): the value of each pattern."""
        code = torch.arange(2**self.bits, dtype=torch.int32, device=device)
        magnitude = code & (2 ** (self.bits - 1) - 1)
        field = magnitude >> self.mantissa
        fraction = (magnitude & (2**self.mantissa - 1)) + (field > 0).to(torch.int32) * 2**self.mantissa
        spacing = ((field.clamp(min=1) + (127 - self.bias - self.mantissa)) << 23).view(torch.float32)
        value = fraction * spacing
        if self.reserved:
            value = value.masked_fill(magnitude >= 2 ** (self.bits - 1) - self.reserved, torch.nan)
        if self.reserved > 1:
            value = value.masked_fill(magnitude == 2 ** (self.bits - 1) - self.reserved, torch.inf)
        return torch.where(code >= 2 ** (self.bits - 1), -value, value)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        if self._casts():
            return codes.view(self.native).float()
        pattern = codes.reshape(-1).to(torch.int32) & (2**self.bits - 1)
        return self._table(codes.device).index_select(0, pattern).reshape(codes.shape)

    def limits(self) -> tuple[float, float]:
        edge = self.max_value + 2.0 ** (self.max_exponent - self.mantissa - 1)
        return -edge, edge

    def grid(self) -> torch.Tensor:
        table = self._table(torch.device("cpu"))
        return torch.unique(table[table.isfinite()] + 0.0)


_DEFAULT = Granularity("channel")
FORMATS: dict[str, Format] = {
    "fp4": MiniFloat("fp4", 4, _DEFAULT, 2, 1),
    "fp6_e2m3": MiniFloat("fp6_e2m3", 6, _DEFAULT, 2, 3),
    "fp6_e3m2": MiniFloat("fp6_e3m2", 6, _DEFAULT, 3, 2),
    "fp8": MiniFloat("fp8", 8, _DEFAULT, 4, 3, 1, torch.float8_e4m3fn),
    "fp8_e5m2": MiniFloat("fp8_e5m2", 8, _DEFAULT, 5, 2, 4, torch.float8_e5m2),
}
_BY_SPLIT = {(form.exponent, form.mantissa): form for form in FORMATS.values()}


def parse(name: str) -> MiniFloat | None:
    """eXmY or fpN_eXmY with 2 to 8 bits; None if the name is not of this kind.

    Raises FormatError if it is, but X or Y is out of range or N does not match.
    """
    match = re.fullmatch(r"(?:fp(\d+)_)?e(\d+)m(\d+)", str(name))
    if match is None:
        return None
    x, y = int(match[2]), int(match[3])
    bits = 1 + x + y
    if not 1 <= x or bits > 8 or (match[1] is not None and int(match[1]) != bits):
        raise FormatError(f"format: got {name!r} ({bits} bits), expected at least e1 and at most 8 bits with the sign")
    return _BY_SPLIT.get((x, y)) or MiniFloat(f"e{x}m{y}", bits, _DEFAULT, x, y)
