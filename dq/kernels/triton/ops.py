"""The kernels as operators `torch.ops.dq.triton_*`, each with a fake: eager and `torch.compile(fullgraph=True)` alike.

An operator allocates its outputs, picks tile sizes (`configs`) and launches; it knows no layers. Shapes: rows of
activations M, output channels N, input channels K, rank of a low-rank branch R. Optional outputs that were not asked
for are empty. Schemas come from the signatures, which is why annotations are real types here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dq.kernels.triton import attention, configs, gemm, nvfp4, packed, quantize
from dq.kernels.triton.elements import INTERPRETED

_library = torch.library.Library("dq", "FRAGMENT")
E4M3 = torch.float8_e4m3fn
LONGEST = 16384  # columns that a quantization kernel holds in registers
FORMATS = {"int4": 0, "nvfp4": 1, "mxfp4": 2}


def operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as `dq::triton_<its name>` for all devices, with `fake` for shapes; returns the operator."""

    def register(function: Callable) -> Callable:
        name = f"triton_{function.__name__}"

        def on_its_device(first: Tensor, *args, **kwargs):
            with torch.cuda.device_of(first):  # triton launches on the current device, wherever the tensors are
                return function(first, *args, **kwargs)

        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dq::{name}", fake, lib=_library)
        return getattr(torch.ops.dq, name).default

    return register


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _options(config: configs.Config) -> dict:
    """Compiler options. Whether a * b + c may become one operation is said here: Triton's default is changing."""
    options = {} if INTERPRETED.value else {"enable_fp_fusion": True}
    return {"num_warps": config["warps"], "num_stages": config["stages"], **options}


# --- activations -> codes --------------------------------------------------------------------------------------------


