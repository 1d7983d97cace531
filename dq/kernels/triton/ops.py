"""The kernels as Python functions of tensors, each behind an operator `torch.ops.dq.triton_*` that torch can trace.

Operands come as small tuples; they are flattened at the operator's border, whose arguments are keyword-only. An
operator allocates its outputs, picks tile sizes (`configs`) and launches; it knows no layers, and has a fake that
gives its shapes. Shapes: rows of activations M, output channels N, input channels K, rank of a low-rank branch R.
Schemas come from the signatures, which is why annotations are real types here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dq.errors import DQError
from dq.kernels import Tensors
from dq.kernels.triton import configs, gemm, nvfp4, packed, quantize
from dq.kernels.triton.elements import INTERPRETED

_library = torch.library.Library("dq", "FRAGMENT")
E4M3 = torch.float8_e4m3fn
INT8_TOP, FP8_TOP = 127, 448  # largest codes
LONGEST = 16384  # columns that a quantization kernel holds in registers
PROMOTED = 128  # e4m3 products that Hopper sums in 14 bits at a time when exact sums are asked for
PROMOTED_TILE = 128 * 128  # largest tile whose two accumulators fit in registers
FORMATS = {"int4": 0, "nvfp4": 1, "mxfp4": 2}


class RowFormat(NamedTuple):
    """How rows of activations become codes.

    top     largest code: 127 of int8, 7 of int4, ..., FP8_TOP for e4m3 codes
    affine  a zero point per row: stored for 8 bits, already taken off the codes of fewer bits
    group   columns that share a scale, 0 for all
    split   columns whose even ones are stored first (see `quantize`), 0 for the order of the input
    shift   added to the input first
    clip    share of a measured range that codes cover
    """

    top: int = INT8_TOP
    affine: bool = False
    group: int = 0
    split: int = 0
    shift: float = 0.0
    clip: float = 1.0


class Codes(NamedTuple):
    """One operand of an integer or e4m3 product.

    q      (rows, >= K) int8 or e4m3, rows `stride(0)` apart; int4 weights: (rows, ceil(K / 2)) int8, two codes a byte
    scale  (rows,) or (rows, 1) fp32; with groups (rows, groups)
    zero   (rows,) zero points, int32 of activations, int8 of weights; None without. Only of one operand
    sums   (rows,) int32 sums of each row of q, when the other operand has zero points
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None


class Blocks(NamedTuple):
    """One operand of a block-scaled product.

    q      (rows, K / 2) bytes of two e2m1 codes
    scale  (128 ceil(rows / 128) 4 ceil(K / 64),) uint8: e4m3 scales of blocks of 16, in tiles (see `nvfp4`)
    whole  fp32, (M,) of activations, (1,) of a weight
    """

    q: Tensor
    scale: Tensor
    whole: Tensor


class Epilogue(NamedTuple):
    """What becomes of the scaled sums y (M, N): y + down_x up^T + bias, then GELU, then `dtype`.

    dtype   of the output: fp32, bf16 or fp16
    bias    (N,) of any float type, None without
    down_x  (M, R), the input after the first half of a low-rank branch, None without
    up      (N, R), its second half
    gelu    whether the tanh GELU follows; for bf16 the fast one where the GPU is NVIDIA's
    """

    dtype: torch.dtype
    bias: Tensor | None = None
    down_x: Tensor | None = None
    up: Tensor | None = None
    gelu: bool = False


def operator(fake: Callable) -> Callable[[Callable], Callable]:
    """Register `name` or `_name` as `dq::triton_name` for all devices, `fake` giving shapes; returns the operator."""

    def register(function: Callable) -> Callable:
        name = f"triton_{function.__name__.lstrip('_')}"

        def on_its_device(first: Tensor, *args, **kwargs):
            on_one_gpu(name, first, *args, *kwargs.values())
            with torch.cuda.device_of(first):  # triton launches on the current device, wherever the tensors are
                return function(first, *args, **kwargs)

        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, on_its_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dq::{name}", fake, lib=_library)
        return getattr(torch.ops.dq, name).default

    return register


