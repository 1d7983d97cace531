"""Every change that `import dq` makes to other libraries, in one list.

diffusers, transformers  "dq" becomes a known quantizer and config in `quantizers.auto` (two tables each)
diffusers                `ModelMixin.save_pretrained` writes quantized models whole or not at all, others as before
transformers             `PreTrainedModel.save_pretrained` likewise
peft                     `dispatch_default` makes adapters that fuse into the low-rank branch of packed layers
diffusers                `FluxLoraLoaderMixin._calculate_module_shape` is told the shape a packed layer stands for
The wrapped functions keep what they wrap as `before_dq`.
"""

from __future__ import annotations

import functools

import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_auto

from dq.errors import DQError
from dq.host import files, peft
from dq.host.config import DQConfig
from dq.host.diffusers import DQQuantizer
from dq.host.mark import plan_of, write_config
from dq.host.peft import PACKED_TYPES
from dq.host.store import refuse_unsavable
from dq.host.transformers import DQTransformersQuantizer


def register() -> None:
    """Make "dq" known to diffusers, transformers and peft. Calling it again changes nothing.

    Raises DQError when another package has taken the name.
    """
    for home, quantizer in ((diffusers_auto, DQQuantizer), (transformers_auto, DQTransformersQuantizer)):
        for table, mine in (
            (home.AUTO_QUANTIZER_MAPPING, quantizer),
            (home.AUTO_QUANTIZATION_CONFIG_MAPPING, DQConfig),
        ):
            if table.get("dq", mine) is not mine:
                raise DQError(f"another package registered 'dq' with {home.__name__}; import only one of them")
            table["dq"] = mine
    for base in (ModelMixin, PreTrainedModel):
        if not hasattr(base.save_pretrained, "before_dq"):
            base.save_pretrained = _whole_or_not(base.save_pretrained)
    if peft.register():
        _teach_flux_shapes()


def _whole_or_not(original):
    """`save_pretrained` that, for models quantized by dq, refuses attached adapters and writes all files or none."""

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        if plan_of(self) is None:
            return original(self, save_directory, *args, **kwargs)
        refuse_unsavable(self)
        write_config(self)
        if kwargs.get("push_to_hub"):  # takes the repository's name from the folder's
            return original(self, save_directory, *args, **kwargs)
        with files.replacing(save_directory) as made:
            return original(self, str(made), *args, **kwargs)

    save_pretrained.before_dq = original
    return save_pretrained


def _teach_flux_shapes() -> None:
    """FLUX's LoRA loader compares weight shapes; give it the shape a packed layer stands for."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    original = FluxLoraLoaderMixin._calculate_module_shape

    @functools.wraps(original)
    def shape(model, base_module=None, base_weight_param_name=None):
        module = base_module
        if module is None and base_weight_param_name is not None:
            module = model.get_submodule(base_weight_param_name.removesuffix(".weight"))
        if isinstance(module, PACKED_TYPES):
            return torch.Size(module.plan.shape)
        return original(model, base_module, base_weight_param_name)

    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)
