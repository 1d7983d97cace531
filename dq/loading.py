"""Loading through the host libraries: one quantizer for diffusers, one for transformers, and the shared surgery.

On the fly, a layer stays full precision (on the meta device) until its weight arrives; it is then rounded in fp32 on
its target device and replaced, so that the peak is one layer above the packed model. A model that was saved quantized
gets its empty packed layers first, and every tensor is checked against the plan as it comes.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from mmap import PAGESIZE

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from dq import clock, files, fusions, layers
from dq.errors import DQError
from dq.layers import PACKED, PackedStack, kind_of, packed_layers
from dq.plan import LayerPlan, Plan

try:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.base import HfQuantizer
except ImportError:  # transformers is optional for diffusers
    ConversionOps = HfQuantizer = object

MADV_PAGEOUT = 21  # of Linux 5.4 and later; older ones answer that they do not know it
ALIGNMENT = 64  # bytes, what torch's own allocator gives
IN_FP32 = (".scale", ".smooth", ".act_scale")  # ends of the names of packed tensors that are fp32 in any model


def check_fit(model: nn.Module, plan: Plan) -> None:
    """DQError naming the first layer of the plan that the model has not, or has in another kind or shape."""
    model_name = type(model).__name__
    for name, layer in plan.layers.items():
        layer.check(name)
        kind, shape = _found(model, name)
        if kind is None:
            raise DQError(f"layer {name!r} of the plan is not in {model_name}; is this plan for another model?")
        if (kind, shape) != (layer.kind, layer.shape):
            wanted = f"{layer.kind} {tuple(layer.shape)}"
            raise DQError(f"layer {name!r}: the plan is for {wanted}, {model_name} has {kind} {shape}; plan it anew")
    if plan.edges:
        clock.argument_position(model, plan.timestep)


def _found(model: nn.Module, name: str) -> tuple[str | None, tuple[int, ...]]:
    """(kind, weight shape) of what stands under a name; kind None when nothing dq can quantize does."""
    home, _, key = name.rpartition(".")
    try:
        owner = model.get_submodule(home)
    except AttributeError:
        return None, ()
    if owner._parameters.get(key) is not None:
        return "stack", tuple(owner._parameters[key].shape)
    module = owner._modules.get(key)
    if module is None or (kind := kind_of(module)) is None:
        return type(module).__name__ if module is not None else None, ()
    return kind, tuple(module.weight.shape)


def put(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Put a module or parameter in place of what stands under a dotted name."""
    home, _, key = name.rpartition(".")
    owner = model.get_submodule(home)
    owner._parameters.pop(key, None)
    if isinstance(value, nn.Parameter):
        owner._modules.pop(key, None)
    setattr(owner, key, value)


def swap(model: nn.Module, plan: Plan, compute_dtype: torch.dtype, device: str = "meta") -> None:
    """Replace the layers a plan names by empty packed ones. DQError, before any change, when the plan does not fit."""
    check_fit(model, plan)
    for name, layer in plan.layers.items():
        if layer.kind == "stack":
            packed = PackedStack(layer, compute_dtype, device)
        else:
            old = model.get_submodule(name)
            packed = PACKED[layer.kind].like(old, layer, compute_dtype, device).train(old.training)
        put(model, name, packed)


