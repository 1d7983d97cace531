"""Which classes are denoisers, and where each one's small configuration stands."""

from __future__ import annotations

import contextlib
import importlib
import inspect

from diffusers.models import transformers, unets
from diffusers.models.modeling_utils import ModelMixin

from . import audio, image, image_flux, image_more, molecule, retired, unet, video, video_more, video_wan
from .entry import Entry

GROUPS = (image, image_flux, image_more, video, video_wan, video_more, audio, molecule, unet, retired)
ENTRIES: dict[str, Entry] = {name: entry for group in GROUPS for name, entry in group.ENTRIES.items()}

# Models in the same packages that predict no noise, velocity or clean sample by themselves.
NOT_DENOISERS = {"MotionAdapter", "DualTransformer2DModel"}

# Classes of pipelines' own modules that are denoisers as well.
ELSEWHERE = {
    "AudioLDM2UNet2DConditionModel": "audioldm2.modeling_audioldm2",
    "UNetFlatConditionModel": "deprecated.versatile_diffusion.modeling_text_unet",
    "UniDiffuserModel": "deprecated.unidiffuser.modeling_uvit",
    "WuerstchenDiffNeXt": "deprecated.wuerstchen.modeling_wuerstchen_diffnext",
    "WuerstchenPrior": "deprecated.wuerstchen.modeling_wuerstchen_prior",
}

# Full-size configurations for classes that cannot be built without arguments, and for ConsisID, whose defaults leave
# its face layers out.
FULL_CONFIGS: dict[str, dict] = {
    "ConsisIDTransformer3DModel": {"is_train_face": True, "use_rotary_positional_embeddings": True},
    "DreamLiteTransformer2DModel": {"in_channels": 1280, "num_attention_heads": 20, "attention_head_dim": 64},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [4096, 4096],
        "axes_dims_rope": (64, 32, 32),
        "llama_layers": [*range(32), *[31] * 16],
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 128,
        "hidden_size": 1408,
        "num_layers": 40,
        "mlp_ratio": 4.3637,
    },
    "LatteTransformer3DModel": {
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "attention_bias": True,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 4096,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8, "num_layers": 24},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {
        "in_channels": 1280,
        "num_attention_heads": 20,
        "attention_head_dim": 64,
        "num_layers": 10,
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
    "UniDiffuserModel": {
        "text_dim": 64,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 30,
        "attention_bias": True,
        "sample_size": 64,
        "patch_size": 2,
        "use_data_type_embedding": True,
    },
    "TransformerTemporalModel": {"in_channels": 1280, "num_attention_heads": 20, "attention_head_dim": 64},
}


def denoiser_classes() -> list[type]:
    """Every model class of diffusers' transformers and unets packages that denoises, plus those kept elsewhere."""
    found = {
        name: value
        for package in (transformers, unets)
        for name, value in vars(package).items()
        if inspect.isclass(value) and issubclass(value, ModelMixin) and name not in NOT_DENOISERS
    }
    for name, module in ELSEWHERE.items():
        with contextlib.suppress(ImportError):
            found[name] = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
    return [found[name] for name in sorted(found)]


def denoiser_class(name: str) -> type:
    """The class called `name` among `denoiser_classes()`."""
    return next(found for found in denoiser_classes() if found.__name__ == name)
