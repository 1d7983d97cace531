"""Rows of activations to int8 or e4m3 codes in aten, nothing in place, which a compiler fuses with its neighbours.

    symmetric   q = rne(x / s),                 s = max(absmax / top, SCALE_FLOOR)
    affine      q = clip(rne(x / s) + z),       s = max((max - min) / (high - low), SCALE_FLOOR), range holds 0
    stored      q = clip(rne(x / s)),           s given
    e4m3        q = e4m3(clip(x / s))           s = max(absmax / 448, SCALE_FLOOR)
    mxfp8       q = e4m3(clip(x / s))           s = 2^(floor(log2 absmax of 32 columns) - 8)

Formulas and bits are those of `dq.formats`; a test compares them. Under `torch.compile` backends call these and keep
only the product opaque, so that normalization, modulation, smoothing or GELU before them and the codes are one kernel.
q, k and v round in that one kernel, but each writes codes of its own: Inductor merges equal nodes under autograd only.
In eager mode every line is a pass over memory, so backends have kernels of their own there.
"""

from __future__ import annotations

import torch

from dq.formats.base import SCALE_FLOOR

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
MX_BLOCK, MX_EXPONENT = 32, 8  # columns that share a scale; exponent of 448


def symmetric(x: torch.Tensor, top: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, columns) of any float type -> int8 codes (rows, columns) in -top .. top, fp32 scales (rows, 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp(min=SCALE_FLOOR)
    return (x / scale).round().clamp(-top, top).to(torch.int8), scale


def stored(x: torch.Tensor, scale: torch.Tensor, top: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """As `symmetric` with one given fp32 scale for all rows: -> codes, the scale (1, 1). Values beyond saturate."""
    scale = scale.reshape(1, 1)
    return (x.float() / scale).round().clamp(-top, top).to(torch.int8), scale


def affine(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, columns) -> int8 codes, fp32 scales (rows, 1), int8 zero points (rows, 1)."""
    x, low, high = x.float(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((most - least) / (high - low)).clamp(min=SCALE_FLOOR)
    zero = (low - (least / scale).round()).clamp(low, high)
    codes = ((x / scale).round() + zero).clamp(low, high).to(torch.int8)
    return codes, scale, zero.to(torch.int8)


def e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, columns) -> e4m3 codes, fp32 scales (rows, 1)."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=SCALE_FLOOR)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, columns), columns a multiple of 32 -> e4m3 codes, int8 scale bytes (rows, columns / 32).

    A byte is the exponent of a power of two + 127; 255 is NaN, of a block with NaN or Inf.
    """
    blocks = x.float().reshape(x.shape[0], x.shape[1] // MX_BLOCK, MX_BLOCK)
    field = blocks.abs().amax(-1).view(torch.int32) >> 23 & 255  # of fp32: exponent + 127
    byte = torch.where(field == 255, 255, (field - MX_EXPONENT).clamp(0, 254))
    step = torch.where(byte == 0, 2.0**-127, (byte << 23).view(torch.float32))
    step = torch.where(byte == 255, torch.nan, step).unsqueeze(-1)
    return (blocks / step).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).reshape(x.shape), byte.to(torch.int8)
