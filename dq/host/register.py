"""Every change that `import dq` makes to other libraries, in one list; each is made once its library is imported.

diffusers, transformers  "dq" becomes a known quantizer and config in `quantizers.auto` (two tables each)
diffusers                `save_pretrained` of models and pipelines writes quantized ones whole or not at all, and
                         refuses what could not be loaded again
transformers             `PreTrainedModel.save_pretrained` likewise
both                     `from_pretrained` of these first removes, or ends, what a killed save left in the folder
diffusers                class methods that make a model of another, and `fuse_qkv_projections`, refuse packed layers
both                     `to`, `half`, `float`, `double`, `bfloat16` of quantized models: see `dq.host.casting`
diffusers                `DiffusionPipeline.to` refuses a cast before it changes the first part
diffusers                a pipeline that is given a scheduler, or a model with corrections of its steps, corrects them
peft                     `dispatch_default` makes adapters that fuse into the low-rank branch of packed layers
diffusers                a pipeline's balanced device map counts parts that were saved quantized by their packed bytes
diffusers                `DiffusionPipeline.progress_bar` tells the caches of models of dq that a run begins
diffusers                `FluxLoraLoaderMixin._calculate_module_shape` is told the shape a packed layer stands for
The wrapped functions keep what they wrap as `before_dq`. None of this imports torch: see `dq.host.later`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sized
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
    later.when_imported("diffusers.models.modeling_utils", _host_diffusers)
    later.when_imported("diffusers.pipelines.pipeline_utils", _host_pipelines)
    later.when_imported("diffusers.pipelines.pipeline_loading_utils", _measure_parts)
    later.when_imported("diffusers.loaders.lora_pipeline", _teach_flux_shapes)
    later.when_imported("transformers.quantizers.auto", _enter)
    later.when_imported("transformers.modeling_utils", lambda home: _host_model(home.PreTrainedModel))
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


def _host_diffusers(home: ModuleType) -> None:
    _host_model(home.ModelMixin)
    _watch_classes(home.ModelMixin)


def _host_pipelines(home: ModuleType) -> None:
    _whole(home.DiffusionPipeline)
    _cast_none_or_all(home)
    _correct_schedulers(home)
    _begin_runs(home)


def _host_model(base: type) -> None:
    _whole(base)
    _cast(base)


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

    from_pretrained.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
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
            if "dq.layers.packed" in sys.modules and hasattr(self, "named_modules"):
                from dq.host import derived

                derived.refuse_strays(self)
                derived.forget_others(self)
            return original(self, save_directory, *args, **kwargs)
        from dq.host import files, store

        given = takes.bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", given.get("kwargs", {}).get("safe_serialization", True)):
            raise DQError("safe_serialization=False: quantized models are saved as safetensors only; leave it True")
        with store.saving(self) if _of_dq(self) else contextlib.nullcontext():
            if kwargs.get("push_to_hub"):  # takes the repository's name from the folder's
                return original(self, save_directory, *args, **kwargs)
            with files.replacing(save_directory) as made:
                return original(self, str(made), *args, **kwargs)

    save_pretrained.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    base.save_pretrained = save_pretrained


def _cast(base: type) -> None:
    """Let a quantized model be cast to the dtype it has, and to no other."""
    original = base.to
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if not _of_dq(self):
            return original(self, *args, **kwargs)
        from dq.host import casting

        return casting.to(self, functools.partial(original, self), *args, **kwargs)

    to.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    base.to = to
    for name in ("half", "float", "double", "bfloat16"):
        setattr(base, name, _cast_by(getattr(base, name)))


def _cast_by(original: Callable) -> Callable:
    """A method that casts to one dtype, named after it."""

    @functools.wraps(original)
    def cast(self, *args):
        if not _of_dq(self):
            return original(self, *args)
        import torch

        return self.to(getattr(torch, original.__name__))

    cast.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    return cast


MAKERS = ("from_unet", "from_unet2d", "from_transformer")


def _watch_classes(base: type) -> None:
    """Let model classes, those there are and those to come, refuse to copy the weights of packed layers."""
    if "__init_subclass__" in vars(base):
        return

    def __init_subclass__(cls, **kwargs):
        super(base, cls).__init_subclass__(**kwargs)
        _watch_class(cls)

    base.__init_subclass__ = classmethod(__init_subclass__)  # pyright: ignore[reportAttributeAccessIssue]
    waiting = [base]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        for cls in below:
            _watch_class(cls)


def _watch_class(cls: type) -> None:
    for name in MAKERS:
        own = vars(cls).get(name)
        if isinstance(own, classmethod) and not hasattr(own.__func__, "before_dq"):
            setattr(cls, name, classmethod(_made_of(own.__func__)))
    fuse = getattr(cls, "fuse_qkv_projections", None)
    if fuse is not None and not hasattr(fuse, "before_dq"):
        cls.fuse_qkv_projections = _fused(fuse)


def _made_of(original: Callable) -> Callable:
    @functools.wraps(original)
    def make(cls, *args, **kwargs):
        if not any(map(_of_dq, (*args, *kwargs.values()))):
            return original(cls, *args, **kwargs)
        from dq.host import derived

        return derived.make(original, cls, *args, **kwargs)

    make.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    return make


def _fused(original: Callable) -> Callable:
    @functools.wraps(original)
    def fuse_qkv_projections(self, *args, **kwargs):
        if _of_dq(self):
            from dq.host import derived

            derived.refuse_fusing(self)
        return original(self, *args, **kwargs)

    fuse_qkv_projections.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    return fuse_qkv_projections


def _cast_none_or_all(home: ModuleType) -> None:
    """Let a pipeline refuse a cast that one of its parts refuses before it changes the others."""
    original = home.DiffusionPipeline.to
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def to(self, *args, **kwargs):
        dtype = kwargs.get("dtype") or next((value for value in args if type(value).__name__ == "dtype"), None)
        if dtype is not None and any(map(_of_dq, self.components.values())):
            from dq.host import casting

            casting.refuse_change(self.components, dtype)
        return original(self, *args, **kwargs)

    to.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    home.DiffusionPipeline.to = to


def _correct_schedulers(home: ModuleType) -> None:
    """Let the scheduler of a pipeline be corrected as the plans of its models say, whichever of them comes last."""
    original = home.DiffusionPipeline.__setattr__
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def __setattr__(self, name, value):
        original(self, name, value)
        if "dq.host.base" in sys.modules and (name == "scheduler" or _of_dq(value)):
            from dq.host import scheduling

            scheduling.follow(self)

    __setattr__.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    home.DiffusionPipeline.__setattr__ = __setattr__


def _begin_runs(home: ModuleType) -> None:
    """Let a pipeline that begins its steps say so to the caches of its models."""
    original = home.DiffusionPipeline.progress_bar
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def progress_bar(self, iterable=None, total=None, **kwargs):
        if "dq.sampler.caches.branches" in sys.modules:
            from dq.host import scheduling

            steps = len(iterable) if isinstance(iterable, Sized) else total
            scheduling.begin(self, steps if isinstance(steps, int) else 0)
        return original(self, iterable, total, **kwargs)

    progress_bar.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    home.DiffusionPipeline.progress_bar = progress_bar


def _measure_parts(home: ModuleType) -> None:
    """Tell diffusers, which makes empty full-precision parts to plan a device map, how large quantized ones are."""
    original = home._load_empty_model
    if hasattr(original, "before_dq"):
        return

    @functools.wraps(original)
    def load(*args, **kwargs):
        from dq.host import room

        return room.measured(original(*args, **kwargs))

    load.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    home._load_empty_model = load  # pyright: ignore[reportAttributeAccessIssue]


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

    dispatch.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
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

    shape.before_dq = original  # pyright: ignore[reportAttributeAccessIssue]
    home.FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)