def _rows_config(width: int) -> dict:
    """Rows a program and warps of a kernel that holds rows of `width` columns in registers."""
    block = max(16, _power(width))
    return {"BM": max(1, min(64, 2048 // block)), "BK": block, "warps": max(4, min(16, block // 512)), "stages": 1}


def _quantized(x: Tensor, top: int, group: int, split: int, fp8: bool, affine: bool, sums: bool):
    """Outputs of quant_rows -> (q, s, zero, total), (groups, width, stored width)."""
    m, k = x.shape
    width = group or k
    groups, stored = -(-k // width), _up(width, max(split, 16))
    q = x.new_empty(m, groups * stored, dtype=E4M3 if fp8 else torch.int8)
    s = x.new_empty(m, groups, dtype=torch.float32)
    zero = x.new_empty(m if affine and top == 127 else 0, dtype=torch.int32)
    return (q, s, zero, x.new_empty(m if sums else 0, dtype=torch.int32)), (groups, width, stored)


def _fake_quant_rows(x, smooth, given, top, group, split, fp8, affine, gelu, shift, sums):
    return _quantized(x, top, group, split, fp8, affine, sums)[0]


@operator(_fake_quant_rows)
def quant_rows(
    x: Tensor,
    smooth: Tensor | None,
    given: Tensor | None,
    top: int,
    group: int,
    split: int,
    fp8: bool,
    affine: bool,
    gelu: bool,
    shift: float,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, K) -> codes (M, KP), scales (M, groups), zero points (M,) int32, sums of codes (M,) int32.

    top: largest code (127, 7; for fp8 448). group: columns that share a scale, 0 for all. split: see `quantize`.
    given: a stored scale (1,). gelu, shift: applied to x * smooth first. zero: of 8-bit affine codes.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    out, (groups, width, stored) = _quantized(x, top, group, split, fp8, affine, sums)
    q, s, zero, total = out
    if x.shape[0] == 0:
        return out
    config = _rows_config(min(stored, LONGEST))
    kernel = quantize.quant_rows if stored <= LONGEST else quantize.quant_long_rows
    rows = x.shape[0] * groups
    kernel[(-(-rows // config["BM"]),)](
        x, smooth, given, q, s, zero if len(zero) else None, total if sums else None,
        rows, groups, width, stored, x.shape[1], x.stride(0), shift,
        float(top), fp8, affine, gelu, split, config["BM"], config["BK"], **_options(config),
    )  # fmt: skip
    return out


def _fake_adaln(x, weight, bias, scale, shift, smooth, tokens, eps, rms, fp8, split, branch):
    q = x.new_empty(x.shape[0], _up(x.shape[1], max(split, 16)), dtype=E4M3 if fp8 else torch.int8)
    return q, x.new_empty(x.shape[0], 1, dtype=torch.float32), torch.empty_like(x) if branch else x.new_empty(0)


@operator(_fake_adaln)
def adaln_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    smooth: Tensor | None,
    tokens: int,
    eps: float,
    rms: bool,
    fp8: bool,
    split: int,
    branch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm(x) weight + bias) (1 + scale) + shift, times smooth -> codes (M, KP), scales (M, 1), values if `branch`.

    x (M, K) with M = batch * tokens, K <= 16384; scale, shift (batch, K), columns contiguous, equal row pitch.
    """
    x = x.contiguous()
    q, s, y = _fake_adaln(x, weight, bias, scale, shift, smooth, tokens, eps, rms, fp8, split, branch)
    if x.shape[0] == 0:
        return q, s, y
    pitches = {t.stride(0) for t in (scale, shift) if t is not None}
    if len(pitches) > 1:
        scale, shift, pitches = scale.contiguous(), shift.contiguous(), {x.shape[1]}
    config = _rows_config(q.shape[1])
    quantize.adaln_quant[(-(-x.shape[0] // config["BM"]),)](
        x, weight, bias, scale, shift, smooth, y if branch else None, q, s, None, *x.shape, q.shape[1], tokens,
        next(iter(pitches), 0), eps, 448.0 if fp8 else 127.0, fp8, rms, split, config["BM"], config["BK"],
        **_options(config),
    )  # fmt: skip
    return q, s, y


def _fake_had(x, signs, smooth, fp8):
    return x.new_empty(x.shape, dtype=E4M3 if fp8 else torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@operator(_fake_had)
def had_quant(x: Tensor, signs: Tensor, smooth: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), signs (H, H) of +-1, H a power of two in 16 .. 128 that divides K -> codes (M, K), scales (M, 1)."""
    x, order = x.contiguous(), signs.shape[0]
    q, s = _fake_had(x, signs, smooth, fp8)
    if x.shape[0]:
        rows, config = 32, {"warps": 4, "stages": 2}
        quantize.had_quant[(-(-x.shape[0] // rows),)](
            x, signs.to(x.dtype), smooth, q, s, *x.shape, order**-0.5, 448.0 if fp8 else 127.0, fp8, order, rows,
            **_options(config),
        )  # fmt: skip
    return q, s


# --- products --------------------------------------------------------------------------------------------------------


def _chunks(xd: Tensor | None) -> tuple[int, int, int]:
    """Rank, chunks and columns of a chunk of a low-rank branch."""
    rank = 0 if xd is None else xd.shape[1]
    size = 16 if rank <= 16 else 32
    return rank, -(-rank // size), size


def _branch(xd, gate, residual) -> str:
    """Suffix of the configurations for epilogues that need more registers."""
    return "" if xd is None and gate is None and residual is None else "_branch"


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def takes_tma(q: Tensor, w: Tensor, arch: str) -> bool:
    """Whether tensor descriptors can read both operands here: the instruction, 16-byte rows, aligned starts."""
    pitches = (q.stride(0) * q.element_size(), w.stride(0) * w.element_size(), q.data_ptr(), w.data_ptr())
    return bool(configs.candidates("gemm_tma", arch)) and not any(value % 16 for value in pitches)


def _descriptor(t: Tensor, shape: tuple[int, ...], block: list[int]):
    """Host descriptor of the first `shape` of a row-major tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [1]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    strides = [t.stride(0), 1] if len(shape) == 2 else [strides[0] * shape[1], *strides]
    return TensorDescriptor(t, list(shape), strides, block)


def _fake_gemm(
    q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, tokens, gelu, dtype, tma=None, config=None
):
    return q.new_empty(q.shape[0], w.shape[0], dtype=torch.int32 if sx is None else dtype)


def launch_gemm(
    q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, tokens, gelu, dtype, tma=None, config=None
):
    """`w8a8_gemm` with the kernel and its tile sizes fixed by the caller; None chooses them."""
    out = _fake_gemm(q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, tokens, gelu, dtype)
    (n, k), m, arch = w.shape, q.shape[0], configs.architecture()
    if m == 0:
        return out
    tma = takes_tma(q, w, arch) and not INTERPRETED.value if tma is None else tma
    name = ("gemm_tma" if tma else "gemm") + _branch(xd, gate, residual)
    config = config or configs.pick(name, m, n, k, arch)
    rank, chunks, chunk = _chunks(xd)
    tile = (config["BM"], config["BN"], config["BK"], config["GROUP"])
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    operands = (sx, sw, *_flat(zx, wsum, zw, qsum, bias, xd, up), gate, residual, out, m, n, k, rank, tokens)
    pitch = 0 if gate is None else gate.stride(0)
    fp8 = q.dtype == E4M3
    if tma:
        a = _descriptor(q, (m, k), [tile[0], tile[2]])
        b = _descriptor(w, (n, k), [tile[1], tile[2]])
        programs = configs.multiprocessors()
        gemm.gemm_tma[(min(tiles, programs),)](
            a, b, *operands, pitch, *tile, programs, fp8, gelu, chunks, chunk, **_options(config)
        )  # fmt: skip
    else:
        ragged = bool(k % tile[2])
        gemm.gemm[(tiles,)](
            q, w, *operands, pitch, q.stride(0), *tile, ragged, fp8, gelu, chunks, chunk, **_options(config)
        )  # fmt: skip
    return out


@operator(_fake_gemm)
def w8a8_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor | None,
    sw: Tensor | None,
    zx: Tensor | None,
    wsum: Tensor | None,
    zw: Tensor | None,
    qsum: Tensor | None,
    bias: Tensor | None,
    xd: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    tokens: int,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `gemm`: q (M, >= K), w (N, K) int8 or e4m3, sx (M,), sw (N,) fp32 -> y (M, N) in dtype.

    zx, qsum (M,), wsum (N,) int32, zw (N,) int8; xd (M, R), up (N, R); gate (batch, N), residual (M, N) contiguous.
    Without sx: the int32 sums.
    """
    return launch_gemm(q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, tokens, gelu, dtype)


def _fake_w4a8(
    q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, group, tokens, gelu, dtype, config=None
):
    return q.new_empty(q.shape[0], w.shape[0], dtype=torch.int32 if sx is None else dtype)


def launch_w4a8(
    q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, group, tokens, gelu, dtype, config=None
):
    """`w4a8_gemm` with tile sizes fixed by the caller; None chooses them."""
    out = _fake_w4a8(q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, group, tokens, gelu, dtype)
    (n, bytes_), (m, k) = w.shape, q.shape
    if m == 0:
        return out
    config = config or configs.pick("w4a8_groups" if group else "w4a8", m, n, k)
    rank, chunks, chunk = _chunks(xd)
    tile, asm = (config["BM"], config["BN"]), bool(config["ASM"])
    grid = (-(-m // tile[0]) * -(-n // tile[1]),)
    rest = (*_flat(bias, xd, up), gate, residual, out, m, n, k, bytes_, rank, tokens)
    rest = (*rest, 0 if gate is None else gate.stride(0), *tile)
    if group:
        ragged, token = bool(bytes_ % (group // 2)), sx.numel() == m and k > group
        packed.w4a8_groups[grid](
            q, w, sx, sw, *rest, group, config["GROUP"], ragged, asm, token, gelu, chunks, chunk, **_options(config)
        )  # fmt: skip
    else:
        ragged, swap = bool(bytes_ % 64), bool(config["SWAP"])
        packed.w4a8[grid](
            q, w, sx, sw, *_flat(zx, wsum, zw, qsum), *rest, config["GROUP"], ragged, asm, swap, gelu, chunks, chunk,
            **_options(config),
        )  # fmt: skip
    return out


@operator(_fake_w4a8)
def w4a8_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor | None,
    sw: Tensor,
    zx: Tensor | None,
    wsum: Tensor | None,
    zw: Tensor | None,
    qsum: Tensor | None,
    bias: Tensor | None,
    xd: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    group: int,
    tokens: int,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`w8a8_gemm` with w (N, K / 2) bytes of two int4 codes, and codes q whose columns were stored split.

    group 0: q split by 128, sw (N,). Else q split by group, sw (N, groups), sx (M,) or (M, groups), no zero points.
    """
    return launch_w4a8(q, w, sx, sw, zx, wsum, zw, qsum, bias, xd, up, gate, residual, group, tokens, gelu, dtype)


# --- 4-bit weights ---------------------------------------------------------------------------------------------------

UNPACK = {"BN": 16, "BB": 128, "warps": 4, "stages": 1}


def _fake_w4_to_s8(w, k, scale, whole, group):
    return w.new_empty(w.shape[0], k)


@operator(_fake_w4_to_s8)
def w4_to_s8(w: Tensor, k: int, scale: Tensor | None, whole: Tensor | None, group: int) -> Tensor:
    """w (N, ceil(k / 2)) bytes of int4 -> int8 codes (N, k); with scale (N, groups), whole (N,) rounded to 8 bits."""
    out, c = _fake_w4_to_s8(w, k, scale, whole, group), UNPACK
    grid = (-(-w.shape[0] // c["BN"]), -(-w.shape[1] // c["BB"]))
    packed.w4_to_s8[grid](
        w, scale, whole, out, w.shape[0], k, w.shape[1], -(-k // (group or k)), group or k, c["BN"], c["BB"],
        **_options(c),
    )  # fmt: skip
    return out


def _fake_w4_to_float(w, k, scale, zero, whole, form, group, dtype):
    return w.new_empty(w.shape[0], k, dtype=dtype)


@operator(_fake_w4_to_float)
def w4_to_float(
    w: Tensor,
    k: int,
    scale: Tensor,
    zero: Tensor | None,
    whole: Tensor | None,
    form: str,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """4-bit weights (N, ceil(k / 2)) bytes of `form` (int4, nvfp4, mxfp4) -> (N, k) in dtype.

    scale, zero (N | 1, groups) as stored; group 0 for one scale a row; whole: (1,) of nvfp4.
    """
    out, c = _fake_w4_to_float(w, k, scale, zero, whole, form, group, dtype), UNPACK
    grid = (-(-w.shape[0] // c["BN"]), -(-w.shape[1] // c["BB"]))
    pitch = 0 if scale.shape[0] == 1 and w.shape[0] > 1 else scale.shape[1]
    packed.w4_to_float[grid](
        w, scale, zero, whole, out, w.shape[0], k, w.shape[1], pitch, FORMATS[form], group or k, c["BN"], c["BB"],
        **_options(c),
    )  # fmt: skip
    return out


def _fake_weight_sums(w, k, scale, bits, group):
    return w.new_empty(w.shape[0], dtype=torch.int32 if scale is None else torch.float32)


@operator(_fake_weight_sums)
def weight_sums(w: Tensor, k: int, scale: Tensor | None, bits: int, group: int) -> Tensor:
    """Rows of int8 or packed int4 codes w -> sums (N,): int32 of codes, or with scale (N, groups) fp32 of weights."""
    out, c = _fake_weight_sums(w, k, scale, bits, group), UNPACK
    packed.weight_sums[(-(-w.shape[0] // c["BN"]),)](
        w, scale, out, w.shape[0], k, w.shape[1], -(-k // (group or k)), bits, group or k, c["BN"], c["BB"],
        **_options(c),
    )  # fmt: skip
    return out


# --- nvfp4 -----------------------------------------------------------------------------------------------------------


def _fake_nvfp4_quant(x):
    quads = -(-x.shape[1] // 64)
    scales = x.new_zeros(_up(x.shape[0], 128) * 4 * quads, dtype=torch.uint8)
    return (
        x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8),
        scales,
        x.new_empty(x.shape[0], dtype=torch.float32),
    )


@operator(_fake_nvfp4_quant)
def nvfp4_quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K), K a multiple of 32, at most 16384 -> bytes (M, K / 2), scale tiles, global scales (M,)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    q, scales, g = _fake_nvfp4_quant(x)
    quads = -(-x.shape[1] // 64)
    config = _rows_config(64 * quads)
    if x.shape[0]:
        nvfp4.nvfp4_quant[(-(-x.shape[0] // config["BM"]),)](
            x, q, scales, g, *x.shape, x.stride(0), quads, config["BM"], max(64, config["BK"]), **_options(config)
        )  # fmt: skip
    return q, scales, g


def _fake_tile_scales(scale):
    return scale.new_empty(_up(scale.shape[0], 128) * _up(scale.shape[1], 4), dtype=torch.uint8)


@operator(_fake_tile_scales)
def tile_scales(scale: Tensor) -> Tensor:
    """Stored e4m3 bytes (N, blocks) -> the tiles that block-scaled units read, uint8 (128 ceil(N / 128) 4 quads,)."""
    (n, blocks), out = scale.shape, _fake_tile_scales(scale)
    quads, config = -(-blocks // 4), {"warps": 4, "stages": 1}
    nvfp4.tile_scales[(-(-n // 128), -(-quads // 8))](
        scale.view(torch.uint8), out, n, blocks, quads, 128, 32, **_options(config)
    )  # fmt: skip
    return out


def _fake_nvfp4_gemm(q, w, sx, sw, gx, gw, bias, xd, up, gate, residual, tokens, gelu, dtype, config=None):
    return q.new_empty(q.shape[0], w.shape[0], dtype=dtype)


def launch_nvfp4(q, w, sx, sw, gx, gw, bias, xd, up, gate, residual, tokens, gelu, dtype, config=None):
    """`nvfp4_gemm` with tile sizes fixed by the caller; None chooses them."""
    out = _fake_nvfp4_gemm(q, w, sx, sw, gx, gw, bias, xd, up, gate, residual, tokens, gelu, dtype)
    (n, half), m = w.shape, q.shape[0]
    if m == 0:
        return out
    config = config or configs.pick("nvfp4", m, n, 2 * half)
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    rank, chunks, chunk = _chunks(xd)
    quads = -(-half // 32)
    tiles = -(-m // bm) * -(-n // bn)
    programs = configs.multiprocessors()
    scales = [
        _descriptor(t, (1, -(-rows // 128), quads, 2, 256), [1, block // 128, bk // 64, 2, 256])
        for t, rows, block in ((sx, m, bm), (sw, n, bn))
    ]
    a = _descriptor(q, (m, half), [bm, bk // 2])
    b = _descriptor(w.view(torch.uint8), (n, half), [bn, bk // 2])
    nvfp4.nvfp4_gemm[(min(tiles, programs),)](
        a, scales[0], b, scales[1], gx, gw, *_flat(bias, xd, up), gate, residual, out, m, n, 2 * half, rank, tokens,
        0 if gate is None else gate.stride(0), bm, bn, bk, config["GROUP"], programs, gelu, chunks, chunk,
        **_options(config),
    )  # fmt: skip
    return out


@operator(_fake_nvfp4_gemm)
def nvfp4_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    gx: Tensor,
    gw: Tensor,
    bias: Tensor | None,
    xd: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    tokens: int,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `nvfp4`: q (M, K / 2), w (N, K / 2) bytes, sx, sw scale tiles, gx (M,), gw (1,) -> y (M, N) in dtype."""
    return launch_nvfp4(q, w, sx, sw, gx, gw, bias, xd, up, gate, residual, tokens, gelu, dtype)


# --- attention -------------------------------------------------------------------------------------------------------


def _fake_qk(x, weight, cos, sin, mean, half, eps, factor):
    b, n, h, d = x.shape
    return x.new_empty(b * h, n, d, dtype=torch.int8), x.new_empty(b * h, n, dtype=torch.float32)


@operator(_fake_qk)
def qk_norm_rope_quant(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    mean: Tensor | None,
    half: bool,
    eps: float,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """x (B, L, H, D), heads contiguous -> int8 (B * H, L, D) and scales (B * H, L) times factor. See `attention`.

    weight (D,): RMSNorm; cos, sin (L, D) fp32; mean (B * H, D) fp32: taken off after rotation.
    """
    b, n, h, d = x.shape
    q, s = _fake_qk(x, weight, cos, sin, mean, half, eps, factor)
    attention.qk_norm_rope_quant[(-(-n // 32), b * h)](
        x, weight, *_flat(cos, sin, mean), q, s, n, h, x.stride(0), x.stride(1), eps, factor, d, _power(d), 32, half,
        **_options({"warps": 4, "stages": 1}),
    )  # fmt: skip
    return q, s


def _fake_k_mean(x, weight, cos, sin, half, eps):
    return x.new_empty(x.shape[0] * x.shape[2], x.shape[3], dtype=torch.float32)


@operator(_fake_k_mean)
def k_mean(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, half: bool, eps: float) -> Tensor:
    """Mean normed and rotated key of each head: x (B, L, H, D) -> (B * H, D) fp32."""
    (b, n, h, d), rows = x.shape, 32
    parts = x.new_empty(b * h, -(-n // rows), d, dtype=torch.float32)
    attention.k_sums[(parts.shape[1], b * h)](
        x, weight, *_flat(cos, sin), parts, n, h, x.stride(0), x.stride(1), eps, d, _power(d), rows, half,
        **_options({"warps": 4, "stages": 1}),
    )  # fmt: skip
    return parts.sum(1) / n


def _fake_v_fp8(x):
    b, n, h, d = x.shape
    return x.new_empty(b * h, d, _up(n, 16), dtype=E4M3), x.new_empty(b * h, d, dtype=torch.float32)


@operator(_fake_v_fp8)
def v_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, L, H, D), heads contiguous -> e4m3 (B * H, D, LP) with LP = L rounded up to 16, scales (B * H, D)."""
    b, n, h, d = x.shape
    v, _ = _fake_v_fp8(x)
    s = (x.abs().amax(1).float() / 448.0).clamp_(min=1e-12).reshape(b * h, d).contiguous()
    attention.v_fp8[(-(-v.shape[2] // 32), b * h)](
        x, s, v, n, v.shape[2], h, x.stride(0), x.stride(1), d, _power(d), 32, **_options({"warps": 4, "stages": 1})
    )  # fmt: skip
    return v, s


def _fake_attn(q, k, v, sq, sk, sv, heads, dtype):
    return q.new_empty(q.shape[0] // heads, q.shape[1], heads, q.shape[2], dtype=dtype)


@operator(_fake_attn)
def attn_i8(
    q: Tensor, k: Tensor, v: Tensor, sq: Tensor, sk: Tensor, sv: Tensor | None, heads: int, dtype: torch.dtype
) -> Tensor:
    """q (B * H, L, D), k (B * H, LK, D) int8, v fp16 (B * H, LK, D) or with sv e4m3 (B * H, D, LP) -> (B, L, H, D)."""
    out = _fake_attn(q, k, v, sq, sk, sv, heads, dtype)
    (bh, n, d), block = q.shape, _power(q.shape[2])
    name = f"attention_{max(block, 64)}" + ("_masked" if block == 128 > d else "")  # masks cost registers
    config = configs.pick(name, n, bh, d)
    length = v.shape[2] if sv is not None else 0
    attention.attn_i8[(-(-n // config["BM"]), bh)](
        q, k, v, sq, sk, sv, out, n, k.shape[1], length, heads, d, block, config["BM"], config["BN"], sv is not None,
        **_options(config),
    )  # fmt: skip
    return out
