"""Loading through the host libraries: one config class and one quantizer for each of diffusers and transformers.

On the fly, a layer stays full precision (on the meta device) until its weight arrives; it is then rounded in fp32 on its
target device and replaced, so that the peak is one layer above the packed model. A model that was saved quantized gets
its empty packed layers first, and every tensor is checked against the plan as it comes.
"""

from __future__ import annotations

import copy
import dataclasses
import enum

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from dq import clock, files, layers
from dq.layers import PACKED, PackedStack, kind_of, packed_layers
from dq.plan import DQError, LayerPlan, Plan, Recipe, nearest

try:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin
except ImportError:  # transformers is optional for diffusers
    ConversionOps = HfQuantizer = object

    class TransformersConfigMixin:
        pass


OVERRIDES = {field.name for field in dataclasses.fields(Recipe)} - {"name", "keep", "needs_calibration"}


ALIGNMENT = 64  # bytes, what torch's own allocator gives


class DQMethod(str, enum.Enum):  # noqa: UP042 - a StrEnum prints differently in the host's messages
    """What the host libraries call `quant_method`."""

    DQ = "dq"


class DQConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """The `quantization_config` of a model, for diffusers and transformers alike.

    recipe         a data-free recipe: its name, a Recipe, or the path of a plan or recipe JSON
    keep           patterns, matched from the start of layer names, left in full precision
    plan           a Plan (or its JSON form); set by saving, then the recipe is not looked at
    compute_dtype  dtype of everything that is not packed when loading names none, e.g. "bfloat16"
    kwargs         fields of Recipe to override: linear, conv, modulation, edge
    Raises DQError for an unknown recipe or keyword, with the nearest known name.
    """

    def __init__(self, recipe="int8", keep=None, plan=None, compute_dtype=None, **kwargs):
        self.quant_method = DQMethod.DQ
        kwargs.pop("quant_method", None)
        for key in kwargs:
            if key not in OVERRIDES:
                known = OVERRIDES | {"recipe", "keep", "plan", "compute_dtype"}
                raise DQError(f"DQConfig: unknown keyword {key!r}, {nearest(key, known)}")
        self.recipe = Recipe.from_dict(recipe) if isinstance(recipe, dict) else recipe
        self.keep = [keep] if isinstance(keep, str) else list(keep or ())
        self.overrides = kwargs
        self.plan = Plan.from_dict(plan) if isinstance(plan, dict) else plan
        self.compute_dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
        if self.compute_dtype is not None and not isinstance(getattr(torch, self.compute_dtype, None), torch.dtype):
            raise DQError(f"DQConfig: compute_dtype is {self.compute_dtype!r}, expected a torch dtype such as 'bfloat16'")
        if self.plan is None:
            self.resolve()

    def resolve(self) -> Recipe | Plan:
        """The recipe with its overrides, or the plan when the recipe names one. DQError when it needs calibration."""
        from dq import recipes

        found = recipes.get(self.recipe)
        if isinstance(found, Plan):
            return found
        if found.needs_calibration:
            raise DQError(f"recipe {found.name!r} needs calibration; load the model, then dq.quantize(pipe, {found.name!r})")
        return Recipe.from_dict({**found.to_dict(), **self.overrides}) if self.overrides else found

    def plan_for(self, model: nn.Module) -> Plan:
        """The plan of a model that is not quantized yet; the model may be on the meta device."""
        from dq import recipes

        wanted = self.plan or self.resolve()
        plan = wanted if isinstance(wanted, Plan) else recipes.make_plan(model, wanted, tuple(self.keep))
        for name, layer in plan.layers.items():
            if (layer.act is not None and layer.act.scale != "dynamic") or layer.smooth or layer.rank:
                raise DQError(f"layer {name!r}: the plan holds calibrated tensors; load the model saved with them instead")
        return copy.copy(plan)

    def to_dict(self) -> dict:
        recipe = self.recipe.to_dict() if isinstance(self.recipe, Recipe) else str(self.recipe)
        plan = None if self.plan is None else self.plan.to_dict()
        own = {"quant_method": "dq", "recipe": recipe, "keep": self.keep, "compute_dtype": self.compute_dtype}
        return {**own, "plan": plan, **self.overrides}

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def __repr__(self) -> str:
        count = "no plan yet" if self.plan is None else f"{len(self.plan.layers)} layers"
        return f"DQConfig(recipe={str(getattr(self.recipe, 'name', self.recipe))!r}, {count})"


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
            raise DQError(f"layer {name!r}: the plan is for {wanted}, {model_name} has {kind} {shape}; use its own plan")
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
    """Replace the layers a plan names by empty packed layers. DQError, before any change, when the plan does not fit."""
    check_fit(model, plan)
    for name, layer in plan.layers.items():
        if layer.kind == "stack":
            packed = PackedStack(layer, compute_dtype, device)
        else:
            old = model.get_submodule(name)
            packed = PACKED[layer.kind].like(old, layer, compute_dtype, device).train(old.training)
        put(model, name, packed)


