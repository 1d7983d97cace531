"""Loading through diffusers: quantizing while weights arrive, and restoring what was saved quantized.

On the fly, a layer stays full precision (on the meta device) until its weight arrives; it is then rounded in fp32 on
its target device and replaced, so that the peak is one layer above the packed model. A model that was saved quantized
gets its empty packed layers first, and every tensor is checked against the plan as it comes.
"""

from __future__ import annotations

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers.base import DiffusersQuantizer

from dq.errors import DQError
from dq.host import files, peft, room
from dq.host.base import QuantizerBase, enter, forget
from dq.layers.memory import page_out
from dq.model import pack_one, to_dense


class DQQuantizer(QuantizerBase, DiffusersQuantizer):
    """The diffusers quantizer: see the module docstring."""

    share = 1.0  # of a planned weight's bytes that device maps count

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self.as_saved = self.pre_quantized and torch_dtype is None
        return self.settle(torch_dtype)

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | None) -> list[str]:
        if self.pre_quantized and checkpoint_files:
            _, self.sums = files.opened(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        if self.compute_dtype is None:
            self.settle(None)
        self.prepare(model)
        self.wanted = files.expected(model, self.plan) if self.pre_quantized else {}

    def update_missing_keys(self, model, missing_keys: list[str], prefix: str) -> list[str]:
        for name in missing_keys:
            if self.pre_quantized or self.is_planned(name):
                raise DQError(f"the checkpoint lacks tensor {name!r}; download or save the model again")
        return missing_keys

    def maybe_update_state_dict(self, state_dict: dict) -> dict:
        for name, value in state_dict.items() if self.pre_quantized else ():
            if name in self.wanted:
                files.check_tensor(name, value, self.wanted[name])
                files.check_content(name, value, self.plan.layers, self.sums)
        return state_dict

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs) -> bool:
        home, _, key = param_name.rpartition(".")
        if self.pre_quantized or key == "bias":
            return self.as_saved or home in self.plan.layers
        return self.is_planned(param_name) is not None

    def get_special_dtypes_update(self, model, torch_dtype: torch.dtype) -> dict:
        """What tensors count in a device map: packed ones, and on the fly planned weights as what they become."""
        found = super().get_special_dtypes_update(model, torch_dtype)
        if self.pre_quantized:
            return found | room.own_dtypes(model)
        layers = self.plan.layers
        dtypes, self.share = room.kinds(layers, self.compute_dtype)
        return found | {name + (".weight" if layers[name].kind != "stack" else ""): dtypes[name] for name in layers}

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """Less by what scales need, for which a planned weight has no elements."""
        return {place: int(size * self.share) for place, size in max_memory.items()}

    def create_quantized_param(
        self, model, param_value, param_name, target_device, state_dict=None, unexpected_keys=None, **kwargs
    ) -> None:
        assert state_dict is not None  # diffusers gives it
        raw = state_dict[param_name].to(target_device)  # param_value was already cast, which would round scales
        name = None if self.pre_quantized else self.is_planned(param_name)
        if name is not None:
            pack_one(model, name, self.plan.layers[name], raw, self.compute_dtype)
            page_out(state_dict[param_name])
            return
        home, _, key = param_name.rpartition(".")
        if home in self.plan.layers and key in ("bias", "proj_down", "proj_up", "start_in", "start_out"):
            raw = raw.to(self.compute_dtype)
        set_module_tensor_to_device(model, param_name, target_device, value=raw.contiguous(), dtype=raw.dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.finish(model)
        enter(model, self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        if not safe_serialization:
            raise DQError("safe_serialization=False: quantized models are saved as safetensors only; leave it True")
        return state_dict, files.metadata(state_dict)

    def get_cuda_warm_up_factor(self) -> int:
        return 2 if self.pre_quantized else 8

    def _dequantize(self, model):
        to_dense(model)
        peft.release(model)
        forget(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True
