"""What the quantizers of both host libraries share: the plan, the compute dtype, and packing while weights arrive."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from dq.errors import DQError
from dq.layers import packed_layers
from dq.model import aliases, check_fit, put, start, swap
from dq.plan import Plan, compute_dtype

_Quantizer: Any = object  # a quantizer class of the library stands behind the mixin


class QuantizerBase(_Quantizer):
    """What both quantizers do; the host's class brings the rest. The config is copied: one may serve many models."""

    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config, **kwargs):
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.pre_quantized = kwargs.get("pre_quantized", False)
        name = self.quantization_config.compute_dtype
        self.compute_dtype = None if name is None else compute_dtype(name)
        self.sums: dict[str, str] = {}
        self.as_saved = False  # reloading with no dtype asked for: every tensor in the dtype it was saved in
        self.aliases: dict[str, str] = {}  # other name -> name of planned layers that stand in several places

    @property
    def plan(self) -> Plan:
        return self.quantization_config.plan

    def settle(self, dtype: torch.dtype | None) -> torch.dtype:
        """The compute dtype: what loading asks for, else what was saved, else fp32."""
        self.compute_dtype = dtype or self.compute_dtype or torch.float32
        self.quantization_config.compute_dtype = str(self.compute_dtype).removeprefix("torch.")
        return self.compute_dtype

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" not in [str(place) for place in places]:
            return
        if not self.pre_quantized:
            raise DQError("device_map puts layers on disk while quantizing; save the quantized model, then map that")
        if self.compute_dtype not in (None, torch.float32):
            raise DQError(
                "device_map puts layers on disk, which would round scales to 16 bits; pass dtype=torch.float32"
            )

    def prepare(self, model: nn.Module) -> None:
        """Plan the model, or swap in the empty layers of the plan it was saved with."""
        plan = copy.copy(self.plan) if self.pre_quantized else self.quantization_config.plan_for(model)
        if self.pre_quantized and plan is None:
            raise DQError("quantization_config has no plan; the model was not saved by dq, or config.json was edited")
        plan.compute_dtype = self.quantization_config.compute_dtype
        self.quantization_config.plan = plan
        if self.pre_quantized:
            swap(model, plan, self.compute_dtype)
        else:
            check_fit(model, plan)
        self.aliases = aliases(model, plan.layers)

    def is_planned(self, name: str) -> str | None:
        """The layer whose full-precision weight a parameter is, None if it is no planned weight."""
        layer = name if name in self.plan.layers else name.removesuffix(".weight")
        if layer not in self.plan.layers:
            return None
        return layer if (layer == name) == (self.plan.layers[layer].kind == "stack") else None

    def finish(self, model: nn.Module) -> None:
        """After the last tensor: nothing may be missing, then the layers are made ready."""
        there = packed_layers(model)
        for name in self.plan.layers:
            layer = there.get(name)
            missing = ["weight"] if layer is None else [key for key, p in layer.named_parameters() if p.is_meta]
            if missing and not hasattr(layer, "_hf_hook"):  # with a hook: offloaded
                raise DQError(f"the checkpoint lacks tensor '{name}.{missing[0]}'; download or save the model again")
        for other, first in self.aliases.items():
            put(model, other, there[first])
        start(model, self.plan)


def enter(model: Any, config: Any) -> None:
    """Put a quantization entry into a diffusers model's config."""
    _rewrite(model, {**model._internal_dict, "quantization_config": config})


def forget(model: Any) -> None:
    """Drop the quantization entry from a diffusers model's config, so that it saves as an ordinary model."""
    _rewrite(model, {key: value for key, value in model._internal_dict.items() if key != "quantization_config"})


def _rewrite(model: Any, entries: dict) -> None:
    """A new config with these entries, and with what was set on the old one after the model was made.

    Diffusers writes some settings (`config.encoder_hid_dim_type` of a loaded IP-Adapter) over attributes of the config
    alone; `register_to_config` builds the new one from the old one's entries and would put them back.
    """
    old = model._internal_dict
    new = type(old)(entries)
    vars(new).update({key: value for key, value in vars(old).items() if key != "quantization_config"})
    model._internal_dict = new