@torch.no_grad()
def pack_one(model: nn.Module, name: str, plan: LayerPlan, weight: torch.Tensor, compute_dtype: torch.dtype) -> nn.Module:
    """Replace one full-precision layer by its packed form, made from `weight`; its bias may still be to come."""
    if plan.kind == "stack":
        packed = layers.pack_stack(name, weight, plan, compute_dtype)
    else:
        old = model.get_submodule(name)
        packed = PACKED[plan.kind].like(old, plan, compute_dtype, "meta").train(old.training)
        layers.fill(name, packed, weight)
        if old.bias is not None and not old.bias.is_meta:
            packed.put("bias", old.bias.data.to(weight.device, compute_dtype))
    put(model, name, packed)
    return packed


def start(model: nn.Module, plan: Plan) -> None:
    """Make packed layers ready to run: frozen, bound to their kernels, and following the timestep if the plan has steps."""
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
    _align(model)


def _align(model: nn.Module) -> None:
    """Copy CPU tensors that were mapped from a file at an odd address to aligned memory.

    Matrix libraries round differently by the alignment of their operands, so a model would not draw the same picture,
    to the bit, from two files.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % ALIGNMENT:
            value.data = value.data.clone()


@torch.no_grad()
def to_dense(model: nn.Module) -> None:
    """Put the full-precision layers that packed ones stand for in their place, in the compute dtype."""
    for name, layer in packed_layers(model).items():
        if isinstance(layer, PackedStack):
            put(model, name, nn.Parameter(layer.dense_weight().to(layer.compute_dtype), requires_grad=False))
        else:
            put(model, name, layer.dense())
    clock.detach(model)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


class _Quantizer:
    """What both quantizers do. The host's class brings the rest; the config is a copy, so one config serves many models."""

    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: DQConfig, **kwargs):
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.pre_quantized = kwargs.get("pre_quantized", False)
        self.compute_dtype = _dtype(self.quantization_config.compute_dtype)
        self.sums: dict[str, str] = {}

    @property
    def plan(self) -> Plan:
        return self.quantization_config.plan

    def settle(self, dtype: torch.dtype | None) -> torch.dtype:
        """The compute dtype: what loading asks for, else what was saved, else fp32."""
        self.compute_dtype = dtype or self.compute_dtype or torch.float32
        self.quantization_config.compute_dtype = str(self.compute_dtype).removeprefix("torch.")
        return self.compute_dtype

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" not in [str(place) for place in places]:
            return
        if not self.pre_quantized:
            raise DQError("device_map puts layers on disk while quantizing; save the quantized model first, then map it")
        if self.compute_dtype not in (None, torch.float32):
            raise DQError("device_map puts layers on disk, which would round scales to 16 bits; use dtype=torch.float32")

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
            missing = [key for key, value in there[name].named_parameters() if value.is_meta] if name in there else ["weight"]
            if missing and not hasattr(there.get(name), "_hf_hook"):
                raise DQError(f"the checkpoint lacks tensor '{name}.{missing[0]}'; download or save the model again")
        start(model, self.plan)


class DQQuantizer(_Quantizer, DiffusersQuantizer):
    """The diffusers quantizer: see the module docstring."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
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
            return home in self.plan.layers
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
        module = model.get_submodule(home)
        if key in ("bias", "proj_down", "proj_up"):
            raw = raw.to(self.compute_dtype)
        module._parameters[key] = nn.Parameter(raw.contiguous(), requires_grad=False)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.finish(model)
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        return state_dict, files.metadata(state_dict) if safe_serialization else {}

    def get_cuda_warm_up_factor(self) -> int:
        return 2 if self.pre_quantized else 8

    def _dequantize(self, model):
        to_dense(model)
        forget(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
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


class DQTransformersQuantizer(_Quantizer, HfQuantizer):
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

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
