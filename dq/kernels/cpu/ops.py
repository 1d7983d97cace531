"""Native kernels as torch ops with fake implementations, so that eager and `torch.compile` call them alike.

    dq::cpu_linear   x (rows, columns) -> y (rows, outputs), integer dot products
    dq::cpu_conv     x (batch, channels, *space) -> y, integer dot products

Weight-only layers have theirs in weightonly.py. Everything after the weight and its scale is passed by name.
Structures mirror those of native/ field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from dq.kernels.cpu.library import level, library
from dq.kernels.reference import out_sizes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}


def structure(name: str, **fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from {type: "field names"}; an array type is written like int64x3."""
    types = {"pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "int32": ctypes.c_int32, "float": ctypes.c_float}
    types |= {f"int64x{count}": ctypes.c_int64 * count for count in (3, 4)}
    rows = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": rows})


Linear = structure(
    "Linear",
    pointer="x act_scale weight weight_scale weight_zero multiplier bias low up y",
    int64="rows columns outputs row_bytes rank weight_group act_group multiplier_group weight_scale_stride",
    int32="dtype weight_bits act_bits act_affine gelu",
    float="shift clip",
)
Conv = structure(
    "Conv",
    pointer="x weight weight_scale bias act_scale y",
    int64="batch channels outputs row_bytes weight_scale_stride",
    int64x3="size kernel step pad gap out",
    int32="dtype weight_bits act_bits act_affine channels_last per_pixel",
)


def call(name: str, arguments: ctypes.Structure, tensors: Mapping[str, torch.Tensor | None]) -> int:
    """Run a native function on a structure and the tensors its pointers stand for; -> what it returns, 0 if it ran."""
    for field, tensor in tensors.items():
        setattr(arguments, field, None if tensor is None else tensor.data_ptr())
    return getattr(library(), name)(ctypes.byref(arguments))


def run(name: str, arguments: ctypes.Structure, tensors: Mapping[str, torch.Tensor | None]) -> None:
    if call(name, arguments, tensors):
        raise MemoryError(f"{name}: no memory for its workspace")


_ops = torch.library.Library("dq", "FRAGMENT")
_ops.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor scale, *, Tensor? act_scale=None, Tensor? zero=None, "
    "Tensor? multiplier=None, Tensor? bias=None, Tensor? low=None, Tensor? up=None, int weight_bits, int act_bits, "
    "bool act_affine=False, int weight_group=0, int act_group=0, int multiplier_group=0, float shift=0, "
    "float clip=1, bool gelu=False) -> Tensor"
)
_ops.define(
    "cpu_conv(Tensor x, Tensor weight, Tensor scale, *, Tensor? act_scale=None, Tensor? bias=None, int weight_bits, "
    "int act_bits, bool act_affine=False, bool per_pixel=False, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor"
)


def _linear(
    x, weight, scale, *, act_scale=None, zero=None, multiplier=None, bias=None, low=None, up=None, weight_bits,
    act_bits, act_affine=False, weight_group=0, act_group=0, multiplier_group=0, shift=0.0, clip=1.0,
    gelu=False,
):  # fmt: skip
    """y = f(Q(x + shift) W^T + low up^T + bias), f a tanh GELU or nothing.

    x           (rows, columns) fp32, bf16 or fp16; y (rows, outputs) has its dtype, and so has bias (outputs,)
    weight      int8 (outputs, bytes): packed codes of `weight_bits`, 2 to 8
    scale       fp32 (outputs | 1, groups): groups of `weight_group` columns, 0 for one group
    zero        int8, as scale: zero points of affine codes
    act_scale   fp32 (1,): the stored scale of x; None: one is measured per row and group of `act_group` columns, 0 for
                one group
    act_bits    of the codes of x, with a zero point where `act_affine`
    clip        share of the measured range of x that codes cover; values beyond saturate
    low, up     (rows, rank) and (outputs, rank) bf16, rank even
    multiplier  int8 (outputs, groups) of two-level scales, codes are of 4 bits then: in groups of `multiplier_group`
                columns, a multiple of 32, which act_group is if it is not 0
    """
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    arguments = Linear(
        rows=x.shape[0], columns=x.shape[1], outputs=weight.shape[0], row_bytes=weight.shape[1],
        rank=0 if up is None else up.shape[1], weight_group=weight_group, act_group=act_group,
        multiplier_group=multiplier_group, weight_scale_stride=scale_stride(scale), dtype=DTYPES[x.dtype],
        weight_bits=weight_bits, act_bits=act_bits, act_affine=act_affine, gelu=gelu, shift=shift, clip=clip,
    )  # fmt: skip
    tensors = {"x": x, "act_scale": act_scale, "weight": weight, "weight_scale": scale, "bias": bias, "y": y}
    tensors |= {"weight_zero": zero, "multiplier": multiplier, "low": low, "up": up}
    run(f"dq_linear_{level()}", arguments, tensors)
    return y


