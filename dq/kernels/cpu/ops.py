"""Native kernels as torch ops with fake implementations, so that eager and `torch.compile` call them alike.

    dq::cpu_linear   x (rows, columns) -> y (rows, outputs), integer dot products
    dq::cpu_conv     x (batch, channels, *space) -> y, integer dot products
    dq::cpu_thin     x (few rows, columns) -> y, weight-only

Structures mirror native/{linear,conv,thin}.cpp field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from dq.kernels.cpu.library import library
from dq.kernels.reference import out_sizes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORMS = {"": 0, "layer": 1, "rms": 2}
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}


def _structure(name: str, **fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from {type: "field names"}; an array type is written like int64x3."""
    types = {"pointer": ctypes.c_void_p, "int64": ctypes.c_int64, "int32": ctypes.c_int32, "float": ctypes.c_float}
    types["int64x3"] = ctypes.c_int64 * 3
    rows = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": rows})


_Linear = _structure(
    "_Linear",
    pointer="x mod_scale mod_shift smooth act_scale weight weight_scale bias low up gate residual y",
    int64="rows columns outputs row_bytes rank rows_per_batch mod_stride weight_group act_group "
    "weight_scale_stride key",
    int32="dtype norm weight_bits act_low act_high act_affine gelu",
    float="eps shift",
)
_Conv = _structure(
    "_Conv",
    pointer="x weight weight_scale bias act_scale y",
    int64="batch channels outputs row_bytes weight_scale_stride",
    int64x3="size kernel step pad gap out",
    int32="dtype weight_bits act_low act_high act_affine channels_last",
)
_Thin = _structure(
    "_Thin",
    pointer="x weight weight_scale bias y",
    int64="rows columns outputs row_bytes weight_group weight_scale_stride",
    int32="dtype weight_bits",
)


def _call(name: str, arguments: ctypes.Structure, tensors: Mapping[str, torch.Tensor | None]) -> None:
    for field, tensor in tensors.items():
        setattr(arguments, field, None if tensor is None else tensor.data_ptr())
    if getattr(library(), name)(ctypes.byref(arguments)):
        raise MemoryError(f"{name}: no memory for its workspace")


