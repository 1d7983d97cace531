"""Models that another library quantized: their layers opened one at a time, so that dq can quantize them.

    diffusers' GGUF quantizer   GGUFParameter, in a GGUFLinear or alone: blocks as they lie in the file
    torchao                     a tensor subclass that decodes itself

While a model is open, each such linear is an empty one (on the meta device) and the weight is kept aside. What dq has
not taken at the end becomes an ordinary linear; on failure the model is as it was.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq.bridges import gguf
from dq.bridges.loading import put_codes
from dq.bridges.stored import Plain, Stored
from dq.host import base
from dq.layers import naming
from dq.model import pack_one
from dq.plan import LayerPlan

OF_MODEL = ("hf_quantizer", "is_quantized", "quantization_method")
Opened = dict[str, dict[str, Stored]]  # component -> layer -> its weight


@dataclass(frozen=True)
class Decoding(Stored):
    """A weight that decodes itself."""

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.weight.shape)

    def dense(self) -> torch.Tensor:
        return self.weight.dequantize().float()

    def rows(self, first: int, last: int) -> Stored:
        raise AssertionError("weights of a model are taken whole")


def foreign(value: Any) -> Stored | None:
    """A parameter of another library's as a file would have it; None for an ordinary one."""
    if value is None:
        return None
    theirs = sys.modules.get("diffusers.quantizers.gguf.utils")
    if theirs is not None and isinstance(value, theirs.GGUFParameter):
        kind = gguf.library().GGMLQuantizationType(value.quant_type)
        raw = value.as_tensor().detach().cpu().view(torch.uint8)
        if kind.name == "BF16":
            return Plain(raw.view(torch.bfloat16))
        width, size = gguf.library().GGML_QUANT_SIZES[kind]
        shape = (*raw.shape[:-1], raw.shape[-1] // size * width)
        return gguf.Quantized(kind.name, raw.reshape(-1, size), shape, shape)
    data = value.data if isinstance(value, nn.Parameter) else value
    return Decoding(data) if type(data).__module__.startswith("torchao.") else None


def is_foreign(model: nn.Module) -> bool:
    """Whether a model has weights of another library."""
    return any(foreign(value) is not None for value in _values(model))


def _values(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from module._parameters.values()
        yield from module._buffers.values()


@contextlib.contextmanager
def opened(models: Mapping[str, nn.Module], dense: bool) -> Iterator[Opened]:
    """Open models of other libraries; ordinary ones pass by. dense: decoded all at once, for what runs the model."""
    undo: list[Any] = []
    try:
        found = {part: _open(model, undo) for part, model in models.items() if is_foreign(model)}
        for part in found if dense else ():
            _close(models[part], found[part])
            found[part] = {}
        yield {part: stored for part, stored in found.items() if stored}
        for part, stored in found.items():
            _close(models[part], stored)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _open(model: Any, undo: list[Any]) -> dict[str, Stored]:
    """Put empty linears in place of another library's; its other parameters are decoded. -> weights by layer."""
    found = {}
    for name, module in list(model.named_modules()):
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            stored = foreign(value)
            if stored is None:
                continue
            if isinstance(module, nn.Linear) and key == "weight":
                found[name] = stored
            else:
                kept: Any = module._parameters if key in module._parameters else module._buffers
                undo.append(lambda kept=kept, key=key, value=value: kept.__setitem__(key, value))
                plain = stored.dense().to(_dtype(model))
                kept[key] = nn.Parameter(plain, requires_grad=False) if kept is module._parameters else plain
    for name in found:
        owner, key = naming.place(model, name)
        old: Any = owner._modules[key]
        fresh = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta", dtype=_dtype(old))
        if old.bias is not None:
            fresh.bias = nn.Parameter(old.bias.detach().to(_dtype(old)), requires_grad=False)
        owner._modules[key] = fresh.train(old.training)
        undo.append(lambda owner=owner, key=key, old=old: owner._modules.__setitem__(key, old))
    _disown(model, undo)
    return found


def _dtype(layer: Any) -> torch.dtype:
    """What a layer or model computes in."""
    for own in (
        getattr(layer, "compute_dtype", None),
        getattr(getattr(layer, "hf_quantizer", None), "compute_dtype", None),
    ):
        if isinstance(own, torch.dtype):
            return own
    weight: Any = getattr(layer, "weight", None)
    if weight is None or not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        return torch.float32
    return weight.dtype


def _disown(model: Any, undo: list[Any]) -> None:
    """Take the other library's marks off a model."""
    for key in OF_MODEL:
        if key in vars(model):
            before = vars(model)[key]
            undo.append(lambda key=key, before=before: setattr(model, key, before))
            delattr(model, key)
    if hasattr(model, "_internal_dict") and "quantization_config" in model._internal_dict:
        undo.append(lambda before=model._internal_dict: setattr(model, "_internal_dict", before))
        base.forget(model)


def _close(model: nn.Module, found: Mapping[str, Stored]) -> None:
    """Ordinary linears in place of those that are still empty."""
    for name, stored in found.items():
        layer: Any = naming.at(model, name)
        if type(layer) is nn.Linear and layer.weight.is_meta:
            weight = stored.dense().to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)


def pack(name: str, layer: nn.Module, stored: Stored, plan: LayerPlan, keeps: bool, dtype: torch.dtype) -> nn.Module:
    """A packed layer of a weight kept aside, by its codes or rounded anew; `layer`, the empty one, stays as it is."""
    home = nn.Module()
    home.layer = layer
    if keeps:
        return put_codes(home, "layer", plan, stored.packed(name), dtype)
    return pack_one(home, "layer", plan, stored.dense(), dtype)


def kept(found: Mapping[str, Stored]) -> dict[str, LayerPlan]:
    """Plans of the layers whose codes dq has a format for."""
    return {name: plan for name, stored in found.items() if (plan := stored.kept) is not None}
