"""Integers of 2 to 8 bits, symmetric (int4) and affine (int4a). Jacob et al., 1712.05877; Krishnamoorthi, 1806.08342.

    int-b:   q = clip(rne(x / s)), s = absmax / (2^(b-1) − 1), q in −(2^(b-1) − 1) … 2^(b-1) − 1,  x̂ = q · s
    int-ba:  q = clip(rne(x / s) + z), s = (max − min) / (2^b − 1), z = rne(−2^(b-1) − min / s),     x̂ = (q − z) · s

    two-level scales, group:64+channel:   s[n, g] = m[n, g] s[n],  m a whole number in 1 … 2^(8-b)

x: (rows, K); s, z: one per block. Affine codes are signed too (−2^(b-1) … 2^(b-1) − 1, z in the same range) so that
codes and zero points fit int8; the range always contains 0, which is exact. Division, not multiplication by 1/s: a
kernel that multiplies may differ by one code where x / s is next to a tie.

Two-level scales (QoQ, 2405.04532; QQQ, 2406.09904): codes times multiplier fit a signed byte, so an 8-bit product with
one scale a row takes them; what a group costs is a multiplication of integers while weights are unpacked. The most for
int4 is 16: any 4 bits that a file may hold fit then, −8 · 16 = −128; 18, the most for 7, gains 0.01 dB. Deviation: row
scale and multipliers are those of least squared error, not of the range; on the weights of the embedded models that is
worth 0.6 dB, so that two levels come nearer than fp32 scales that cover the range of each group.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, Granularity, Scales, block_absmax, block_range, block_view

NARROW = 4  # bits up to which two-level scales have enough multipliers
ROWS = (0.0, 0.5)  # tried for a row: so far below the largest multiplier lies the group of the largest range
SHARES = (1.0, 0.92, 0.84, 0.72, 0.6)  # of a group's range, that its scale may end at
CHUNK = 2**18  # elements that are fitted at a time, to stay in cache


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
        """absmax / max_code per block, at least SCALE_FLOOR; two-level ones as `fit_two_level` says."""
        granularity = self._resolve(granularity)
        if granularity.two_level:
            return self.fit_two_level(x, granularity, rows=scale_global)
        scale = block_absmax(x, granularity) / self.max_code
        return Scales(scale.clamp_(min=SCALE_FLOOR))

    @torch.no_grad()
    def fit_two_level(self, x, granularity: Granularity, weights=None, rows=None) -> Scales:
        """Multipliers int8 (rows, groups) and row scales fp32 (rows, 1) of the least squared error of those tried.

        weights (K,): importance of each column, 1 without. rows (rows, 1): given row scales, which are kept.
        """
        x = self._check(x)
        weights = None if weights is None else block_view(weights.float()[None], granularity)
        rows = None if rows is None else torch.as_tensor(rows, device=x.device).float().expand(x.shape[0], 1)
        found, step = [], max(1, CHUNK // x.shape[1])
        for first in range(0, max(1, x.shape[0]), step):
            part = x[first : first + step]
            given = None if rows is None else rows[first : first + step]
            found.append(self._two_level(part, granularity, weights, given))
        multiplier, scale = (torch.cat(values) for values in zip(*found, strict=True))
        return Scales(multiplier.to(torch.int8), None, scale.contiguous())

    def _two_level(self, x, granularity: Granularity, weights, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (multipliers as fp32, row scales) of a few rows; arguments as `fit_two_level` has them."""
        blocks, most = block_view(x, granularity), self.most_multiplier
        wanted = block_absmax(x, granularity) / self.max_code
        top = wanted.amax(1, keepdim=True)
        tried = [(top / (most - less)).clamp_(min=SCALE_FLOOR) for less in ROWS] if rows is None else [rows]
        best, kept = torch.full_like(top, torch.inf), (torch.ones_like(wanted), tried[0].expand_as(top))
        for scale in tried:
            least, multiplier = torch.full_like(wanted, torch.inf), torch.ones_like(wanted)
            for share in SHARES:
                each = (wanted * share / scale).round_().clamp_(1, most)
                step = (each * scale)[..., None]
                loss = self.snap(blocks / step).mul_(step).sub_(blocks).square_()
                loss = (loss if weights is None else loss.mul_(weights)).sum(-1)
                multiplier = torch.where(loss < least, each, multiplier)
                least = torch.minimum(loss, least)
            total = least.sum(1, keepdim=True)
            better, best = total < best, torch.minimum(total, best)
            kept = (torch.where(better, multiplier, kept[0]), torch.where(better, scale, kept[1]))
        return kept

    def step(self, scale: torch.Tensor, scale_global: torch.Tensor | None = None) -> torch.Tensor:
        return scale if scale_global is None else scale.float() * scale_global

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        """Of two-level granularities: multipliers with the scales of their rows, or steps, which go to the nearest."""
        if not granularity.two_level:
            return super()._given(x, granularity, scale, given)
        most = self.most_multiplier
        if given.scale_global is None:
            rows = (scale.float().amax(1, keepdim=True) / most).clamp(min=SCALE_FLOOR)
            scale = scale / rows
        else:
            rows = torch.as_tensor(given.scale_global, device=x.device).float().expand(x.shape[0], 1).contiguous()
        return Scales(scale.detach().float().round().clamp(1, most).to(torch.int8), None, rows.detach())

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
