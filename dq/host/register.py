"""Every change that `import dq` makes to other libraries, in one list; each is made once its library is imported.

diffusers, transformers  "dq" becomes a known quantizer and config in `quantizers.auto` (two tables each)
diffusers                `save_pretrained` of models and pipelines writes quantized ones whole or not at all
transformers             `PreTrainedModel.save_pretrained` likewise
both                     `from_pretrained` of these first removes, or ends, what a killed save left in the folder
peft                     `dispatch_default` makes adapters that fuse into the low-rank branch of packed layers
diffusers                `FluxLoraLoaderMixin._calculate_module_shape` is told the shape a packed layer stands for
The wrapped functions keep what they wrap as `before_dq`. None of this imports torch: see `dq.host.later`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType

from dq import disk
from dq.errors import DQError
from dq.host import later

CONFIG = ("dq.host.config", "DQConfig")
QUANTIZERS = {
    "diffusers": ("dq.host.diffusers", "DQQuantizer"),
    "transformers": ("dq.host.transformers", "DQTransformersQuantizer"),
}


def register() -> None:
    """Make "dq" known to diffusers, transformers and peft, now or when they are imported. Again, it changes nothing.

    Raises DQError when another package has taken the name.
    """
    later.when_imported("diffusers.quantizers.auto", _enter)
    later.when_imported("diffusers.models.modeling_utils", lambda home: _whole(home.ModelMixin))
    later.when_imported("diffusers.pipelines.pipeline_utils", lambda home: _whole(home.DiffusionPipeline))
    later.when_imported("diffusers.loaders.lora_pipeline", _teach_flux_shapes)
    later.when_imported("transformers.quantizers.auto", _enter)
    later.when_imported("transformers.modeling_utils", lambda home: _whole(home.PreTrainedModel))
    later.when_imported("peft.tuners.lora.model", _dispatch)


def _enter(home: ModuleType) -> None:
    """Put the quantizer and the config into the two tables of a library's `quantizers.auto`."""
    quantizer = QUANTIZERS[home.__name__.partition(".")[0]]
    for table, place in ((home.AUTO_QUANTIZER_MAPPING, quantizer), (home.AUTO_QUANTIZATION_CONFIG_MAPPING, CONFIG)):
        module, name = place
        there = table.get("dq")
        if there is not None and (there.__module__, there.__qualname__) != place:
            raise DQError(f"another package registered 'dq' with {home.__name__}; import only one of them")
        table["dq"] = getattr(sys.modules.get(module), name, None) or later.Promise(module, name)


def _whole(base: type) -> None:
    _save_whole(base)
    _load_whole(base)


def _load_whole(base: type) -> None:
    """Let `from_pretrained` end or remove what a killed save left in a folder or beside it, before it reads there."""
    original = vars(base)["from_pretrained"].__func__
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(place, str | os.PathLike):
            disk.sweep(Path(place) / (kwargs.get("subfolder") or ""))
        return original(cls, *args, **kwargs)

    from_pretrained.before_dq = original
    base.from_pretrained = classmethod(from_pretrained)


def _save_whole(base: type) -> None:
    """Let `save_pretrained` of models of dq, and of pipelines with some, write all files or none, as safetensors.

    Models with attached adapters are refused.
    """
    original = base.save_pretrained
    takes = inspect.signature(original)
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        parts = getattr(self, "components", None)
        if not any(map(_of_dq, [self, *(parts.values() if isinstance(parts, dict) else ())])):
            return original(self, save_directory, *args, **kwargs)
        from dq.host import files, mark, store

        given = takes.bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", given.get("kwargs", {}).get("safe_serialization", True)):
            raise DQError("safe_serialization=False: quantized models are saved as safetensors only; leave it True")
        if _of_dq(self):
            store.refuse_unsavable(self)
            mark.write_config(self)
        if kwargs.get("push_to_hub"):  # takes the repository's name from the folder's
            return original(self, save_directory, *args, **kwargs)
        with files.replacing(save_directory) as made:
            return original(self, str(made), *args, **kwargs)

    save_pretrained.before_dq = original
    base.save_pretrained = save_pretrained


def _of_dq(model) -> bool:
    """Whether a model of a host library is quantized by dq. None can be before the file of its quantizers is read."""
    base, quantizer = sys.modules.get("dq.host.base"), getattr(model, "hf_quantizer", None)
    return base is not None and isinstance(quantizer, base.QuantizerBase) and quantizer.plan is not None


def _dispatch(home: ModuleType) -> None:
    """Let peft make fusable adapters for packed layers."""
    original = home.dispatch_default
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def dispatch(target, adapter_name, config, parameter_name=None, **kwargs):
        from dq.host import peft

        kind = peft.adapter_of(target) if parameter_name is None else None
        if kind is not None:
            return kind(target, adapter_name, config=config, **kwargs)
        return original(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)

    dispatch.before_dq = original
    home.dispatch_default = dispatch


def _teach_flux_shapes(home: ModuleType) -> None:
    """FLUX's LoRA loader compares weight shapes; give it the shape a packed layer stands for."""
    original = home.FluxLoraLoaderMixin._calculate_module_shape
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def shape(model, base_module=None, base_weight_param_name=None):
        from dq.host import peft

        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        return peft.shape_of(module) or original(model, base_module, base_weight_param_name)

    shape.before_dq = original
    home.FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)