def on_one_gpu(name: str, *values) -> None:
    """DQError unless all tensors among the values are on one GPU (in the interpreter: on one device)."""
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if len(devices) > 1 or not (INTERPRETED.value or all(device.type == "cuda" for device in devices)):
        found = ", ".join(sorted(map(str, devices)))
        raise DQError(
            f"dq::{name}: got tensors on {found}, expected all on one GPU, where Triton kernels run. "
            'Move the layer and its input to one, or take dq.set_backend("auto")'
        )


def up_to(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def power(value: int) -> int:
    """The next power of two."""
    return 1 << max(value - 1, 0).bit_length()


def options(config: configs.Config) -> dict:
    """Compiler options. Whether a * b + c may become one operation is said here: Triton's default is changing."""
    fusion = {} if INTERPRETED.value else {"enable_fp_fusion": True}
    return {"num_warps": config["warps"], "num_stages": config["stages"], **fusion}


def flat(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors, None where there is none."""
    return [None if t is None else t.contiguous() for t in tensors]


def rowed(x: Tensor) -> Tensor:
    """With the columns of a row side by side; rows may lie apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


# --- activations -> codes --------------------------------------------------------------------------------------------


def rows_config(width: int) -> dict:
    """Rows a program and warps of a kernel that holds rows of `width` columns in registers."""
    block = max(16, power(width))
    return {"BM": max(1, min(64, 2048 // block)), "BK": block, "warps": max(4, min(16, block // 512)), "stages": 1}


def _fake_quant_rows(x, *, top=INT8_TOP, affine=False, group=0, split=0, sums=False, **rest):
    m, k = x.shape
    width = group or k
    groups, stored = -(-k // width), up_to(width, max(split, 16))
    q = x.new_empty(m, groups * stored, dtype=E4M3 if top == FP8_TOP else torch.int8)
    zero = x.new_empty(m if affine and top == INT8_TOP else 0, dtype=torch.int32)
    return q, x.new_empty(m, groups, dtype=torch.float32), zero, x.new_empty(m if sums else 0, dtype=torch.int32)


@operator(_fake_quant_rows)
def _quant_rows(
    x: Tensor,
    *,
    top: int = INT8_TOP,
    affine: bool = False,
    group: int = 0,
    split: int = 0,
    shift: float = 0.0,
    clip: float = 1.0,
    given: Tensor | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quant_rows`; outputs that were not asked for are empty."""
    x = rowed(x)
    (m, k), width = x.shape, group or x.shape[1]
    out = _fake_quant_rows(x, top=top, affine=affine, group=group, split=split, sums=sums)
    if m == 0:
        return out
    q, s, zero, total = out
    groups, stored = s.shape[1], q.shape[1] // s.shape[1]
    config = rows_config(min(stored, LONGEST))
    kernel = quantize.quant_rows if stored <= LONGEST else quantize.quant_long_rows
    kernel[(-(-m * groups // config["BM"]),)](
        x, given, q, s, zero if len(zero) else None, total if sums else None,
        m * groups, groups, width, stored, k, x.stride(0), shift, clip,
        float(top), top == FP8_TOP, affine, split, config["BM"], config["BK"], **options(config),
    )  # fmt: skip
    return out


def quant_rows(x: Tensor, rows: RowFormat, *, given: Tensor | None = None, sums: bool = False) -> Codes:
    """x (M, K) -> codes q (M, KP): groups one after another, each zero-padded to a multiple of 16 and of the split.

    given  a stored scale (1,) fp32 for all rows instead of measured ones; beyond it values saturate
    sums   whether the sums of codes are wanted, for weights with zero points
    Scales are (M, groups). A row (with `given`: only one with NaN) that is not finite gets the scale NaN.
    """
    q, scale, zero, total = _quant_rows(x, **rows._asdict(), given=given, sums=sums)
    return Codes(q, scale, zero if rows.affine and rows.top == INT8_TOP else None, total if sums else None)


# --- products --------------------------------------------------------------------------------------------------------


def _chunks(epilogue: Epilogue) -> tuple[int, int, int]:
    """Rank, chunks and columns of a chunk of a low-rank branch."""
    rank = 0 if epilogue.down_x is None else epilogue.down_x.shape[1]
    size = 16 if rank <= 16 else 32
    return rank, -(-rank // size), size


def gelu_kind(epilogue: Epilogue) -> int:
    """Which GELU the kernels are compiled with: 0 none, 1 exact, 2 by NVIDIA's tanh, finer than bf16 and not fp16."""
    fast = epilogue.dtype is torch.bfloat16 and not torch.version.hip and not INTERPRETED.value
    return (2 if fast else 1) if epilogue.gelu else 0


def _zeros(x: Codes, w: Codes) -> dict[str, Tensor | None]:
    """Zero points and the sums that go with them, as the operators take them."""
    return {"zx": x.zero, "wsum": w.sums, "zw": w.zero, "qsum": x.sums}


def takes_tma(q: Tensor, w: Tensor, arch: str) -> bool:
    """Whether tensor descriptors can read both operands here: the instruction, 16-byte rows, aligned starts."""
    pitches = (q.stride(0) * q.element_size(), w.stride(0) * w.element_size(), q.data_ptr(), w.data_ptr())
    return bool(configs.candidates("gemm_tma", arch)) and not any(value % 16 for value in pitches)


def descriptor(t: Tensor, shape: tuple[int, ...], block: list[int]):
    """Host descriptor of the first `shape` of a row-major tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [1]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    strides = [t.stride(0), 1] if len(shape) == 2 else [strides[0] * shape[1], *strides]
    return TensorDescriptor(t, list(shape), strides, block)


def promoted(x: Tensor, exact: bool, arch: str) -> bool:
    """Whether sums of a product have to be moved to fp32 now and then: only Hopper's e4m3 products are not exact."""
    return exact and x.dtype == E4M3 and arch == "sm_90"


def gemm_config(name: str, m: int, n: int, k: int, fp8: bool, within: int | None = None) -> configs.Config:
    """Tile sizes of an 8-bit product, of at most `within` elements if it is given."""
    if within is None:
        return configs.pick(name + (":fp8" if fp8 else ""), m, n, k)
    small = [c for c in configs.candidates(name, configs.architecture()) if c["BM"] * c["BN"] <= within]
    return configs.suited(small, (m, n, k), configs.multiprocessors())


def launch_gemm(
    x: Codes,
    w: Codes,
    epilogue: Epilogue,
    tma: bool | None = None,
    config: configs.Config | None = None,
    exact: bool = False,
) -> Tensor:
    """`w8a8_gemm` with the kernel (descriptors or pointers) and its tile sizes fixed by the caller; None chooses."""
    x, w = x._replace(q=rowed(x.q)), w._replace(q=w.q.contiguous())
    (n, k), m, arch, fp8 = w.q.shape, x.q.shape[0], configs.architecture(), x.q.dtype == E4M3
    out = x.q.new_empty(m, n, dtype=epilogue.dtype)
    if m == 0:
        return out
    tma = takes_tma(x.q, w.q, arch) and not INTERPRETED.value if tma is None else tma
    name = ("gemm_tma" if tma else "gemm") + ("" if epilogue.down_x is None else "_branch")
    short = promoted(x.q, exact, arch)
    config = config or gemm_config(name, m, n, k, fp8, PROMOTED_TILE if short else None)
    rank, *chunks = _chunks(epilogue)
    tile = (config["BM"], config["BN"], config["BK"], config["GROUP"])
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    ends = (*_zeros(x, w).values(), epilogue.bias, epilogue.down_x, epilogue.up)
    rest = (*flat(x.scale, w.scale, *ends), out, m, n, k, rank)
    last = (fp8, min(PROMOTED, tile[2]) if short else None, gelu_kind(epilogue), *chunks)
    if tma:
        a, b = descriptor(x.q, (m, k), [tile[0], tile[2]]), descriptor(w.q, (n, k), [tile[1], tile[2]])
        programs = configs.multiprocessors() * config.get("resident", 1)
        gemm.gemm_tma[(min(tiles, programs),)](a, b, *rest, *tile, programs, *last, **options(config))
    else:
        ragged = bool(k % tile[2])
        gemm.gemm[(tiles,)](x.q, w.q, *rest, x.q.stride(0), *tile, ragged, *last, **options(config))
    return out


def _fake_gemm(q, w, sx, sw, *, dtype, **rest):
    return q.new_empty(q.shape[0], w.shape[0], dtype=dtype)


@operator(_fake_gemm)
def _w8a8_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    *,
    zx: Tensor | None = None,
    wsum: Tensor | None = None,
    zw: Tensor | None = None,
    qsum: Tensor | None = None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    down_x: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
    exact: bool = False,
) -> Tensor:
    end = Epilogue(dtype, bias, down_x, up, gelu)
    return launch_gemm(Codes(q, sx, zx, qsum), Codes(w, sw, zw, wsum), end, exact=exact)


def w8a8_gemm(x: Codes, w: Codes, epilogue: Epilogue, exact: bool = False) -> Tensor:
    """x (M, >= K), w (N, K), both int8 or both e4m3, one scale a row -> (M, N). See `gemm`.

    exact  sums of e4m3 in fp32 on Hopper, too, whose units keep 14 bits; slower there, and no difference elsewhere
    """
    return _w8a8_gemm(x.q, w.q, x.scale, w.scale, **_zeros(x, w), **epilogue._asdict(), exact=exact)


def launch_w4a8(
    x: Codes, w: Codes, epilogue: Epilogue, group: int = 0, config: configs.Config | None = None
) -> Tensor:
    """`w4a8_gemm`, with a group `w4a8_groups_gemm`, with tile sizes fixed by the caller; None chooses them."""
    x, w = Codes(*flat(*x)), Codes(*flat(*w))
    (n, bytes_), (m, k) = w.q.shape, x.q.shape
    out = x.q.new_empty(m, n, dtype=epilogue.dtype)
    if m == 0:
        return out
    config = config or configs.pick("w4a8_groups" if group else "w4a8", m, n, k)
    rank, *chunks = _chunks(epilogue)
    tile, asm = (config["BM"], config["BN"]), bool(config["ASM"])
    grid = (-(-m // tile[0]) * -(-n // tile[1]),)
    rest = (*flat(epilogue.bias, epilogue.down_x, epilogue.up), out, m, n, k, bytes_, rank, *tile)
    if group:
        ragged, token = bool(bytes_ % (group // 2)), x.scale.numel() == m and k > group
        packed.w4a8_groups[grid](
            x.q, w.q, x.scale, w.scale, *rest, group, config["GROUP"], ragged, asm, token, gelu_kind(epilogue),
            *chunks, **options(config),
        )  # fmt: skip
    else:
        ragged, swap = bool(bytes_ % 64), bool(config["SWAP"])
        packed.w4a8[grid](
            x.q, w.q, x.scale, w.scale, *_zeros(x, w).values(), *rest, config["GROUP"], ragged, asm, swap,
            gelu_kind(epilogue), *chunks, **options(config),
        )  # fmt: skip
    return out


@operator(_fake_gemm)
def _w4a8_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    *,
    zx: Tensor | None = None,
    wsum: Tensor | None = None,
    zw: Tensor | None = None,
    qsum: Tensor | None = None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    down_x: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    return launch_w4a8(Codes(q, sx, zx, qsum), Codes(w, sw, zw, wsum), Epilogue(dtype, bias, down_x, up, gelu))


def w4a8_gemm(x: Codes, w: Codes, epilogue: Epilogue) -> Tensor:
    """`w8a8_gemm` with w (N, ceil(K / 2)) bytes of two int4 codes and codes x (M, KP) that were split by 128."""
    return _w4a8_gemm(x.q, w.q, x.scale, w.scale, **_zeros(x, w), **epilogue._asdict())


@operator(_fake_gemm)
def _w4a8_groups_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    *,
    group: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    down_x: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    return launch_w4a8(Codes(q, sx), Codes(w, sw), Epilogue(dtype, bias, down_x, up, gelu), group)


def w4a8_groups_gemm(x: Codes, w: Codes, group: int, epilogue: Epilogue) -> Tensor:
    """The same with a weight scale for every `group` columns (N, groups), and codes x that were split by `group`.

    Scales of x are (M, 1) or as those of the weight (M, groups). No zero points.
    """
    return _w4a8_groups_gemm(x.q, w.q, x.scale, w.scale, group=group, **epilogue._asdict())


# --- 4-bit weights ---------------------------------------------------------------------------------------------------

UNPACK = {"BN": 16, "BB": 128, "warps": 4, "stages": 1}


def _unpack_grid(w: Tensor) -> tuple[int, int]:
    return (-(-w.shape[0] // UNPACK["BN"]), -(-w.shape[1] // UNPACK["BB"]))


def _fake_w4_to_s8(w, *, k, **rest):
    return w.new_empty(w.shape[0], k)


@operator(_fake_w4_to_s8)
def w4_to_s8(w: Tensor, *, k: int, times: Tensor | None = None, group: int = 1) -> Tensor:
    """w (N, ceil(k / 2)) int8 bytes of two int4 codes -> int8 codes (N, k).

    times (N, groups): multipliers, each of `group` columns, int8 of two-level scales, fp32 to round again (see
    `stored.rerounded`); products fit int8
    """
    (w, times), out, c = flat(w, times), _fake_w4_to_s8(w, k=k), UNPACK
    groups = 0 if times is None else times.shape[1]
    packed.w4_to_s8[_unpack_grid(w)](
        w, times, out, w.shape[0], k, w.shape[1], groups, group, c["BN"], c["BB"], **options(c)
    )
    return out


def _fake_w4_to_float(w, scale, *, k, dtype, **rest):
    return w.new_empty(w.shape[0], k, dtype=dtype)


@operator(_fake_w4_to_float)
def _w4_to_float(
    w: Tensor,
    scale: Tensor,
    *,
    zero: Tensor | None = None,
    whole: Tensor | None = None,
    k: int,
    form: str,
    group: int = 0,
    dtype: torch.dtype,
) -> Tensor:
    w, scale, zero = flat(w, scale, zero)
    out, c = _fake_w4_to_float(w, scale, k=k, dtype=dtype), UNPACK
    pitch = 0 if scale.shape[0] == 1 and w.shape[0] > 1 else scale.shape[1]
    packed.w4_to_float[_unpack_grid(w)](
        w, scale, zero, whole, out, w.shape[0], k, w.shape[1], pitch, FORMATS[form], group or k, c["BN"], c["BB"],
        **options(c),
    )  # fmt: skip
    return out


def w4_to_float(t: Tensors, k: int, form: str, group: int, dtype: torch.dtype) -> Tensor:
    """4-bit weights (N, ceil(k / 2)) bytes of a packed layer -> (N, k) in dtype.

    form: int4, nvfp4 or mxfp4. group: columns that share a scale, 0 for one scale a row. Scales and zero points
    (N | 1, groups) as they are stored.
    """
    return _w4_to_float(t.weight, t.scale, zero=t.zero, whole=t.scale_global, k=k, form=form, group=group, dtype=dtype)


def _fake_weight_sums(w, *, scale=None, **rest):
    return w.new_empty(w.shape[0], dtype=torch.int32 if scale is None else torch.float32)


@operator(_fake_weight_sums)
def weight_sums(w: Tensor, *, k: int, bits: int, scale: Tensor | None = None, group: int = 0) -> Tensor:
    """Rows of codes w -> sums (N,): int32 of codes, or with scale (N, groups) of int4 codes fp32 of weights.

    w is (N, k) int8 for 8 bits, (N, ceil(k / 2)) bytes of two codes for 4. group: columns that share a scale.
    """
    w, scale = flat(w, scale)
    out, c = _fake_weight_sums(w, scale=scale), UNPACK
    packed.weight_sums[_unpack_grid(w)[:1]](
        w, scale, out, w.shape[0], k, w.shape[1], -(-k // (group or k)), bits, group or k, c["BN"], c["BB"],
        **options(c),
    )  # fmt: skip
    return out


# --- nvfp4 -----------------------------------------------------------------------------------------------------------


def _fake_nvfp4_quant(x):
    m, k = x.shape
    scales = x.new_zeros(up_to(m, 128) * up_to(k, 64) // 16, dtype=torch.uint8)
    return x.new_empty(m, k // 2, dtype=torch.uint8), scales, x.new_empty(m, dtype=torch.float32)


@operator(_fake_nvfp4_quant)
def _nvfp4_quant(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = rowed(x)
    q, scales, g = _fake_nvfp4_quant(x)
    quads = -(-x.shape[1] // 64)
    config = rows_config(64 * quads)
    if x.shape[0]:
        nvfp4.nvfp4_quant[(-(-x.shape[0] // config["BM"]),)](
            x, q, scales, g, *x.shape, x.stride(0), quads, config["BM"], max(64, config["BK"]), **options(config)
        )
    return q, scales, g


def nvfp4_quant(x: Tensor) -> Blocks:
    """x (M, K), K a multiple of 32, at most 16384. A row that is not finite gets the global scale NaN."""
    return Blocks(*_nvfp4_quant(x))


def _fake_tile_scales(scale):
    return scale.new_empty(up_to(scale.shape[0], 128) * up_to(scale.shape[1], 4), dtype=torch.uint8)


@operator(_fake_tile_scales)
def tile_scales(scale: Tensor) -> Tensor:
    """Stored e4m3 bytes (N, blocks) -> the tiles that block-scaled units read, uint8 (128 ceil(N / 128) 4 quads,)."""
    (n, blocks), out = scale.shape, _fake_tile_scales(scale)
    quads, config = -(-blocks // 4), {"warps": 4, "stages": 1}
    nvfp4.tile_scales[(-(-n // 128), -(-quads // 8))](
        scale.contiguous().view(torch.uint8), out, n, blocks, quads, 128, 32, **options(config)
    )
    return out


def launch_nvfp4(x: Blocks, w: Blocks, epilogue: Epilogue, config: configs.Config | None = None) -> Tensor:
    """`nvfp4_gemm` with tile sizes fixed by the caller; None chooses them."""
    x, w = Blocks(*flat(*x)), Blocks(*flat(*w))
    (n, half), m = w.q.shape, x.q.shape[0]
    out = x.q.new_empty(m, n, dtype=epilogue.dtype)
    if m == 0:
        return out
    config = config or configs.pick("nvfp4", m, n, 2 * half)
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    rank, *chunks = _chunks(epilogue)
    programs = configs.multiprocessors()
    grid = (min(-(-m // bm) * -(-n // bn), programs),)
    quads = -(-half // 32)
    a_scale, b_scale = (
        descriptor(t, (1, -(-rows // 128), quads, 2, 256), [1, block // 128, bk // 64, 2, 256])
        for t, rows, block in ((x.scale, m, bm), (w.scale, n, bn))
    )
    a = descriptor(x.q, (m, half), [bm, bk // 2])
    b = descriptor(w.q.view(torch.uint8), (n, half), [bn, bk // 2])
    nvfp4.nvfp4_gemm[grid](
        a, a_scale, b, b_scale, x.whole, w.whole, *flat(epilogue.bias, epilogue.down_x, epilogue.up), out,
        m, n, 2 * half, rank, bm, bn, bk, config["GROUP"], programs, gelu_kind(epilogue), *chunks, **options(config),
    )  # fmt: skip
    return out


def _fake_nvfp4_gemm(q, w, *scales, dtype, **rest):
    return q.new_empty(q.shape[0], w.shape[0], dtype=dtype)


@operator(_fake_nvfp4_gemm)
def _nvfp4_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    gx: Tensor,
    gw: Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    down_x: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    return launch_nvfp4(Blocks(q, sx, gx), Blocks(w, sw, gw), Epilogue(dtype, bias, down_x, up, gelu))


def nvfp4_gemm(x: Blocks, w: Blocks, epilogue: Epilogue) -> Tensor:
    """x (M, K / 2), w (N, K / 2) bytes -> (M, N). See `nvfp4`."""
    return _nvfp4_gemm(x.q, w.q, x.scale, w.scale, x.whole, w.whole, **epilogue._asdict())
