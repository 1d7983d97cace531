"""Checkpoints of diffusers' `nunchaku_lite` quantizer, as dq's own layers: codes and scales as they are.

    svdq_w4a4   int4/group:64 x int4/group:64, smooth = 1 / smooth_factor, branch (down smooth_factor, up)
    awq_w4a16   int4/group:64 where its zeros are −8 scales, else int4m/group:64

The inverse of `dq.export.nunchaku_lite`, whose module says how the bytes lie (`dq.kernels.nunchaku.layout`). There the
branch gets the input as it came, in dq the smoothed one: `down` is rounded once more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq import formats
from dq.bridges import safe
from dq.bridges.stored import Plain, Stored, checked_scale, linear
from dq.disk import read_json
from dq.errors import DQError
from dq.formats.base import unpack_bits
from dq.host import saved
from dq.kernels.nunchaku import layout
from dq.plan import LayerPlan, TensorPlan

METHOD, FORM = "nunchaku_lite", "int4/group:64"
OPS = ("svdq_w4a4", "awq_w4a16")


def is_one(folder: Path) -> bool:
    """Whether a folder is a model that diffusers' `nunchaku_lite` quantizer loads."""
    path = folder / saved.MODEL
    config = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(config, dict) and config.get("quant_method") == METHOD


class File:
    """The weights of one model, and its config. DQError for what is not the int4 profile of the quantizer."""

    def __init__(self, folder: Path):
        self.path = folder
        entries = read_json(folder / saved.MODEL)
        given = entries.pop("quantization_config")
        self.metadata = {"dq.config": json.dumps(entries)}
        weights = sorted(folder.glob("*.safetensors"))
        if len(weights) != 1:
            raise DQError(f"{str(folder)!r} holds {len(weights)} weights files, expected one of {METHOD}")
        self._file = safe.File(weights[0])
        self._ops = {name: op for op in OPS for name in _targets(given, op, str(folder))}
        there = self._file.names
        self.names = {name: shape for name, shape in there.items() if name.rpartition(".")[0] not in self._ops}
        for home, op in self._ops.items():
            self.names |= self._own(home, op, there)

    def _own(self, home: str, op: str, there: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Full-precision shapes of a layer's tensors. DQError when what it is packed in is missing or odd."""
        packed, scales = there.get(f"{home}.qweight", ()), there.get(f"{home}.wscales", ())
        if len(packed) != 2 or len(scales) != 2:
            raise DQError(f"layer {home!r} of {str(self.path)!r} lacks its qweight or wscales; download it again")
        rows, columns = scales[1], scales[0] * layout.GROUP
        wanted = (rows, columns // 2) if op == OPS[0] else (rows // layout.ROWS, columns // 2)
        if packed != wanted or (op == OPS[0] and (rows % layout.BLOCK or columns % layout.BLOCK)):
            raise DQError(
                f"layer {home!r}: qweight is {packed}, its scales {scales} go with {wanted}; download it again"
            )
        bias = {f"{home}.bias": (rows,)} if f"{home}.bias" in there else {}
        return {f"{home}.weight": (rows, columns)} | bias

    def stored(self, name: str) -> Stored:
        home, _, key = name.rpartition(".")
        if home not in self._ops:
            return self._file.stored(name)
        if key == "bias":
            values = self._file.tensor(name)
            return Plain(layout.vector_back(values) if self._ops[home] == OPS[0] else values)
        if self._ops[home] == OPS[0]:
            return LowRank(*(self._file.tensor(f"{home}.{key}") for key in LOW_RANK), shape=self.names[name])
        return WeightOnly(*(self._file.tensor(f"{home}.{key}") for key in WEIGHT_ONLY), shape=self.names[name])


def _targets(config: dict[str, Any], op: str, place: str) -> list[str]:
    given = config.get(op)
    if given is None:
        return []
    known = isinstance(given, dict) and given.get("precision") == "int4" and given.get("group_size") == layout.GROUP
    targets = given.get("targets") if known else None
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise DQError(f"{place!r}: {op} is not int4 in groups of {layout.GROUP} of named layers, which alone are read")
    return targets


LOW_RANK = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
WEIGHT_ONLY = ("qweight", "wscales", "wzeros")


@dataclass(frozen=True)
class LowRank(Stored):
    """svdq_w4a4: 4-bit weights and activations, smoothing, a branch."""

    qweight: torch.Tensor
    wscales: torch.Tensor
    smooth_factor: torch.Tensor
    proj_down: torch.Tensor
    proj_up: torch.Tensor
    shape: tuple[int, ...]

    @property
    def kept(self) -> LayerPlan | None:  # type: ignore[override]
        more = {"act": TensorPlan.parse(FORM), "smooth": True, "rank": self.proj_up.shape[1]}
        return linear(FORM, self.shape, **more)

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        rows, columns = self.shape
        blocks, groups = rows // layout.BLOCK, columns // layout.GROUP
        factor = checked_scale(name, layout.vector_back(self.smooth_factor))
        scale = checked_scale(name, layout.scale_back(self.wscales.reshape(blocks, groups, 8, 4, 2, 2)))
        if not ((factor != 0).all() and (scale > 0).all()):
            raise DQError(f"layer {name!r} holds smoothing of zero or scales of zero or below; download it again")
        weight = layout.weight_back(self.qweight.view(torch.int8).reshape(blocks, groups, 8, 8, 4, 16))
        down = layout.down_back(self.proj_down).float() * factor
        up = layout.up_back(self.proj_up)
        return {
            "weight": weight,
            "scale": scale,
            "smooth": 1 / factor,
            "proj_down": down.to(self.proj_down.dtype),
            "proj_up": up,
        }

    def dense(self) -> torch.Tensor:
        own = self.packed("weight")
        codes = unpack_bits(own["weight"], 4, self.shape[1], signed=True)
        values = codes.float() * own["scale"].repeat_interleave(layout.GROUP, 1)
        return (values + own["proj_up"].float() @ own["proj_down"].float()) * own["smooth"]

    def rows(self, first: int, last: int) -> Stored:
        return Plain(self.dense()[first:last])


@dataclass(frozen=True)
class WeightOnly(Stored):
    """awq_w4a16: 4-bit weights with a scale and the value of code 0 for each group."""

    qweight: torch.Tensor
    wscales: torch.Tensor
    wzeros: torch.Tensor
    shape: tuple[int, ...]

    @property
    def _symmetric(self) -> bool:
        return bool((self.wzeros == -layout.ZERO * self.wscales).all())

    @property
    def kept(self) -> LayerPlan | None:  # type: ignore[override]
        return linear(FORM if self._symmetric else FORM.replace("int4", "int4m"), self.shape)

    def packed(self, name: str) -> dict[str, torch.Tensor]:
        scale = checked_scale(name, self.wscales.T.contiguous())
        if not (scale > 0).all():
            raise DQError(f"layer {name!r} holds scales of zero or below; download it again")
        made = {"weight": formats.get("int4").pack(layout.words_back(self.qweight.view(torch.int32))), "scale": scale}
        return made if self._symmetric else made | {"zero": checked_scale(name, self.wzeros.T.contiguous())}

    def dense(self) -> torch.Tensor:
        codes = layout.words_back(self.qweight.view(torch.int32)).float() + layout.ZERO
        scale, zero = (each.T.float().repeat_interleave(layout.GROUP, 1) for each in (self.wscales, self.wzeros))
        return codes * scale + zero

    def rows(self, first: int, last: int) -> Stored:
        return Plain(self.dense()[first:last])
