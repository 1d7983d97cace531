"""Weights without rounded activations, as torch ops with fake implementations: the fused product, and decoding alone.

    dq::cpu_weight_only   x (rows, columns) -> y (rows, outputs), weights decoded in cache
    dq::cpu_decode        packed weights -> (outputs, columns) in floating point

Everything after the scale is passed by name. Structures mirror native/arguments.h field by field.
"""

from __future__ import annotations

import torch

from dq.kernels.cpu import ops
from dq.kernels.cpu.ops import DTYPES, run, scale_stride, structure

WeightOnly = structure(
    "WeightOnly",
    pointer="x weight weight_scale weight_zero bias low up y",
    int64="rows columns outputs row_bytes rank weight_group weight_scale_stride",
    int32="dtype weight_bits gelu",
)
Decode = structure(
    "Decode",
    pointer="weight weight_scale weight_zero y",
    int64="rows columns row_bytes weight_group weight_scale_stride",
    int32="dtype weight_bits",
)

_ops = torch.library.Library("dq", "FRAGMENT")
_ops.define(
    "cpu_weight_only(Tensor x, Tensor weight, Tensor scale, *, Tensor? zero=None, Tensor? bias=None, "
    "Tensor? low=None, Tensor? up=None, int weight_bits, int weight_group=0, bool gelu=False) -> Tensor"
)
_ops.define(
    "cpu_decode(Tensor weight, Tensor scale, *, Tensor? zero=None, SymInt columns, int weight_bits, "
    "int weight_group=0, ScalarType dtype) -> Tensor"
)


def _weight_only(
    x, weight, scale, *, zero=None, bias=None, low=None, up=None, weight_bits, weight_group=0, gelu=False
):  # fmt: skip
    """y = f(x W^T + low up^T + bias), f a tanh GELU or nothing.

    x        (rows, columns) fp32, bf16 or fp16; y (rows, outputs) has its dtype, and so have bias (outputs,), low
             (rows, rank) and up (outputs, rank)
    weight   int8 (outputs, bytes): packed codes of `weight_bits`, 2 to 8
    scale    fp32 (outputs | 1, groups): groups of `weight_group` columns, a multiple of 4, or 0 for one group
    zero     int8, as scale: zero points of affine codes
    """
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    arguments = WeightOnly(
        rows=x.shape[0], columns=x.shape[1], outputs=weight.shape[0], row_bytes=weight.shape[1],
        rank=0 if up is None else up.shape[1], weight_group=weight_group, weight_scale_stride=scale_stride(scale),
        dtype=DTYPES[x.dtype], weight_bits=weight_bits, gelu=gelu,
    )  # fmt: skip
    tensors = {"x": x, "weight": weight, "weight_scale": scale, "weight_zero": zero, "bias": bias, "y": y}
    run(f"dq_weightonly_{ops.level()}", arguments, tensors | {"low": low, "up": up})
    return y


def _decode(weight, scale, *, zero=None, columns, weight_bits, weight_group=0, dtype):
    """The weight itself (outputs, columns), in fp32 rounded once, in bf16 and fp16 once more; tensors as above."""
    y = torch.empty(weight.shape[0], columns, dtype=dtype)
    arguments = Decode(
        rows=weight.shape[0], columns=columns, row_bytes=weight.shape[1], weight_group=weight_group,
        weight_scale_stride=scale_stride(scale), dtype=DTYPES[dtype], weight_bits=weight_bits,
    )  # fmt: skip
    run(f"dq_decode_{ops.level()}", arguments, {"weight": weight, "weight_scale": scale, "weight_zero": zero, "y": y})
    return y


def _fake_weight_only(x, weight, scale, **rest):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_decode(weight, scale, *, columns, dtype, **rest):
    return weight.new_empty(weight.shape[0], columns, dtype=dtype)


for _name, _kernel, _fake in (
    ("cpu_weight_only", _weight_only, _fake_weight_only),
    ("cpu_decode", _decode, _fake_decode),
):
    _ops.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dq::{_name}", _fake, lib=_ops)
