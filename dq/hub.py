"""Saving, loading and registration: how a quantized model is a diffusers (and transformers) model like any other.

`import dq` makes "dq" a known `quantization_config` in both libraries. A model is quantized while it loads (data-free
recipes), or by `dq.quantize` afterwards; either way it then carries its plan, and plain `save_pretrained` and
`from_pretrained` work. Reloading replays the plan: nothing is decided again.

The files
    config.json          the model's own config with one more key:
        "quantization_config": {"quant_method": "dq", "recipe": str, "keep": [str], "compute_dtype": "bfloat16",
                                "plan": Plan.to_dict()}                 (Recipe fields the user overrode, if any, too)
    *.safetensors        the tensors below; metadata "dq_crc32" = JSON {tensor name: crc32 of its bytes, 8 hex digits}
    dq_plan.json, model.safetensors     instead of both, for modules without `save_pretrained` (`dq.save`, `dq.load`)

A planned layer NAME with weight matrix (rows, columns) is stored as these tensors, little-endian, row-major:
    NAME.weight        int8 (rows, ceil(columns * bits / 8)). Code i of a row sits at bits [i * bits, (i + 1) * bits)
                       of the row, least significant bit first (int4, fp4: even column in the low nibble). Integers
                       are two's complement, minifloats sign | exponent | mantissa from the most significant bit.
    NAME.scale         fp32 (rows, blocks), or (1, blocks) per tensor: blocks = columns / group size, rounded up, of
                       each part. Formats whose scales are bytes (nvfp4: e4m3; mxfp4: e8m0) keep them as int8.
    NAME.zero          int8, as scale: zero points of affine formats
    NAME.scale_global  fp32 (parts,): second-level scale of nvfp4
    NAME.smooth        fp32 (inputs,): multiplies the input
    NAME.proj_down, NAME.proj_up   (rank, columns), (rows, rank) in the compute dtype: low-rank branch
    NAME.act_scale     fp32 (steps, parts): stored activation scales
    NAME.start_in, NAME.start_out   (columns,), (rows,) in the compute dtype: a first token and its output
    NAME.bias          (rows,) in the compute dtype
value = code * scale (affine: (code - zero) * scale; nvfp4: * scale_global) and weight = value + proj_up @ proj_down,
for inputs that were multiplied by smooth. A convolution's columns are (inputs, *kernel); expert weights (experts, in,
out) have rows = experts * out and columns = in. Parts are the column ranges between a plan's input splits. All other
tensors are stored as the host library does.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from dq import adapters, files, loading
from dq.errors import DQError, nearest
from dq.layers import packed_layers
from dq.loading import DQQuantizer, DQTransformersQuantizer, check_fit, put, swap, to_dense
from dq.plan import Plan, Recipe

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import auto as transformers_auto
    from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin
except ImportError:  # transformers is optional for diffusers
    PreTrainedModel = transformers_auto = None

    class TransformersConfigMixin:
        pass


__all__ = ["DQConfig", "DQQuantizer", "check_fit", "load", "mark", "plan_of", "put", "register"]
__all__ += ["save", "swap", "to_dense", "unmark"]


OVERRIDES = {field.name for field in dataclasses.fields(Recipe)} - {"name", "keep", "method", "options"}


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
            raise DQError(f"DQConfig: compute_dtype is {self.compute_dtype!r}, expected a dtype such as 'bfloat16'")
        if self.plan is None:
            self.resolve()

    def resolve(self) -> Recipe | Plan:
        """The recipe with its overrides, or the plan when the recipe names one. DQError when it needs calibration."""
        from dq import recipes

        found = recipes.get(self.recipe)
        if isinstance(found, Plan):
            return found
        if found.needs_calibration:
            raise DQError(f"recipe {found.name!r} needs calibration; load the pipeline, then call dq.quantize on it")
        return Recipe.from_dict({**found.to_dict(), **self.overrides}) if self.overrides else found

    def plan_for(self, model: nn.Module) -> Plan:
        """The plan of a model that is not quantized yet; the model may be on the meta device."""
        from dq import recipes

        wanted = self.plan or self.resolve()
        plan = wanted if isinstance(wanted, Plan) else recipes.make_plan(model, wanted, tuple(self.keep))
        for name, layer in plan.layers.items():
            if (layer.act is not None and layer.act.scale != "dynamic") or layer.smooth or layer.rank:
                raise DQError(f"layer {name!r}: the plan has calibrated tensors; load the model saved with them")
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


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model is quantized with, up to date with its layers (fused adapters add rank), else None."""
    plan = getattr(model, "_dq_plan", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, loading.QuantizerBase):
        plan = quantizer.plan
    if plan is not None:
        found = packed_layers(model)
        plan.layers = {name: found[name].plan if name in found else layer for name, layer in plan.layers.items()}
    return plan