_ops = torch.library.Library("dq", "FRAGMENT")
_ops.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? act_scale, Tensor? low, Tensor? up, "
    "int bits, int weight_group, int act_group, int[] act, float shift, bool gelu, Tensor? residual, Tensor? gate, "
    "str norm, float eps, Tensor? mod_scale, Tensor? mod_shift, int key=0) -> Tensor"
)
_ops.define(
    "cpu_conv(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? act_scale, int bits, int[] act, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
_ops.define("cpu_thin(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int bits, int weight_group) -> Tensor")


def _linear(
    x, weight, scale, bias, act_scale, low, up, bits, weight_group, act_group, act, shift, gelu, residual, gate,
    norm, eps, mod_scale, mod_shift, key=0,
):  # fmt: skip
    """x is normalized, times mod_scale plus mod_shift, rounded; y is gate times the product plus residual.

    act: [least code, largest code, affine]. gate, mod_scale, mod_shift: (batch | 1, channels). key: a
    name for the rounded x, or 0; the codes of this thread's last call are used again under the same one.
    """
    rows, columns, outputs = x.shape[0], x.shape[1], weight.shape[0]
    x = x.contiguous()
    y = x.new_empty(rows, outputs)
    batch, (gate, mod_scale, mod_shift) = _samples(gate, mod_scale, mod_shift)
    residual = None if residual is None else residual.contiguous()
    low_code, high_code, affine = act
    arguments = _Linear(
        rows=rows, columns=columns, outputs=outputs, row_bytes=weight.shape[1], rank=0 if up is None else up.shape[1],
        rows_per_batch=max(rows // batch, 1), mod_stride=columns,
        weight_group=weight_group, act_group=act_group, weight_scale_stride=_scale_stride(scale),
        dtype=DTYPES[x.dtype], norm=NORMS[norm], weight_bits=bits, act_low=low_code, act_high=high_code,
        act_affine=affine, gelu=gelu, eps=eps, shift=shift, key=key,
    )  # fmt: skip
    tensors = {"x": x, "weight": weight, "weight_scale": scale, "bias": bias, "act_scale": act_scale, "y": y}
    tensors |= {"low": low, "up": up, "gate": gate, "residual": residual}
    _call("dq_linear", arguments, tensors | {"mod_scale": mod_scale, "mod_shift": mod_shift})
    return y


def _samples(*values: torch.Tensor | None) -> tuple[int, list[torch.Tensor | None]]:
    """-> how many samples there are, and each value (samples | 1, channels) with a row for every sample."""
    count = max((value.shape[0] for value in values if value is not None), default=1)
    return count, [None if value is None else value.expand(count, -1).contiguous() for value in values]


def _scale_stride(scale: torch.Tensor) -> int:
    return 0 if scale.shape[0] == 1 else scale.shape[1]


def _conv(x, weight, scale, bias, act_scale, bits, act, kernel, stride, padding, dilation):
    """Geometry lists have one entry per spatial dimension, missing leading ones are 1 (padding 0)."""
    last = _is_channels_last(x)
    x = x if last else x.contiguous()
    out = out_sizes(x.shape[2:], kernel, (stride, padding, dilation))
    y = x.new_empty((x.shape[0], weight.shape[0], *out))
    y = y.contiguous(memory_format=MEMORY[x.dim()]) if last else y
    lead = [1] * (3 - len(kernel))
    three = lambda values, fill=1: (ctypes.c_int64 * 3)(*[fill] * len(lead), *values)  # noqa: E731
    low_code, high_code, affine = act
    arguments = _Conv(
        batch=x.shape[0], channels=x.shape[1], outputs=weight.shape[0], row_bytes=weight.shape[1],
        weight_scale_stride=_scale_stride(scale), size=three(x.shape[2:]), kernel=three(kernel), step=three(stride),
        pad=three(padding, 0), gap=three(dilation), out=three(out), dtype=DTYPES[x.dtype], weight_bits=bits,
        act_low=low_code, act_high=high_code, act_affine=affine, channels_last=last,
    )  # fmt: skip
    tensors = {"x": x, "weight": weight, "weight_scale": scale, "bias": bias, "act_scale": act_scale, "y": y}
    _call("dq_conv", arguments, tensors)
    return y


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() in MEMORY and not x.is_contiguous() and x.is_contiguous(memory_format=MEMORY[x.dim()])


def _thin(x, weight, scale, bias, bits, weight_group):
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    arguments = _Thin(
        rows=x.shape[0], columns=x.shape[1], outputs=weight.shape[0], row_bytes=weight.shape[1],
        weight_group=weight_group, weight_scale_stride=_scale_stride(scale), dtype=DTYPES[x.dtype], weight_bits=bits,
    )  # fmt: skip
    _call("dq_thin", arguments, {"x": x, "weight": weight, "weight_scale": scale, "bias": bias, "y": y})
    return y


def _fake_rows(x, weight, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_conv(x, weight, scale, bias, act_scale, bits, act, kernel, stride, padding, dilation):
    y = x.new_empty((x.shape[0], weight.shape[0], *out_sizes(x.shape[2:], kernel, (stride, padding, dilation))))
    return y.contiguous(memory_format=MEMORY[x.dim()]) if _is_channels_last(x) else y


for _name, _run, _fake in (
    ("cpu_linear", _linear, _fake_rows),
    ("cpu_conv", _conv, _fake_conv),
    ("cpu_thin", _thin, _fake_rows),
):
    _ops.impl(_name, _run, "CPU")
    torch.library.register_fake(f"dq::{_name}", _fake, lib=_ops)
