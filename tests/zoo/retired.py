"""Denoisers of retired pipelines that diffusers still ships: UniDiffuser, Versatile Diffusion's text, Würstchen."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, register

ENTRIES: dict[str, Entry] = {}
image = functools.partial(register, ENTRIES, modality="image")


@image(
    "UniDiffuserModel",
    {
        "text_dim": 96,
        "clip_img_dim": 80,
        "num_text_tokens": 7,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu",
        "num_embeds_ada_norm": 1000,
        "use_timestep_embedding": True,
        "use_data_type_embedding": True,
    },
    timesteps=("timestep_img", "timestep_text"),
)
def uni_diffuser(draw: Draw) -> dict:
    """Latents (2, 4, 8, 8), image embedding (2, 1, 80), text (2, 7, 96)."""
    return {
        "latent_image_embeds": draw.normal(2, 4, 8, 8),
        "image_embeds": draw.normal(2, 1, 80),
        "prompt_embeds": draw.normal(2, 7, 96),
        "timestep_img": draw.integer_steps(),
        "timestep_text": torch.tensor([250, 64]),
    }


@image(
    "UNetFlatConditionModel",
    {
        "sample_size": 8,
        "in_channels": 64,
        "out_channels": 64,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlockFlat", "CrossAttnDownBlockFlat"),
        "up_block_types": ("CrossAttnUpBlockFlat", "UpBlockFlat"),
        "cross_attention_dim": 80,
        "attention_head_dim": (2, 3),
    },
    kind="unet",
)
def unet_flat(draw: Draw) -> dict:
    """Text latents (2, 64, 4, 1) and 7 image tokens of width 80."""
    return {
        "sample": draw.normal(2, 64, 4, 1),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "return_dict": False,
    }


@image(
    "WuerstchenPrior",
    {"c_in": 16, "c": 64, "c_cond": 96, "c_r": 64, "depth": 2, "nhead": 2},
    timesteps=("r",),
    gains={"out.": 0.1},
)
def wuerstchen_prior(draw: Draw) -> dict:
    """Latents (2, 16, 6, 4) and 7 text tokens of width 96."""
    return {"x": draw.normal(2, 16, 6, 4), "r": draw.steps(1 / 32).to(draw.dtype), "c": draw.normal(2, 7, 96)}


@image(
    "WuerstchenDiffNeXt",
    {
        "c_r": 64,
        "c_cond": 64,
        "c_hidden": [64, 96],
        "nhead": [-1, 3],
        "blocks": [1, 2],
        "level_config": ["CT", "CTA"],
        "inject_effnet": [False, True],
        "clip_embd": 80,
    },
    kind="unet",
    timesteps=("r",),
)
def wuerstchen_decoder(draw: Draw) -> dict:
    """Latents (2, 4, 16, 16), image features (2, 16, 4, 4), 7 text tokens of width 80."""
    return {
        "x": draw.normal(2, 4, 16, 16),
        "r": draw.steps(1 / 32).to(draw.dtype),
        "effnet": draw.normal(2, 16, 4, 4),
        "clip": draw.normal(2, 7, 80),
    }
