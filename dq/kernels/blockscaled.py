"""nvfp4 and mxfp8 linears through `torch._scaled_mm` with one scale a block of either operand.

    y[m, n] = gx[m] gw sum_b sx[m, b] sw[n, b] sum_{k in b} q[m, k] w[n, k] + bias[n] + (x down^T) up^T

    nvfp4   blocks of 16, q and w e2m1 (two a byte, the even column low), s e4m3, gx fp32 a row, gw fp32 of the weight
    mxfp8   blocks of 32, q and w e4m3, s a power of two (e8m0), no g

The units read scales in tiles of 128 rows x 4 blocks (`tiles`). gx and gw multiply what `_scaled_mm` gives: it takes
no scale a row beside those of blocks, and one for all rows would let rows depend on each other. Activations are
rounded in one Triton kernel where Triton runs, else in aten; mxfp8 ones under `torch.compile` in aten, which is fused.
The product leaves in bf16 for a bf16 layer, else in fp32 (sums under nvfp4's block scales alone pass fp16's range). A
bias goes into the bf16 product where no g follows. Under autograd a layer whose input needs gradients runs `dense`.
AMD's gfx950 is left out: its library takes scales by rows, K in multiples of 128 and rows in multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dq import kernels
from dq.formats.micro import FORMATS
from dq.kernels import Conv, Tensors, dense, rows, scaled, triton
from dq.plan import LayerPlan

RANK = 26
STATUS = "experimental"  # no GPU was at hand
CHIPS = ("sm_100", "sm_103", "sm_120")  # whose units multiply under block scales
OUTPUTS, INPUTS = 16, 32  # multiples of sizes that the library takes: 16 bytes a row, whole blocks
ELEMENTS = {"nvfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}
SCALES = {"nvfp4": torch.float8_e4m3fn, "mxfp8": torch.float8_e8m0fnu}


class Blocks(NamedTuple):
    """One operand.

    q      (rows, K) e4m3 or (rows, K / 2) pairs of e2m1
    scale  (128 ceil(rows / 128) 4 ceil(blocks / 4),) e8m0 or e4m3, in tiles
    whole  fp32, (rows, 1) of nvfp4 activations, (1,) of their weight; None of mxfp8
    """

    q: torch.Tensor
    scale: torch.Tensor
    whole: torch.Tensor | None = None


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when the product here runs the layer on `device`; else why not, in one line."""
    if plan.act is None:
        return "weight-only: activations stay in floating point"
    if plan.act.format != plan.weight.format or plan.weight.format not in ELEMENTS:
        return f"torch has no block-scaled product of {plan.weight.format} x {plan.act.format}"
    if op != "linear" or device != "cuda":
        return f"torch's block-scaled product is for linears on CUDA, this is a {op} on {device}"
    arch = kernels.architecture()
    if arch not in CHIPS:
        return f"torch's block-scaled product is for {', '.join(CHIPS)}, this is {arch or 'no GPU'}"
    if plan.splits:
        return "an input split is a product per part, and nothing here adds them"
    if plan.act.scale != "dynamic" or plan.act.shift:
        return "block-scaled products take dynamic activation scales without a shift"
    if plan.shape[0] % OUTPUTS or plan.shape[1] % INPUTS:
        return f"_scaled_mm needs outputs in multiples of {OUTPUTS} and inputs of {INPUTS} here, got {plan.shape}"
    return None


def label(op: str, plan: LayerPlan) -> str:
    return f"torch._scaled_mm {plan.weight.format} in blocks"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See `dq.kernels`."""
    outputs, columns = plan.shape
    form, differentiable = plan.weight.format, dense.build(op, plan, conv)
    rounded = _rounder(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return differentiable(x, t)
        weight = Blocks(t.weight.view(ELEMENTS[form]), tiles(t.scale).view(SCALES[form]), t.scale_global)
        y = product(rounded(x.reshape(-1, columns)), weight, t.bias, x.dtype).reshape(*x.shape[:-1], outputs)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return run


def _rounder(plan: LayerPlan) -> Callable[[torch.Tensor], Blocks]:
    """Of a layer's input. Asks for the current card, which is the one that will serve the layer."""
    if plan.weight.format == "nvfp4":
        return _nvfp4_in_one_kernel if triton.why_not("linear", plan, "cuda") is None else _nvfp4
    return _mxfp8_in_one_kernel if triton.why_not("linear", scaled.ROWS, "cuda") is None else _mxfp8


def product(x: Blocks, w: Blocks, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x of M rows, w of N, bias (N,) of any float type -> y (M, N) in `dtype`, bias added."""
    out = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    inside = bias if out is torch.bfloat16 and x.whole is None else None
    added = None if inside is None else inside.to(out)
    y = torch._scaled_mm(x.q, w.q.t(), scale_a=x.scale, scale_b=w.scale, bias=added, out_dtype=out)
    if x.whole is not None and w.whole is not None:
        y = y.mul_(x.whole * w.whole)  # in fp32, and one pass over y
    return (y if bias is None or inside is not None else y + bias.to(out)).to(dtype)


def tiles(scale: torch.Tensor) -> torch.Tensor:
    """Scale bytes (rows, blocks), zero-padded to multiples of 128 and 4, one tile after another: (bytes,).

    byte of (row r, block b) = ((r / 128) ceil(blocks / 4) + b / 4) 512 + (r % 32) 16 + (r % 128 / 32) 4 + b % 4
    """
    count, blocks = scale.shape
    padded = F.pad(scale, (0, -blocks % 4, 0, -count % 128)) if blocks % 4 or count % 128 else scale
    high, wide = padded.shape[0] // 128, padded.shape[1] // 4
    return padded.reshape(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def _mxfp8(x: torch.Tensor) -> Blocks:
    q, scale = rows.mxfp8(x)
    return Blocks(q, tiles(scale).view(SCALES["mxfp8"]))


def _mxfp8_in_one_kernel(x: torch.Tensor) -> Blocks:
    if torch.compiler.is_compiling():
        return _mxfp8(x)
    from dq.kernels.triton import mxfp8

    q, scale = mxfp8.mxfp8_quant(x)
    return Blocks(q, scale.view(SCALES["mxfp8"]))


def _nvfp4(x: torch.Tensor) -> Blocks:
    form = FORMATS["nvfp4"]
    whole = form.fit_global(x, per_row=True)  # pyright: ignore[reportAttributeAccessIssue]
    found = form.encode(x, scale_global=whole)
    return Blocks(form.pack(found.codes).view(ELEMENTS["nvfp4"]), tiles(found.scale).view(SCALES["nvfp4"]), whole)


def _nvfp4_in_one_kernel(x: torch.Tensor) -> Blocks:
    from dq.kernels.triton import ops

    found = ops.nvfp4_quant(x)
    scale = found.scale.view(SCALES["nvfp4"])
    return Blocks(found.q.view(ELEMENTS["nvfp4"]), scale, found.whole.reshape(-1, 1))