def scale_stride(scale: torch.Tensor) -> int:
    return 0 if scale.shape[0] == 1 else scale.shape[1]


def _conv(
    x, weight, scale, *, act_scale=None, bias=None, weight_bits, act_bits, act_affine=False, per_pixel=False,
    kernel_size, stride, padding, dilation,
):  # fmt: skip
    """y = Q(x) * W + bias, with one activation scale a sample; tensors as `_linear` has them, weight (outputs, bytes).

    per_pixel   one activation scale a pixel instead; kernel and stride are 1 then, and nothing is padded
    kernel_size, stride, padding, dilation   one entry per spatial dimension of x (batch, channels, *space)
    """
    last = _is_channels_last(x)
    x = x if last else x.contiguous()
    out = out_sizes(x.shape[2:], kernel_size, (stride, padding, dilation))
    if per_pixel and list(out) != list(x.shape[2:]):
        raise ValueError(
            f"a scale a pixel needs output pixels that are input pixels, got {list(x.shape[2:])} to {out}"
        )
    y = x.new_empty((x.shape[0], weight.shape[0], *out))
    y = y.contiguous(memory_format=MEMORY[x.dim()]) if last else y
    arguments = Conv(
        batch=x.shape[0], channels=x.shape[1], outputs=weight.shape[0], row_bytes=weight.shape[1],
        weight_scale_stride=scale_stride(scale), size=_three(x.shape[2:]), kernel=_three(kernel_size),
        step=_three(stride), pad=_three(padding, 0), gap=_three(dilation), out=_three(out), dtype=DTYPES[x.dtype],
        weight_bits=weight_bits, act_bits=act_bits, act_affine=act_affine, channels_last=last,
        per_pixel=per_pixel,
    )  # fmt: skip
    tensors = {"x": x, "weight": weight, "weight_scale": scale, "bias": bias, "act_scale": act_scale, "y": y}
    run(f"dq_conv_{level()}", arguments, tensors)
    return y


def _three(values: Sequence[int], missing: int = 1) -> ctypes.Array:
    """Sizes of up to three dimensions, the leading ones filled up."""
    return (ctypes.c_int64 * 3)(*[missing] * (3 - len(values)), *values)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() in MEMORY and not x.is_contiguous() and x.is_contiguous(memory_format=MEMORY[x.dim()])


def _fake_rows(x, weight, scale, **rest):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_conv(x, weight, scale, *, kernel_size, stride, padding, dilation, **rest):
    y = x.new_empty((x.shape[0], weight.shape[0], *out_sizes(x.shape[2:], kernel_size, (stride, padding, dilation))))
    return y.contiguous(memory_format=MEMORY[x.dim()]) if _is_channels_last(x) else y


for _name, _kernel, _fake in (
    ("cpu_linear", _linear, _fake_rows),
    ("cpu_conv", _conv, _fake_conv),
):
    _ops.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dq::{_name}", _fake, lib=_ops)
