"""Micro-scaled floats: minifloat elements in short blocks along K with a one-byte scale. OCP MX v1.0; NVIDIA NVFP4.

    nvfp4   g = absmax / (448 · 6),  s = e4m3(absmax_block / (6 g)),  x̂ = e2m1(x / (s g)) · (s g)      blocks of 16
    mx*     s = 2^(⌊log2 absmax_block⌋ − emax),                        x̂ = eXmY(x / s) · s                blocks of 32

x: (rows, K). Scales are stored as bytes in an int8: the e4m3 pattern, or the e8m0 exponent + 127 (0xFF = NaN; others
are clipped to 0 … 254). g: fp32 (1,). A block whose e4m3 scale rounds to 0 is zeros. mx values above max_value · s
saturate; emax is the exponent of the element's largest number. The product s · g is rounded to fp32 once, in encode
and decode alike. Deviation: K need not be a multiple of the block; the last block of a row may be shorter.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from dq.formats.base import SCALE_FLOOR, Format, FormatError, Granularity, Scales, block_absmax
from dq.formats.floating import MiniFloat
from dq.formats.floating import parse as minifloat

_E4M3 = minifloat("e4m3")


@dataclass(frozen=True)
class Micro(Format):
    """What nvfp4 and the mx formats share: the elements. The granularity is fixed."""

    element: MiniFloat
    fixed: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    scale_bytes: ClassVar[int] = 1

    @abstractmethod
    def store(self, step: torch.Tensor, scale_global: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest stored scale bytes of wanted fp32 steps, for fits that search the scale."""

    def codes_of(self, units: torch.Tensor) -> torch.Tensor:
        return self.element.codes_of(units)

    def values_of(self, codes: torch.Tensor) -> torch.Tensor:
        return self.element.values_of(codes)

    def snap(self, units: torch.Tensor) -> torch.Tensor:
        return self.element.snap(units)

    def limits(self) -> tuple[float, float]:
        return self.element.limits()

    def grid(self) -> torch.Tensor:
        return self.element.grid()

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        if scale.dtype is not torch.int8:
            raise FormatError(f"{self.name}: got a {scale.dtype} scale, expected stored int8 bytes; see store()")
        return Scales(scale)


@dataclass(frozen=True)
class NvFp4(Micro):
    """e2m1 with e4m3 block scales and one fp32 scale for the matrix (or, if the caller gives it, one per row)."""

    global_bytes: ClassVar[int] = 4

    def fit_global(self, x: torch.Tensor, per_row: bool = False) -> torch.Tensor:
        """absmax / (448 · max element): fp32 (1,), or (rows, 1) so that no row depends on another."""
        absmax = block_absmax(x, Granularity("token" if per_row else "tensor"))
        absmax = absmax if per_row else absmax.reshape(1)
        return (absmax / (_E4M3.max_value * self.element.max_value)).clamp_(min=SCALE_FLOOR)

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        """Block scales for a given (static or per-row) scale_global, or for the one of this matrix."""
        scale_global = self.fit_global(x) if scale_global is None else self._global(scale_global, x)
        absmax = block_absmax(x, self._resolve(granularity))
        return Scales(self.store(absmax / self.element.max_value, scale_global), None, scale_global)

    def _global(self, scale_global, x: torch.Tensor) -> torch.Tensor:
        """A given tensor scale as fp32 (1,), or (rows, 1)."""
        scale_global = torch.as_tensor(scale_global, dtype=torch.float32, device=x.device)
        if scale_global.numel() != 1 and scale_global.shape != (x.shape[0], 1):
            got, rows = tuple(scale_global.shape), x.shape[0]
            raise FormatError(f"{self.name}: got a scale_global of shape {got}, expected (1,) or ({rows}, 1)")
        return scale_global.reshape(-1, 1) if scale_global.numel() != 1 else scale_global.reshape(1)

    def _given(self, x, granularity: Granularity, scale: torch.Tensor, given: Scales) -> Scales:
        if given.scale_global is None:
            raise FormatError(f"{self.name}: got a scale alone, expected scale_global with it; pass e.scale_global")
        return super()._given(x, granularity, scale, given)._replace(scale_global=self._global(given.scale_global, x))

    def store(self, step, scale_global=None) -> torch.Tensor:
        return _E4M3.codes_of(step / scale_global)

    def step(self, scale, scale_global=None) -> torch.Tensor:
        return _E4M3.values_of(scale) * scale_global


@dataclass(frozen=True)
class Mx(Micro):
    """OCP MX: the block scale is a power of two, chosen from the exponent of the largest magnitude."""

    def fit(self, x, granularity=None, scale_global=None) -> Scales:
        absmax = block_absmax(x, self._resolve(granularity))
        field = absmax.view(torch.int32) >> 23 & 255  # ⌊log2⌋ + 127; 0 for 0 and subnormals, 255 for Inf and NaN
        byte = (field - self.element.max_exponent).clamp_(0, 254).masked_fill_(field == 255, 255)
        return Scales(byte.to(torch.int8))

    def store(self, step, scale_global=None) -> torch.Tensor:
        exponent = step.float().clamp(min=2.0**-126).log2().round()
        return (exponent + 127).clamp(0, 254).masked_fill(~step.isfinite(), 255).to(torch.int32).to(torch.int8)

    def step(self, scale, scale_global=None) -> torch.Tensor:
        byte = scale.to(torch.int32) & 0xFF
        value = (byte << 23).view(torch.float32)
        return value.masked_fill(byte == 0, 2.0**-127).masked_fill(byte == 255, torch.nan)


def _mx(name: str, element: str) -> Mx:
    form = minifloat(element)
    return Mx(name, form.bits, Granularity("group", 32), form)


FORMATS: dict[str, Format] = {
    "nvfp4": NvFp4("nvfp4", 4, Granularity("group", 16), minifloat("e2m1")),
    "mxfp4": _mx("mxfp4", "e2m1"),
    "mxfp6_e2m3": _mx("mxfp6_e2m3", "e2m3"),
    "mxfp6_e3m2": _mx("mxfp6_e3m2", "e3m2"),
    "mxfp8": _mx("mxfp8", "e4m3"),
    "mxfp8_e5m2": _mx("mxfp8_e5m2", "e5m2"),
}
