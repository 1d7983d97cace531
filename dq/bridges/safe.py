"""Safetensors files of others: plain weights, and ComfyUI's quantized layers, whose codes dq's formats hold.

    fp8       w = e4m3 or e5m2 · scale     fp8, fp8_e5m2/channel       X.scale_weight or X.weight_scale, one number
    int8      w = int8 · scale             int8/channel                one number, or one a row (out, 1)
    ConvRot   w = (int8 · scale) H         int8/channel, rotate 256    H: blocks of regular Hadamard matrices
    blocks    w = int8 · scale             decoded                     one number for 128 x 128

A layer X says what it is by X.comfy_quant (JSON as bytes), by `_quantization_metadata` of the file, or by its dtype.
 Stored activation scales (X.scale_input, X.input_scale) are left: dq's activations stay in floating point, or are
measured. https://github.com/Comfy-Org/ComfyUI/blob/master/QUANTIZATION.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dq.bridges.stored import Plain, Stored, checked_scale, linear
from dq.disk import parse
from dq.errors import DQError
from dq.host import header
from dq.layers import hadamard
from dq.plan import LayerPlan

SCALES = ("scale_weight", "weight_scale")
BESIDE = (*SCALES, "scale_input", "input_scale", "comfy_quant", "weight_scale_2", "pre_quant_scale")
MARKER = "scaled_fp8"
FORMS = {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8_e5m2", torch.int8: "int8"}
READ = ("", "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
METADATA = "_quantization_metadata"
MOST_MARK = 65536  # bytes of a layer's JSON


class File:
    """A safetensors file, mapped. metadata: text -> text; names: shape of every tensor that is no scale or mark."""

    def __init__(self, path: str | Path):
        """DQError for a file that is missing or damaged; no tensor is read."""
        self.path = Path(path)
        entries, self.metadata = header.read(path)
        try:
            self._file = safe_open(str(path), "pt")
        except Exception as error:  # of the library's own kind, for what `header` lets through
            raise DQError(f"weights file {str(path)!r} is damaged: {error}; copy it again") from None
        self._all = {name: entry.shape for name, entry in entries.items()}
        self.names = {name: shape for name, shape in self._all.items() if not _is_beside(name)}
        self._marks = self._read_marks()

    def _read_marks(self) -> dict[str, dict[str, Any]]:
        """What the file says of its quantized layers."""
        try:
            data = parse(self.metadata.get(METADATA, "{}"))
            found = data["layers"] if isinstance(data, dict) and "layers" in data else {}
            for name in self._all:
                if name.endswith(".comfy_quant") and 0 < self.tensor(name).numel() <= MOST_MARK:
                    found[name.removesuffix(".comfy_quant")] = parse(bytes(self.tensor(name).flatten().tolist()))
            if not all(isinstance(mark, dict) for mark in found.values()):
                raise ValueError("a layer is no object")
        except (ValueError, AttributeError, TypeError) as error:
            raise DQError(
                f"file {str(self.path)!r}: what it says of its quantization is no JSON ({error}); download it again"
            ) from None
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is."""
        return self._file.get_tensor(name)

    def stored(self, name: str) -> Stored:
        """A tensor as it lies in the file. DQError for a quantization that is not read here."""
        values, home = self.tensor(name), name.removesuffix(".weight")
        mark = self._marks.get(home, {}) if name.endswith(".weight") else {}
        kind = mark.get("format", "")
        if kind not in READ:
            expected = ", ".join(READ[1:])
            raise DQError(f"layer {home!r} is {str(kind)[:40]!r} of ComfyUI, expected one of {expected}")
        if values.dtype is torch.uint8 and kind.startswith("float8"):
            values = values.view(torch.float8_e4m3fn if kind.endswith("e4m3fn") else torch.float8_e5m2)
        scale = next((self.tensor(f"{home}.{key}") for key in SCALES if f"{home}.{key}" in self._all), None)
        if values.dtype in FORMS and name.endswith(".weight"):
            return Scaled(values, _scale_of(home, values, scale), _turn_of(home, values, mark))
        if not values.is_floating_point() or (scale is not None and name.endswith(".weight")):
            raise DQError(
                f"tensor {name!r} holds {values.dtype}, expected floating point; is its layer of another tool?"
            )
        return Plain(values)


def _is_beside(name: str) -> bool:
    return name.rpartition(".")[2] in (*BESIDE, MARKER)


def _scale_of(home: str, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 (rows, 1) or (row blocks, column blocks). DQError for another shape, and for scales that are none."""
    if scale is None and values.dtype is torch.int8:
        raise DQError(f"layer {home!r} has int8 weights and no scale; download the file again")
    rows = values.shape[0] if values.dim() else 1
    scale = checked_scale(home, torch.ones(()) if scale is None else scale)
    if not (scale > 0).all():
        raise DQError(f"layer {home!r} has scales of zero or below, expected positive ones; download the file again")
    if scale.numel() in (1, rows):
        return scale.reshape(-1, 1).expand(rows, 1)
    if scale.dim() == 2 and values.dim() == 2 and not any(map(int.__mod__, values.shape, scale.shape)):
        return scale
    raise DQError(
        f"layer {home!r} has scales {tuple(scale.shape)} for weights {tuple(values.shape)}; download it again"
    )


def _turn_of(home: str, values: torch.Tensor, mark: dict[str, Any]) -> int:
    """Order of the Hadamard blocks that the weight was rotated with, 0 for none."""
    if mark.get("convrot") is not True:
        return 0
    order = mark.get("convrot_groupsize", 256)
    if type(order) is not int or values.dim() != 2 or not is_regular(order) or values.shape[1] % order:
        raise DQError(f"layer {home!r}: ConvRot of {str(order)[:20]} for weights {tuple(values.shape)}")
    return order


def is_regular(order: int) -> bool:
    """Whether an order is a power of 4, whose matrix is the one that ConvRot has."""
    return order >= 4 and order & (order - 1) == 0 and order.bit_length() % 2 == 1


@dataclass(frozen=True)
class Scaled(Stored):
    """Codes with a scale a row or a block. rotate: order of the Hadamard blocks, 0 for none."""

    codes: torch.Tensor
    scale: torch.Tensor
    rotate: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.codes.shape)

    @property
    def by_row(self) -> bool:
        return self.scale.shape == (self.shape[0] if self.shape else 1, 1)

    @property
    def kept(self) -> LayerPlan | None:  # type: ignore[override]
        fits = len(self.shape) == 2 and self.by_row
        return linear(f"{FORMS[self.codes.dtype]}/channel", self.shape, rotate=self.rotate) if fits else None

    def dense(self) -> torch.Tensor:
        scale = self.scale
        if not self.by_row:
            for axis in (0, 1):
                scale = scale.repeat_interleave(self.shape[axis] // scale.shape[axis], axis)
        values = self.codes.float().reshape(len(self.scale) if self.by_row else len(scale), -1) * scale
        return hadamard.rotate(values, self.rotate, 1, inverse=True) if self.rotate else values.reshape(self.shape)

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        if self.codes.dtype is not torch.int8 and not self.codes.float().isfinite().all():
            raise DQError(f"layer {name!r}: the file holds weights of NaN or Inf; download it again")
        return {"weight": self.codes.contiguous().view(torch.int8).clone(), "scale": self.scale.contiguous()}

    def rows(self, first: int, last: int) -> Stored:
        if not self.by_row:
            return Plain(self.dense()[first:last])
        return Scaled(self.codes[first:last], self.scale[first:last], self.rotate)

    def release(self) -> None:
        Plain(self.codes).release()
