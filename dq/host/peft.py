"""LoRA on packed layers: an adapter fuses into the layer's own low-rank branch, so nothing is quantized again.

    W x + s B (A x)  =  W' (x * smooth) + [up, s B] ([down; A / smooth] (x * smooth)) (rotated and permuted likewise)

A (r, in), B (out, r), s = alpha / r. Fusing appends r rows to `proj_down` and r columns to `proj_up`; unfusing drops
exactly those. Convolutions are the same: A is a kernel (r, in, *kernel), flattened, and B is a 1x1 convolution.
peft is optional, and imported by what only peft calls.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.host import dora
from dq.layers import CONV_KINDS, PACKED, hadamard, kind_of, naming

PACKED_TYPES = tuple(PACKED.values())


@torch.no_grad()
def widen(layer: Any, down: torch.Tensor, up: torch.Tensor) -> None:
    """Append a low-rank term up @ down, given for the layer's raw input, to a packed layer's branch.

    down (r, columns), up (rows, r), any float dtype. The plan's rank grows with the tensors.
    """
    device, dtype = layer.weight.device, layer.compute_dtype
    down, up = down.to(device).float(), up.to(device).float()
    if layer.smooth is not None:
        taps = layer.plan.columns // layer.smooth.numel()
        down = down / layer.smooth.float().repeat_interleave(taps)
    if layer.plan.rotate:
        down = hadamard.rotate(down.reshape(-1, *layer.plan.shape[1:]), layer.plan.rotate, 1).flatten(1)
    if layer.permute is not None:
        down = down.reshape(-1, *layer.plan.shape[1:]).index_select(1, layer.permute).flatten(1)
    down, up = down.to(dtype), up.to(dtype)
    if layer.proj_down is not None:
        down, up = torch.cat([layer.proj_down.data, down]), torch.cat([layer.proj_up.data, up], 1)
    _set_branch(layer, down, up)


@torch.no_grad()
def narrow(layer: Any, rank: int) -> None:
    """Keep the first `rank` columns of a packed layer's low-rank branch and drop the rest."""
    _set_branch(layer, layer.proj_down.data[:rank].clone(), layer.proj_up.data[:, :rank].clone())


def _set_branch(layer: Any, down: torch.Tensor, up: torch.Tensor) -> None:
    layer.plan = dataclasses.replace(layer.plan, rank=down.shape[0])
    if down.shape[0]:
        layer.put("proj_down", down)
        layer.put("proj_up", up)
    else:
        layer.proj_down = layer.proj_up = None
    layer.bind(layer.weight.device)


_Adapter: Any = object  # an adapter class of peft stands behind the mixins; peft is optional


class _FusesIntoBranch(_Adapter):
    """What the adapters of packed layers share; the base classes bring everything but merging."""

    fused_from: Any = None  # rank of the base layer before the first merged adapter
    plain: dict[str, torch.Tensor]  # its tensors, but the branch, as they were before the first adapter changed them

    def resolve_lora_variant(self, *, config, **kwargs):
        variant = super().resolve_lora_variant(config=config, **kwargs)
        return dora.OnDecoded(variant) if dora.reads_weights(variant) else variant

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the adapters to the base layer's low-rank branch. DQError for variants that are not low-rank sums."""
        from peft.tuners.tuners_utils import check_adapters_to_merge

        base = self.get_base_layer()
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        for name in names:
            self._refuse(name, base, safe_merge)
        for name in names:
            if not self.merged_adapters:
                self.fused_from, self.plain = base.plan.rank, {}
            down, up = self.lora_A[name].weight.detach().flatten(1), self.lora_B[name].weight.detach().flatten(1)
            up = up.float() * self.scaling[name]
            widen(base, down, up)
            bias = self.lora_B[name].bias.detach().float() * self.scaling[name] if self.lora_bias[name] else 0.0
            if self.lora_bias[name]:
                self._add(base, "bias", bias)
            if base.start_in is not None:
                self._add(base, "start_out", up @ (down.float() @ base.start_in.float().to(down.device)) + bias)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Drop every merged adapter from the base layer's low-rank branch."""
        if not self.merged_adapters:
            return
        base = self.get_base_layer()
        narrow(base, self.fused_from)
        for key, value in self.plain.items():
            base.put(key, value)
        self.merged_adapters.clear()
        self.fused_from, self.plain = None, {}

    def _add(self, base: Any, key: str, value: torch.Tensor) -> None:
        """Add to one of the base layer's tensors, and remember how it was."""
        before = getattr(base, key).data
        self.plain.setdefault(key, before)
        base.put(key, (before.float() + value.to(before.device)).to(before.dtype))

    def _refuse(self, name: str, base: nn.Module, safe: bool) -> None:
        if name in self.lora_variant:
            kind = type(getattr(self.lora_variant[name], "variant", self.lora_variant[name])).__name__
            raise DQError(f"adapter {name!r} is a {kind}, which is not a low-rank sum; use it without fusing")
        if self.lora_bias[name] and base.bias is None:
            raise DQError(f"adapter {name!r} has a bias and the layer it adapts has none; use it without fusing")
        if getattr(base, "groups", 1) > 1:
            raise DQError(f"adapter {name!r} adapts a grouped convolution; use it without fusing")
        factors = (self.lora_A[name].weight, self.lora_B[name].weight)
        if safe and not all(factor.isfinite().all() for factor in factors):
            raise DQError(f"adapter {name!r} holds NaN or Inf; it cannot be fused")


