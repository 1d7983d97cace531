"""Integers above a smallest value of each block, which is a number of its own. GGUF's Q4_1, Q5_1 and K types (ggml).

    int-bm:  x̂ = (q + 2^(b-1)) · s + m,   q = clip(rne((x − m) / s) − 2^(b-1)),  s = (max − min) / (2^b − 1), m = min

x: (rows, K); s, m: fp32, one per block. An affine integer (int4a) puts 0 on a code and costs a byte a block; here the
range need not contain 0, and the smallest value keeps all its digits. Codes are signed so that they are unpacked as
any integer's are. One multiplication and one addition in fp32: where a file holds s and m in 16 bits, or as 16 bits
times 6, the product is exact and x̂ is to the bit what ggml decodes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, Granularity, Scales, block_range, block_view


@dataclass(frozen=True)
class Offset(Format):
    """All 2^b codes, from the smallest value of the block up."""

    offset: ClassVar[bool] = True

    @property
    def top(self) -> int:
        """Steps from the smallest value to the largest."""
        return 2**self.bits - 1

    @property
    def half(self) -> int:
        """What is added to a code to count from the smallest value."""
        return 2 ** (self.bits - 1)

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """Min-max per block; scale at least SCALE_FLOOR."""
        low, high = block_range(x, self._resolve(granularity))
        return Scales(((high - low) / self.top).clamp_(min=SCALE_FLOOR), low)

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        """A missing smallest value is that of the block."""
        low = block_range(x, granularity)[0] if given.zero is None else torch.as_tensor(given.zero, device=x.device)
        return Scales(scale.float(), low.float().expand(scale.shape).contiguous())

    def _units(self, x, granularity: Granularity, scales: Scales) -> torch.Tensor:
        """x in steps above the smallest value of its block."""
        assert scales.zero is not None
        return (block_view(x, granularity) - scales.zero[..., None]) / scales.scale[..., None]

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        return (units.round().clamp_(0, self.top) - self.half).to(torch.int8)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32) + self.half

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return units.round().clamp_(0, self.top)

    def limits(self) -> tuple[float, float]:
        return -0.5, self.top + 0.5

    def grid(self) -> torch.Tensor:
        return torch.arange(self.top + 1, dtype=torch.float32)


FORMATS: dict[str, Format] = {f"int{b}m": Offset(f"int{b}m", b, Granularity("group", 32)) for b in (2, 4, 5)}
