"""Loading through transformers, for text encoders: as in `dq.host.diffusers`, by that library's calls."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from dq.errors import DQError
from dq.host import files, peft, room
from dq.host.base import QuantizerBase
from dq.layers import packed_layers
from dq.layers.memory import page_out
from dq.model import pack_one, to_dense


class _PackOnArrival(ConversionOps):
    """Replaces a planned layer of a transformers model when its weight has been read."""

    def __init__(self, hf_quantizer: DQTransformersQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, *args, model=None, full_layer_name=None, missing_keys=None, **kwargs) -> dict:
        value = next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        own = self.hf_quantizer
        name = own.is_planned(full_layer_name)
        packed = pack_one(model, name, own.plan.layers[name], value, own.compute_dtype)
        page_out(value)
        packed._is_hf_initialized = True
        for parameter in packed.parameters(recurse=False):
            parameter._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


class DQTransformersQuantizer(QuantizerBase, HfQuantizer):
    """The transformers quantizer, for text encoders: the same, through that library's loader."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.settle(dtype)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        name = None if self.pre_quantized else self.is_planned(param_name)
        return param.element_size() if name is None else room.element_bytes(self.plan.layers[name], self.compute_dtype)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and self.is_planned(param_name) is not None

    def get_quantize_ops(self) -> _PackOnArrival:
        return _PackOnArrival(self)

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        self.settle(dtype)
        self.prepare(model)
        if self.pre_quantized and checkpoint_files:
            files.verify(checkpoint_files)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _refuse_missing(model)
            for name, layer in packed_layers(model).items():
                self._check(name, layer)
        self.finish(model)
        return model

    def _check(self, name: str, layer: nn.Module) -> None:
        for key, value in layer.named_parameters(recurse=False):
            wanted = files.tensor_shapes(layer.plan).get(key)
            if wanted is not None and wanted[1] is not None and not value.is_meta:
                files.check_content(f"{name}.{key}", value, self.plan.layers, {})

    def _dequantize(self, model, dtype=None):
        to_dense(model)
        peft.release(model)
        return model

    def get_state_dict_and_metadata(self, model):
        return None, files.metadata(model.state_dict())

    def is_serializable(self, **kwargs) -> bool:
        return True


def _refuse_missing(model) -> None:
    """DQError for the first tensor that was not in the files: the library would draw random numbers for it."""
    free = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), *model.all_tied_weights_keys]
    for name, value in model.state_dict(keep_vars=True).items():
        loaded = value.is_meta or getattr(value, "_is_hf_initialized", False)  # on meta: on its way to the disk
        if not loaded and not any(name == pattern or re.search(pattern, name) for pattern in free):
            raise DQError(f"the checkpoint lacks tensor {name!r}; download or save the model again")
