"""Integers of 2 to 8 bits, symmetric (int4) and affine (int4a). Jacob et al., 1712.05877; Krishnamoorthi, 1806.08342.

    int-b:   q = clip(rne(x / s)), s = absmax / (2^(b-1) − 1), q in −(2^(b-1) − 1) … 2^(b-1) − 1,  x̂ = q · s
    int-ba:  q = clip(rne(x / s) + z), s = (max − min) / (2^b − 1), z = rne(−2^(b-1) − min / s),     x̂ = (q − z) · s

x: (rows, K); s, z: one per block. Affine codes are signed too (−2^(b-1) … 2^(b-1) − 1, z in the same range) so that
codes and zero points fit int8; the range always contains 0, which is exact. Division, not multiplication by 1/s: a
kernel that multiplies may differ by one code where x / s is next to a tie.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, Granularity, Scales, block_absmax, block_range


@dataclass(frozen=True)
class Integer(Format):
    """Symmetric integers: the range has as many negative as positive codes, −2^(b-1) is never produced."""

    @property
    def max_code(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def min_code(self) -> int:
        return -self.max_code

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """absmax / max_code per block, at least SCALE_FLOOR."""
        scale = block_absmax(x, self._resolve(granularity)) / self.max_code
        return Scales(scale.clamp_(min=SCALE_FLOOR))

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        return units.round().clamp_(self.min_code, self.max_code).to(torch.int8)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32)

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return units.round().clamp_(self.min_code, self.max_code)

    def limits(self) -> tuple[float, float]:
        return self.min_code - 0.5, self.max_code + 0.5

    def grid(self) -> torch.Tensor:
        return torch.arange(self.min_code, self.max_code + 1, dtype=torch.float32)


@dataclass(frozen=True)
class AffineInteger(Integer):
    """Integers with a zero point: all 2^b codes, for one-sided or shifted data."""

    affine: ClassVar[bool] = True

    @property
    def min_code(self) -> int:
        return -(2 ** (self.bits - 1))

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """Min-max per block, widened to contain 0; scale at least SCALE_FLOOR."""
        low, high = block_range(x, self._resolve(granularity))
        scale = (high.clamp(min=0) - low.clamp(max=0)) / (self.max_code - self.min_code)
        scale = scale.clamp_(min=SCALE_FLOOR)
        return Scales(scale, self._zero(low, scale))

    def _zero(self, low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The int8 zero point that puts the smallest value of each block at min_code."""
        zero = self.min_code - (low.clamp(max=0) / scale).round()
        return zero.clamp_(self.min_code, self.max_code).to(torch.int8)

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        """Zero points are whole numbers: a given one is rounded to int8, a missing one is fitted to the scale."""
        scale = scale.float()
        if given.zero is None:
            return Scales(scale, self._zero(block_range(x, granularity)[0], scale.detach()))
        zero = torch.as_tensor(given.zero, device=x.device).float().round().to(torch.int8)
        return Scales(scale, zero.expand(scale.shape).contiguous())


_DEFAULT = Granularity("channel")
FORMATS: dict[str, Format] = {f"int{b}": Integer(f"int{b}", b, _DEFAULT) for b in range(2, 9)}
FORMATS |= {f"int{b}a": AffineInteger(f"int{b}a", b, _DEFAULT) for b in range(2, 9)}
