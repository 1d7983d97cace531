"""Scaled dot product attention on dq's CPU kernels, called like torch's and falling back to it.

    o = softmax(q k^T scale + mask) v        q (batch, heads, rows, width), k and v (batch, heads, keys, width)

Two kinds of products: of floats, as exact as torch's own attention in the dtype of the inputs, and of integers, with
the mean key taken off first (SageAttention, arXiv 2410.02367) and values scaled per column.

    floats     in fp32; bf16 inputs in bf16 with fp32 sums, where the processor has units for it
    integers   8-bit codes, multiplied as bytes, or with plain AVX2 in 16 bits, 1.2 to 1.6 times as fast as fp32

Integers round p to 8 bits under the largest score of each 512 keys, where the paper keeps p in 16: 1 to 2 % relative
error of the output on random normal data. Rows whose keys are all masked by -inf give zeros.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from dq.kernels.cpu.library import LEVELS, level, missing
from dq.kernels.cpu.ops import DTYPES, call, structure

WIDEST = 256  # columns of a head
# Where torch's attention is faster, measured in one thread. Our call begins with 14 us in Python, torch's takes 4 in
# all: with AVX2, 8 heads of 32 with 64 x 64 tokens in fp32 run at 1.05 of torch's speed, 4 heads at 0.81; with AVX512
# half the size at 0.93. Dtypes of 16 bits, which torch converts, halve the size from which ours is faster, with AVX512
# twice.
FEWEST_PRODUCTS = 1 << 20  # batch x heads x rows x keys x width
# Keys are packed before the first row: with AVX2, 1024 fp32 keys of 64 run at 0.40 for one row and 0.77 for 8, 2048 of
# 40 at 0.95 for 12; with AVX512 at 0.53 for one and 1.0 from 2 on. Int8, which rounds keys too: with AVX512 at 0.37
# for one, 1.04 for 8. Without int8, 16-bit inputs are as fast as torch's at any number of rows.
FEWEST_ROWS = {False: 24, True: 8}  # by whether vectors have 512 bits
PROBLEMS = {1: "the dtype", 2: "the shape", 3: "the mask's strides", 4: "the size: no memory"}


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return missing()


def unit(dtype: torch.dtype, int8: bool) -> str:
    """What the kernel of this machine multiplies for inputs of a dtype: "int8", "bf16" or "fp32"."""
    if int8:
        return "int8"
    return "bf16" if dtype is torch.bfloat16 and level() == LEVELS[-1] else "fp32"


def why_not(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False, int8=False):
    """None when dq's kernel computes this call of attention; else why torch does, in one line."""
    tensors = (query, key, value)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"dq's CPU attention does not run on {query.device.type}"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return "query, key and value differ in dtype"
    if query.dtype not in DTYPES:
        return f"dq's CPU attention computes in fp32, bf16 and fp16, not in {query.dtype}"
    if dropout_p or is_causal:
        return "dq's CPU attention has no dropout" if dropout_p else "dq's CPU attention has no causal mask"
    reason = _why_not_shapes(query, key, value) or _why_not_mask(query, attn_mask, key)
    reason = reason or _missing() or _why_not_sizes(query, key, int8)
    if (
        reason is None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (*tensors, attn_mask))
    ):
        return "dq's CPU attention has no gradient"
    return reason


def _why_not_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "dq's CPU attention takes (batch, heads, tokens, width)"
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3]:
        return "query, key and value differ in batch, heads or tokens"
    if not query.shape[3] == key.shape[3] == value.shape[3] or not 1 <= value.shape[3] <= WIDEST:
        return f"dq's CPU attention takes heads of one width up to {WIDEST}"
    return "there are no keys" if key.shape[2] == 0 else None


def _why_not_mask(query: torch.Tensor, mask: torch.Tensor | None, key: torch.Tensor) -> str | None:
    if mask is None:
        return None
    if mask.dim() > 4 or mask.device.type != "cpu" or not (mask.dtype is torch.bool or mask.is_floating_point()):
        return "the mask is neither boolean nor floating point, or has another shape or device"
    full = (*query.shape[:3], key.shape[2])[4 - mask.dim() :]
    if any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
        return "the mask does not spread over (batch, heads, rows, keys)"
    return None


@torch.compiler.assume_constant_result
def _wide() -> bool:
    return level().startswith("avx512")


def _why_not_sizes(query: torch.Tensor, key: torch.Tensor, int8: bool) -> str | None:
    """Torch's attention is faster here, and as exact."""
    wide, single = _wide(), query.dtype is torch.float32
    if query.numel() * key.shape[2] < FEWEST_PRODUCTS >> (not single) * (1 + wide):
        return "attention this small is faster on torch's"
    rows = FEWEST_ROWS[wide] if single or int8 else 1
    return f"attention of fewer than {rows} rows is faster on torch's" if query.shape[2] < rows else None


def sdpa(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, int8=False
) -> torch.Tensor:
    """F.scaled_dot_product_attention on dq's kernel where it can, else torch's own.

    int8  products of integers, otherwise of floats
    """
    if why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, int8) is None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.dq.cpu_attention(query, key, value, attn_mask, scale, int8)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


# --- the op ----------------------------------------------------------------------------------------------------------

Attention = structure(
    "Attention",
    pointer="q k v out mask",
    int64="batch heads rows keys width",
    int64x3="q_stride k_stride v_stride out_stride",
    int64x4="mask_stride",
    int32="dtype int8",
    float="scale",
)


def _empty(query: torch.Tensor) -> torch.Tensor:
    """Laid out like torch's result: tokens outside of heads, so that merging the heads is a view."""
    batch, heads, rows, width = query.shape
    return query.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _dense_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _additive(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask as fp32 to add, spread to `shape` without being repeated in memory."""
    for dim in range(mask.dim()):  # an expanded dimension is one row: converting it would write every copy
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    mask = mask.float()
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(shape)


def _attention(query, key, value, mask, scale: float, int8: bool) -> torch.Tensor:
    query, key, value = (_dense_last(tensor) for tensor in (query, key, value))
    (batch, heads, rows, width), keys = query.shape, key.shape[2]
    mask = None if mask is None else _additive(mask, (batch, heads, rows, keys))
    tensors = {"q": query, "k": key, "v": value, "out": _empty(query)}
    arguments = Attention(
        batch=batch, heads=heads, rows=rows, keys=keys, width=width, dtype=DTYPES[query.dtype], int8=int8, scale=scale,
        mask_stride=(ctypes.c_int64 * 4)(*(() if mask is None else mask.stride())),
    )  # fmt: skip
    for name, tensor in tensors.items():
        setattr(arguments, f"{name}_stride", (ctypes.c_int64 * 3)(*tensor.stride()[:3]))
    if problem := call(f"dq_attention_{level()}", arguments, tensors | {"mask": mask}):
        raise RuntimeError(f"dq_attention cannot take {PROBLEMS[problem]}: {tuple(query.shape)}, {keys} keys")
    return tensors["out"]


_ops = torch.library.Library("dq", "FRAGMENT")
_ops.define("cpu_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool int8) -> Tensor")
_ops.impl("cpu_attention", _attention, "CPU")
torch.library.register_fake("dq::cpu_attention", lambda query, *rest: _empty(query), lib=_ops)
