"""mxfp8 activations in one pass over them, their scales in the tiles that block-scaled units read (see `nvfp4`).

    s = 2^(floor(log2 absmax of 32 columns) - 8),  q = e4m3(clip(x / s))

Divisions are IEEE divisions, so codes and scales are those of `dq.formats` to the bit. A block with NaN or Inf gets
the scale NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dq.kernels.triton import ops
from dq.kernels.triton.elements import E4M3_MAX, clip, to_e4m3
from dq.kernels.triton.nvfp4 import tiled

BLOCK = tl.constexpr(32)
TILE = {"BV": 64, "warps": 4, "stages": 1}  # blocks of a program; an estimate, no GPU was at hand


@triton.jit
def mxfp8_blocks(x_p, q_p, scale_p, V, blocks, quads, pitch, BV: tl.constexpr):
    """x (M, 32 blocks) -> q (M, 32 blocks), scale bytes in tiles. V = M blocks, of which a program takes BV."""
    v, j = tl.program_id(0).to(tl.int64) * BV + tl.arange(0, BV), tl.arange(0, BLOCK)
    row, block, real = v // blocks, v % blocks, v < V
    x = tl.load(x_p + (row * pitch + block * BLOCK)[:, None] + j[None, :], mask=real[:, None], other=0.0)
    x = x.to(tl.float32)
    size = tl.abs(x)
    bad = tl.sum((~(size < float("inf"))).to(tl.int32), 1)
    field = (tl.max(size, 1).to(tl.int32, bitcast=True) >> 23) & 255  # exponent + 127, 0 below the normal numbers
    byte = tl.where(bad > 0, 255, tl.maximum(field - 8, 0))
    step = tl.where(byte == 0, 5.877471754111438e-39, (byte << 23).to(tl.float32, bitcast=True))  # 2^-127
    q = to_e4m3(clip(tl.div_rn(x, step[:, None]), -E4M3_MAX, E4M3_MAX))
    tl.store(q_p + (v * BLOCK)[:, None] + j[None, :], q, mask=real[:, None])
    tl.store(scale_p + tiled(row, block, quads), byte.to(tl.uint8), mask=real)


def _fake_mxfp8_quant(x):
    rows, blocks = x.shape[0], x.shape[1] // BLOCK.value
    scales = x.new_zeros(ops.up_to(rows, 128) * ops.up_to(blocks, 4), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=ops.E4M3), scales


@ops.operator(_fake_mxfp8_quant)
def mxfp8_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) of any float type, K a multiple of 32 -> e4m3 codes (M, K), scale bytes in tiles."""
    x = ops.rowed(x)
    (q, scales), blocks = _fake_mxfp8_quant(x), x.shape[1] // BLOCK.value
    if x.shape[0]:
        count = x.shape[0] * blocks
        mxfp8_blocks[(-(-count // TILE["BV"]),)](
            x, q, scales, count, blocks, -(-blocks // 4), x.stride(0), TILE["BV"], **ops.options(TILE)
        )
    return q, scales
