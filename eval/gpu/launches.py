"""Launches of the kernels of this folder on tensors: outputs, grids and tile sizes.

Codes and scales are `dq.kernels.triton.ops.Codes`. Shapes: rows of activations M, output channels N, input channels K;
heads are (B, L, H, D), the channels of a head contiguous. None of these is an operator of torch: `torch.compile` does
not see through them until dq needs it to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dq.errors import DQError
from dq.kernels.triton import configs, ops
from dq.kernels.triton.elements import INTERPRETED
from dq.kernels.triton.ops import E4M3, FP8_TOP, INT8_TOP, Codes
from eval.gpu import attention, kernels

LARGEST_HEAD = 128  # channels; wider ones would not fit in registers beside their keys
LONGEST_AXIS = 65535  # programs along each axis of a grid but the first
SMALLEST_DOT = 32  # channels that an 8-bit product sums at least
ATTENTION_TILES = json.loads(Path(__file__).with_name("attention.json").read_text())  # per architecture, largest first
SMALL = {"warps": 4, "stages": 1}  # of kernels without a product


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


class Rotation(NamedTuple):
    """Rotary embedding. cos, sin: (L, D) fp32; half: pairs are (d, d + D / 2), else neighbours."""

    cos: Tensor
    sin: Tensor
    half: bool = False


# --- linears ---------------------------------------------------------------------------------------------------------


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


# --- attention -------------------------------------------------------------------------------------------------------


def _turn(rotation: Rotation | None) -> tuple[list[Tensor | None], bool]:
    """Cosines and sines as a kernel takes them, and how pairs lie."""
    if rotation is None:
        return [None, None], False
    return ops.flat(rotation.cos, rotation.sin), rotation.half


def batches(batch: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """Entries of a batch, and heads of all of them, of one launch after another: an axis of a grid ends at 65535.

    Temporal attention of a video has an entry a pixel.
    """
    step = max(1, LONGEST_AXIS // heads)
    for first in range(0, batch, step):
        last = min(batch, first + step)
        yield slice(first, last), slice(first * heads, last * heads)


def qk_norm_rope_quant(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    rotation: Rotation | None = None,
    mean: Tensor | None = None,
    eps: float = 1e-6,
    factor: float = 1.0,
) -> Codes:
    """x (B, L, H, D) -> int8 (B * H, L, D) and scales (B * H, L) times `factor`.

    weight  (D,) of any float type: RMSNorm with `eps`; None for none
    mean    (B * H, D) fp32, taken off after rotation
    """
    b, n, h, d = x.shape
    (cos, sin), half = _turn(rotation)
    q, s = x.new_empty(b * h, n, d, dtype=torch.int8), x.new_empty(b * h, n, dtype=torch.float32)
    (mean,) = ops.flat(mean)
    for some, its in batches(b, h):
        off = None if mean is None else mean[its]
        attention.qk_norm_rope_quant[(-(-n // 32), its.stop - its.start)](
            x[some], weight, cos, sin, off, q[its], s[its], n, h, x.stride(0), x.stride(1), eps, factor, d,
            ops.power(d), 32, half, **ops.options(SMALL),
        )  # fmt: skip
    return Codes(q, s)


def k_mean(x: Tensor, *, weight: Tensor | None = None, rotation: Rotation | None = None, eps: float = 1e-6) -> Tensor:
    """Mean normed and rotated key of each head: x (B, L, H, D) -> (B * H, D) fp32."""
    (b, n, h, d), rows = x.shape, 32
    (cos, sin), half = _turn(rotation)
    parts = x.new_empty(b * h, -(-n // rows), d, dtype=torch.float32)
    for some, its in batches(b, h):
        attention.k_sums[(parts.shape[1], its.stop - its.start)](
            x[some], weight, cos, sin, parts[its], n, h, x.stride(0), x.stride(1), eps, d, ops.power(d), rows, half,
            **ops.options(SMALL),
        )  # fmt: skip
    return parts.sum(1) / n


def v_fp8(x: Tensor) -> Codes:
    """x (B, L, H, D) -> e4m3 (B * H, D, LP) with LP = L rounded up to 16, scales (B * H, D)."""
    b, n, h, d = x.shape
    length = ops.up_to(n, 16)
    v = x.new_empty(b * h, d, length, dtype=E4M3)
    s = (x.abs().amax(1).float() / float(FP8_TOP)).clamp_(min=1e-12).reshape(b * h, d).contiguous()
    for some, its in batches(b, h):
        attention.v_fp8[(-(-length // 32), its.stop - its.start)](
            x[some], s[its], v[its], n, length, h, x.stride(0), x.stride(1), d, ops.power(d), 32, **ops.options(SMALL)
        )
    return Codes(v, s)


def attention_tiles(size: int, arch: str) -> list[configs.Config]:
    """Tile sizes for heads of `size` channels, largest first. DQError for heads of more than 128."""
    if size > LARGEST_HEAD:
        raise DQError(f"attention on 8-bit queries and keys: heads have {size} channels, at most {LARGEST_HEAD} fit")
    block = ops.power(size)
    name = f"attention_{max(block, 64)}" + ("_masked" if block == 128 > size else "")  # masks cost registers
    return ATTENTION_TILES[arch][name]


def attention_tile(rows: int, heads: int, size: int, arch: str) -> configs.Config:
    """The largest tile with a program a multiprocessor, else the smallest. heads: of all batch entries."""
    choices = attention_tiles(size, arch)
    enough = (c for c in choices if -(-rows // c["BM"]) * heads >= configs.multiprocessors())
    return next(enough, choices[-1])


def attn_i8(
    q: Codes, k: Codes, v: Tensor | Codes, heads: int, dtype: torch.dtype, config: configs.Config | None = None
) -> Tensor:
    """q (B * H, L, D), k (B * H, LK, D) int8, v fp16 (B * H, LK, D) or from `v_fp8` -> (B, L, H, D) in dtype.

    config: tile sizes, None chooses them.
    """
    eight = isinstance(v, Codes)
    values, sv = v[:2] if eight else (v.contiguous(), None)  # of one sample, heads taken apart are no copy
    (bh, n, d), length = q.q.shape, values.shape[2] if eight else 0
    out = q.q.new_empty(bh // heads, n, heads, d, dtype=dtype)
    config = config or attention_tile(n, bh, d, configs.architecture())
    for some, its in batches(bh // heads, heads):
        attention.attn_i8[(-(-n // config["BM"]), its.stop - its.start)](
            q.q[its], k.q[its], values[its], q.scale[its], k.scale[its], None if sv is None else sv[its], out[some],
            n, k.q.shape[1], length, heads, d, max(ops.power(d), SMALLEST_DOT), config["BM"], config["BN"], eight,
            **ops.options(config),
        )  # fmt: skip
    return out