def mark(model: nn.Module, plan: Plan) -> None:
    """Tell a model whose layers were just swapped that it is quantized, so that saving and running follow suit.

    Diffusers and transformers models get the attributes their `from_pretrained` would have set; any other module
    remembers the plan. Raises DQError when the plan has steps and the model no such timestep argument.
    """
    loading.start(model, plan)
    kind = _kind(model)
    if kind is None:
        model._dq_plan = plan
        return
    config = DQConfig(plan.recipe or "int8", plan=plan, compute_dtype=plan.compute_dtype)
    model.hf_quantizer = kind(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, DQMethod.DQ
    _write_config(model)


def unmark(model: nn.Module) -> None:
    """Undo `mark` on a model whose layers are full precision again."""
    loading.clock.detach(model)
    kind = _kind(model)
    if kind is None:
        model.__dict__.pop("_dq_plan", None)
    elif kind is DQTransformersQuantizer:
        model.hf_quantizer.remove_quantization_config(model)
    else:
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        loading.forget(model)


def _kind(model: nn.Module) -> type | None:
    """The quantizer class of the model's library, None for other modules."""
    if isinstance(model, ModelMixin):
        return DQQuantizer
    return DQTransformersQuantizer if PreTrainedModel and isinstance(model, PreTrainedModel) else None


def _write_config(model: nn.Module) -> None:
    """Put the plan as it is now into the config that will be saved."""
    plan_of(model)
    config = model.hf_quantizer.quantization_config
    if isinstance(model, ModelMixin):
        model.register_to_config(quantization_config=config)
    else:
        model.config.quantization_config = config


def save(target, folder: str | Path) -> None:
    """Write a quantized model or pipeline into a folder, whole or not at all.

    Models and pipelines of diffusers and transformers are written as their `save_pretrained` does; any other module as
    `dq_plan.json` and `model.safetensors`. Raises DQError for a target that is not quantized or has adapters attached,
    and for a place that cannot be written.
    """
    if isinstance(target, DiffusionPipeline) or (isinstance(target, nn.Module) and _kind(target)):
        parts = target.components.values() if isinstance(target, DiffusionPipeline) else [target]
        quantized = [part for part in parts if isinstance(part, nn.Module) and plan_of(part) is not None]
        _refuse_unready(target, quantized)
        with files.replacing(folder) as made:
            target.save_pretrained(made)
        return
    _refuse_unready(target, [target] if plan_of(target) is not None else [])
    with files.replacing(folder) as made:
        files.write(made, plan_of(target), target.state_dict())


def _refuse_unready(target, quantized: list[nn.Module]) -> None:
    if not quantized:
        kind = type(target).__name__
        raise DQError(f"{kind} is not quantized, nothing to save; call dq.quantize(target, 'int8') first")
    for model in quantized:
        _refuse_unsavable(model)


def _refuse_unsavable(model: nn.Module) -> None:
    if (name := adapters.attached(model)) is not None:
        raise DQError(
            f"{type(model).__name__} has adapters attached (layer {name!r}); before saving, unload them, "
            "or call fuse_lora() and then unload_lora_weights()"
        )
    offloaded = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if offloaded is not None:
        raise DQError(
            f"{type(model).__name__} is offloaded (tensor {offloaded!r} has no data); before saving, remove the hooks "
            "with pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_submodules(model)"
        )


@torch.no_grad()
def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Fill a full-precision module (its weights do not matter) with what `dq.save` wrote, in place; returns it.

    Raises DQError, with the model unchanged, for a folder or plan that does not fit and for missing, truncated,
    mis-shaped or altered tensors.
    """
    folder = Path(folder)
    if _kind(model) and not (folder / files.PLAN_FILE).exists():
        raise DQError(f"{str(folder)!r} has no {files.PLAN_FILE}; load it with from_pretrained")
    plan = Plan.load(folder / files.PLAN_FILE)
    if packed_layers(model):
        raise DQError(f"{type(model).__name__} is already quantized; load into a full-precision model")
    check_fit(model, plan)
    state = files.read(folder, model, plan)
    place = next((value.device for value in model.parameters() if not value.is_meta), torch.device("cpu"))
    swap(model, plan, getattr(torch, plan.compute_dtype or "float32"))
    for name, value in state.items():
        home, _, key = name.rpartition(".")
        module = model.get_submodule(home)
        if key in module._buffers:
            module._buffers[key] = value.to(place)
        else:
            module._parameters[key] = nn.Parameter(value.to(place), requires_grad=False)
    mark(model, plan)
    return model


def register() -> None:
    """Make "dq" known to diffusers, transformers and peft. Calling it again changes nothing.

    Raises DQError when another package has taken the name.
    """
    tables = [(diffusers_auto, DQQuantizer)]
    if transformers_auto is not None:
        tables.append((transformers_auto, DQTransformersQuantizer))
    for home, quantizer in tables:
        for table, mine in (
            (home.AUTO_QUANTIZER_MAPPING, quantizer),
            (home.AUTO_QUANTIZATION_CONFIG_MAPPING, DQConfig),
        ):
            if table.get("dq", mine) is not mine:
                raise DQError(f"another package registered 'dq' with {home.__name__}; import only one of them")
            table["dq"] = mine
    for base in filter(None, (ModelMixin, PreTrainedModel)):
        if not hasattr(base.save_pretrained, "before_dq"):
            base.save_pretrained = _whole_or_not(base.save_pretrained)
    adapters.register()


def _whole_or_not(original):
    """`save_pretrained` that, for models quantized by dq, refuses attached adapters and writes all files or none."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        if plan_of(self) is None:
            return original(self, save_directory, *args, **kwargs)
        _refuse_unsavable(self)
        _write_config(self)
        if kwargs.get("push_to_hub"):  # takes the repository's name from the folder's
            return original(self, save_directory, *args, **kwargs)
        with files.replacing(save_directory) as made:
            return original(self, str(made), *args, **kwargs)

    save_pretrained.before_dq = original
    return save_pretrained
