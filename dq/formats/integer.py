"""Integers of 2 to 8 bits, symmetric (int4) and affine (int4a). Jacob et al., 1712.05877; Krishnamoorthi, 1806.08342.

    int-b:   q = clip(rne(x / s)), s = absmax / (2^(b-1) − 1), q in −(2^(b-1) − 1) … 2^(b-1) − 1,  x̂ = q · s
    int-ba:  q = clip(rne(x / s) + z), s = (max − min) / (2^b − 1), z = rne(−2^(b-1) − min / s),     x̂ = (q − z) · s

    two-level scales, group:64+channel:   s[n, g] = m[n, g] s[n],  m a whole number in 1 … 2^(8-b)

x: (rows, K); s, z: one per block. Affine codes are signed too (−2^(b-1) … 2^(b-1) − 1, z in the same range) so that
codes and zero points fit int8; the range always contains 0, which is exact. Division, not multiplication by 1/s: a
kernel that multiplies may differ by one code where x / s is next to a tie.

Two-level scales (QoQ, 2405.04532; QQQ, 2406.09904): codes times multiplier fit a signed byte, so an 8-bit product with
one scale a row takes them; what a group costs is a multiplication of integers while weights are unpacked. The most for
int4 is 16: any 4 bits that a file may hold fit then, −8 · 16 = −128; 18, the most for 7, gains 0.01 dB. A multiplier
is the nearest to the scale that covers its group, up or down, and costs less than 0.1 dB. Multipliers of least squared
error gain 0.6 dB on the weights of both embedded models, but lose 0.9 dB of noise SQNR on tiny-pixart: its largest
weights count for more than their squares, so that `fit` does not clip them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, FormatError, Granularity, Scales, block_absmax, block_range

NARROW = 4  # bits up to which two-level scales have enough multipliers


@dataclass(frozen=True)
class Integer(Format):
    """Symmetric integers: the range has as many negative as positive codes, −2^(b-1) is never produced."""

    @property
    def max_code(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def min_code(self) -> int:
        return -self.max_code

    @property
    def most_multiplier(self) -> int:
        return 2 ** (8 - self.bits) if self.bits <= NARROW and not self.affine else 0

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """absmax / max_code per block, at least SCALE_FLOOR; of two levels the nearest to it, see `two_level`."""
        granularity = self._resolve(granularity)
        scale = block_absmax(x, granularity) / self.max_code
        if not granularity.two_level:
            return Scales(scale.clamp_(min=SCALE_FLOOR))
        return self.two_level(scale, None if scale_global is None else self._rows_given(scale_global, x))

    def two_level(self, steps: torch.Tensor, rows: torch.Tensor | None = None) -> Scales:
        """The nearest two-level scales to wanted steps fp32 (rows, groups).

        rows (rows, 1): given row scales; without them the largest step of a row has the largest multiplier.
        """
        most = self.most_multiplier
        rows = (steps.amax(1, keepdim=True) / most).clamp_(min=SCALE_FLOOR) if rows is None else rows
        return Scales((steps / rows).round_().clamp_(1, most).to(torch.int8), None, rows)

    def step(self, scale: torch.Tensor, scale_global: torch.Tensor | None = None) -> torch.Tensor:
        return scale if scale_global is None else scale.float() * scale_global

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        """Of two-level granularities: multipliers with the scales of their rows, or steps, which go to the nearest."""
        if not granularity.two_level:
            return super()._given(x, granularity, scale, given)
        if given.scale_global is None:
            return self.two_level(scale.detach().float())
        rows = self._rows_given(given.scale_global, x)
        whole = scale.detach().float().round().clamp_(1, self.most_multiplier)
        return Scales(whole.to(torch.int8), None, rows)

    def _rows_given(self, scale_global, x: torch.Tensor) -> torch.Tensor:
        """Given scales of rows as fp32 (rows, 1)."""
        scale = torch.as_tensor(scale_global, device=x.device).detach().float()
        if scale.numel() != 1 and scale.shape != (x.shape[0], 1):
            got, rows = tuple(scale.shape), x.shape[0]
            raise FormatError(f"{self.name}: got a scale_global of shape {got}, expected ({rows}, 1) for two levels")
        return scale.expand(x.shape[0], 1).contiguous()

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
