"""Launches of the kernels of this folder on tensors: outputs, grids and tile sizes.

Codes and scales are `dq.kernels.triton.ops.Codes`. Shapes: rows of activations M, output channels N, input channels K.
None of these is an operator of torch: `torch.compile` does not see through them until dq needs it to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq.kernels.triton import configs, ops
from dq.kernels.triton.elements import INTERPRETED
from dq.kernels.triton.ops import E4M3, FP8_TOP, INT8_TOP, Codes
from eval.gpu import kernels


class Norm(NamedTuple):
    """A norm over columns. weight, bias: (K,) of any float type; rms: root mean square, not mean and variance."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    rms: bool = False


class Modulation(NamedTuple):
    """scale, shift: (batch, K), columns contiguous; tokens: rows of a batch entry."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    tokens: int = 1


class Gate(NamedTuple):
    """gate: (batch, N), columns contiguous; residual: (M, N) contiguous, gives the dtype; tokens: rows of an entry."""

    gate: Tensor
    residual: Tensor
    tokens: int


def _codes(x: Tensor, fp8: bool) -> Codes:
    """Room for the codes and scales of x (M, K)."""
    q = x.new_empty(x.shape[0], ops.up_to(x.shape[1], 16), dtype=E4M3 if fp8 else torch.int8)
    return Codes(q, x.new_empty(x.shape[0], 1, dtype=torch.float32))


def _top(fp8: bool) -> float:
    return float(FP8_TOP if fp8 else INT8_TOP)


def adaln_quant(
    x: Tensor,
    norm: Norm,
    modulation: Modulation,
    *,
    smooth: Tensor | None = None,
    fp8: bool = False,
    copy: Tensor | None = None,
) -> Codes:
    """x (M, K) contiguous, K <= 16384, M = batch * tokens -> codes (M, KP) and scales (M, 1).

    smooth  (K,) fp32, a factor of each column
    copy    (M, K), takes what was rounded in its own dtype, for a low-rank branch
    """
    out = _codes(x, fp8)
    scale, shift, tokens = modulation
    pitches = {t.stride(0) for t in (scale, shift) if t is not None}
    if len(pitches) > 1:
        scale, shift, pitches = scale.contiguous(), shift.contiguous(), {x.shape[1]}
    config = ops.rows_config(out.q.shape[1])
    kernels.adaln_quant[(-(-x.shape[0] // config["BM"]),)](
        x, norm.weight, norm.bias, scale, shift, smooth, copy, out.q, out.scale, *x.shape, out.q.shape[1], tokens,
        next(iter(pitches), 0), norm.eps, _top(fp8), fp8, norm.rms, config["BM"], config["BK"],
        **ops.options(config),
    )  # fmt: skip
    return out


def had_quant(x: Tensor, signs: Tensor, *, smooth: Tensor | None = None, fp8: bool = False) -> Codes:
    """x (M, K) contiguous, signs (H, H) of +-1, H a power of two in 16 .. 128 that divides K; smooth (K,) fp32."""
    out, order, rows, config = _codes(x, fp8), signs.shape[0], 32, {"warps": 4, "stages": 2}
    kernels.had_quant[(-(-x.shape[0] // rows),)](
        x, signs.to(x.dtype), smooth, out.q, out.scale, *x.shape, order**-0.5, _top(fp8), fp8, order, rows,
        **ops.options(config),
    )  # fmt: skip
    return out


def gelu_quant(x: Tensor, *, smooth: Tensor | None = None, shift: float = 0.0, fp8: bool = False) -> Codes:
    """x (M, K), columns contiguous, K <= 16384; smooth (K,) fp32."""
    out = _codes(x, fp8)
    config = ops.rows_config(out.q.shape[1])
    kernels.gelu_quant[(-(-x.shape[0] // config["BM"]),)](
        x, smooth, out.q, out.scale, *x.shape, out.q.shape[1], x.stride(0), shift, _top(fp8), fp8,
        config["BM"], config["BK"], **ops.options(config),
    )  # fmt: skip
    return out


def gated_gemm(
    x: Codes, w: Codes, bias: Tensor | None, gate: Gate, tma: bool | None = None, config: configs.Config | None = None
) -> Tensor:
    """x (M, >= K), w (N, K), both int8 or both e4m3, a scale a row; bias (N,) -> (M, N). tma, config: None chooses."""
    (n, k), m, arch = w.q.shape, x.q.shape[0], configs.architecture()
    out = torch.empty_like(gate.residual)
    tma = ops.takes_tma(x.q, w.q, arch) and not INTERPRETED.value if tma is None else tma
    config = config or configs.pick("gemm_tma_branch" if tma else "gemm_branch", m, n, k, arch)
    tile = (config["BM"], config["BN"], config["BK"], config["GROUP"])
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    rest = (x.scale, w.scale, bias, gate.gate, gate.residual, out, m, n, k, gate.tokens, gate.gate.stride(0))
    fp8 = x.q.dtype == E4M3
    if tma:
        a, b = ops.descriptor(x.q, (m, k), [tile[0], tile[2]]), ops.descriptor(w.q, (n, k), [tile[1], tile[2]])
        programs = configs.multiprocessors()
        kernels.gated_gemm_tma[(min(tiles, programs),)](a, b, *rest, *tile, programs, fp8, **ops.options(config))
    else:
        ragged = bool(k % tile[2])
        kernels.gated_gemm[(tiles,)](x.q, w.q, *rest, x.q.stride(0), *tile, ragged, fp8, **ops.options(config))
    return out