class _ConvAdapter(_FusesIntoBranch):
    def update_layer(self, *args, **kwargs) -> None:
        """peft reads shapes and types off the base layer; show it a plain convolution of the same geometry."""
        base = self.get_base_layer()
        plain = CONV_KINDS[base.plan.kind]
        geometry = (base.kernel_size, base.stride, base.padding, base.dilation)
        placed = {"device": base.weight.device, "dtype": base.compute_dtype}
        stand_in = plain(1, 1, *geometry, bias=base.bias is not None, **placed)
        stand_in.groups, self._kernel_dim = base.groups, len(base.plan.shape)
        vars(stand_in)[dora.STANDS_FOR] = base  # no child of it
        self._modules["base_layer"] = stand_in
        try:
            super().update_layer(*args, **kwargs)
        finally:
            self._modules["base_layer"] = base


@functools.cache
def _adapters() -> dict[str, type]:
    """The adapter class of each kind of packed layer."""
    from peft.tuners import lora

    own = {"__module__": __name__}  # where pickle looks for them: see `__getattr__`
    made = {"linear": type("PackedLinearAdapter", (_FusesIntoBranch, lora.Linear), dict(own))}
    for space in (1, 2, 3):
        parent = getattr(lora.layer, f"Conv{space}d")
        made[f"conv{space}d"] = type(f"PackedConv{space}dAdapter", (_ConvAdapter, parent), dict(own))
    return made


def __getattr__(name: str) -> type:
    """The adapter classes by name, for pickles."""
    if name.startswith("Packed"):
        for kind in _adapters().values():
            if kind.__name__ == name:
                return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adapter_of(target: Any) -> type | None:
    """The adapter class of a packed layer, itself or within another adapter; None for other modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return _adapters()[base.plan.kind] if isinstance(base, PACKED_TYPES) else None


def shape_of(module: Any) -> torch.Size | None:
    """Shape of the full-precision weight that a packed layer stands for, None for anything else."""
    return torch.Size(module.plan.shape) if isinstance(module, PACKED_TYPES) else None


def attached(model: nn.Module) -> str | None:
    """Dotted name of the first adapted layer of a model, None without adapters."""
    return next(iter(_attached(model)), None)


def _attached(model: nn.Module) -> dict[str, Any]:
    """Every adapter of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if naming.adapts(module)}


def refuse_unfit(what: str, model: nn.Module, calibrated: bool) -> None:
    """DQError when the adapters on a model could not stay on it, switchable, once its layers are packed.

    what        names the model
    calibrated  whether data is run through layers while they are fitted
    """
    for name, adapter in _attached(model).items():
        if kind_of(naming.inner(adapter)) is None:
            continue  # an embedding: it stays as it is
        fused = list(getattr(adapter, "merged_adapters", ()))
        if fused:
            raise DQError(
                f"{what} has adapters fused into its weights ({fused[0]!r}); before quantizing, call unfuse_lora() to "
                "keep them switchable, or unload_lora_weights() to keep them in"
            )
        if _packed_kind(adapter) is None:
            kind = type(adapter).__name__
            raise DQError(f"{what} has a {kind} adapter on layer {name!r}; only LoRA can stay on: merge or unload it")
        if calibrated and any(map(dora.reads_weights, adapter.lora_variant.values())):
            raise DQError(
                f"{what} has a DoRA adapter on layer {name!r}, which reads the layer's weights while they are fitted; "
                "unload it and load it again after quantizing"
            )


def _packed_kind(adapter: Any) -> type | None:
    """The class that an adapter gets when its base layer is packed; None for adapters that cannot stay."""
    from peft.tuners import lora

    plain = {lora.Linear: "linear", **{getattr(lora.layer, f"Conv{n}d"): f"conv{n}d" for n in (1, 2, 3)}}
    kind = plain.get(type(adapter))
    return None if kind is None else _adapters()[kind]


def adopt(model: nn.Module) -> None:
    """Let the adapters of layers that were just packed fuse into their branch, or read their decoded weight."""
    for adapter in _attached(model).values():
        kind = _packed_kind(adapter) if isinstance(naming.inner(adapter), PACKED_TYPES) else None
        if kind is not None:
            adapter.__class__ = kind
            for name, variant in adapter.lora_variant.items():
                if dora.reads_weights(variant):
                    adapter.lora_variant[name] = dora.OnDecoded(variant)


def release(model: nn.Module) -> None:
    """Undo `adopt` for adapters whose layers are full precision again; a fused one is then fused into the weight."""
    for adapter in list[Any](_attached(model).values()):
        if isinstance(adapter, _FusesIntoBranch) and not isinstance(naming.inner(adapter), PACKED_TYPES):
            adapter.__class__ = type(adapter).__bases__[-1]  # peft's own
            for key in ("fused_from", "plain"):
                vars(adapter).pop(key, None)  # pyright: ignore[reportAttributeAccessIssue]
            for name, variant in adapter.lora_variant.items():
                adapter.lora_variant[name] = getattr(variant, "variant", variant)