@torch.no_grad()
def pack_one(model: nn.Module, name: str, plan: LayerPlan, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """Replace one full-precision layer by its packed form of compute dtype `dtype`; its bias may come later."""
    if plan.kind == "stack":
        packed = layers.pack_stack(name, weight, plan, dtype)
    else:
        old = model.get_submodule(name)
        packed = PACKED[plan.kind].like(old, plan, dtype, "meta").train(old.training)
        layers.fill(name, packed, weight)
        if old.bias is not None and not old.bias.is_meta:
            packed.put("bias", old.bias.data.to(weight.device, dtype))
    put(model, name, packed)
    return packed


def start(model: nn.Module, plan: Plan) -> None:
    """Make packed layers ready to run: frozen, bound to kernels, following the timestep if the plan has steps."""
    clock.detach(model)
    ticking = clock.Clock(plan.edges) if plan.edges else None
    if ticking is not None:
        clock.attach(model, ticking, plan.timestep)
    for layer in packed_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        if not isinstance(layer, PackedStack):
            layer.clock = ticking
            layer.bind(layer.weight.device.type)
    fusions.attach(model, plan)
    if isinstance(model, ModelMixin):  # tells diffusers that these do not say what dtype the model has
        kept = type(model)._keep_in_fp32_modules or ()
        model._keep_in_fp32_modules = [*([kept] if isinstance(kept, str) else kept), *IN_FP32]
    _align(model)


def _align(model: nn.Module) -> None:
    """Copy CPU tensors that were mapped from a file at an odd address to aligned memory.

    Matrix libraries round differently by the alignment of their operands, so a model would not draw the same picture,
    to the bit, from two files.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % ALIGNMENT:
            mapped = value.data
            value.data = mapped.clone()
            _page_out(mapped)


def _page_out(tensor: torch.Tensor) -> None:
    """Let the system take back the whole pages of a tensor that was copied from a mapped file.

    They would stay in the process's memory beside the copy. Nothing is lost: the advice drops clean file pages only.
    """
    if sys.platform != "linux":
        return
    first = tensor.data_ptr()
    start, stop = -(-first // PAGESIZE) * PAGESIZE, (first + tensor.nbytes) // PAGESIZE * PAGESIZE
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_PAGEOUT)


@torch.no_grad()
def to_dense(model: nn.Module) -> None:
    """Put the full-precision layers that packed ones stand for in their place, in the compute dtype."""
    fusions.detach(model)
    for name, layer in packed_layers(model).items():
        if isinstance(layer, PackedStack):
            put(model, name, nn.Parameter(layer.dense_weight().to(layer.compute_dtype), requires_grad=False))
        else:
            put(model, name, layer.dense())
    model.__dict__.pop("_keep_in_fp32_modules", None)
    clock.detach(model)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


class QuantizerBase:
    """What both quantizers do; the host's class brings the rest. The config is copied: one may serve many models."""

    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config, **kwargs):
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.pre_quantized = kwargs.get("pre_quantized", False)
        self.compute_dtype = _dtype(self.quantization_config.compute_dtype)
        self.as_saved = False  # reloading with no dtype asked for: every tensor in the dtype it was saved in
        self.sums: dict[str, str] = {}

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
        start(model, self.plan)


class DQQuantizer(QuantizerBase, DiffusersQuantizer):
    """The diffusers quantizer: see the module docstring."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self.as_saved = self.pre_quantized and torch_dtype is None
        return self.settle(torch_dtype)

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | None) -> list[str]:
        paths = [path for path in checkpoint_files or () if str(path).endswith(".safetensors")]
        if self.pre_quantized and paths:
            _, self.sums = files.headers(paths)
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

    def create_quantized_param(
        self, model, param_value, param_name, target_device, state_dict=None, unexpected_keys=None, **kwargs
    ) -> None:
        raw = state_dict[param_name].to(target_device)  # param_value was already cast, which would round scales
        name = None if self.pre_quantized else self.is_planned(param_name)
        if name is not None:
            pack_one(model, name, self.plan.layers[name], raw, self.compute_dtype)
            return
        home, _, key = param_name.rpartition(".")
        if home in self.plan.layers and key in ("bias", "proj_down", "proj_up", "start_in", "start_out"):
            raw = raw.to(self.compute_dtype)
        set_module_tensor_to_device(model, param_name, target_device, value=raw.contiguous(), dtype=raw.dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.finish(model)
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        if not safe_serialization:
            raise DQError("safe_serialization=False: quantized models are saved as safetensors only; leave it True")
        return state_dict, files.metadata(state_dict)

    def get_cuda_warm_up_factor(self) -> int:
        return 2 if self.pre_quantized else 8

    def _dequantize(self, model):
        to_dense(model)
        forget(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True


def forget(model: nn.Module) -> None:
    """Drop the quantization entry from a diffusers model's config, so that it saves as an ordinary model."""
    entries = {key: value for key, value in model._internal_dict.items() if key != "quantization_config"}
    model._internal_dict = type(model._internal_dict)(entries)


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
        return param.element_size() if name is None else self.plan.layers[name].weight.spec.bits / 8

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and self.is_planned(param_name) is not None

    def get_quantize_ops(self) -> _PackOnArrival:
        return _PackOnArrival(self)

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        self.settle(dtype)
        self.prepare(model)
        paths = [path for path in checkpoint_files or () if str(path).endswith(".safetensors")]
        if self.pre_quantized and paths:
            _, self.sums = files.headers(paths)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            for name, layer in packed_layers(model).items():
                self._check(name, layer)
        self.finish(model)
        return model

    def _check(self, name: str, layer: nn.Module) -> None:
        for key, value in layer.named_parameters(recurse=False):
            if not getattr(value, "_is_hf_initialized", False):
                raise DQError(f"the checkpoint lacks tensor '{name}.{key}'; download or save the model again")
            wanted = files.tensor_shapes(layer.plan).get(key)
            if wanted is not None and wanted[1] is not None and not value.is_meta:
                files.check_content(f"{name}.{key}", value, self.plan.layers, self.sums)

    def _dequantize(self, model, dtype=None):
        to_dense(model)
        return model

    def get_state_dict_and_metadata(self, model):
        return None, files.metadata(model.state_dict())

    def is_serializable(self, **kwargs) -> bool:
        return True
