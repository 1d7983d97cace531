"""UNets: image, video and audio."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, register

ENTRIES: dict[str, Entry] = {}
unet = functools.partial(register, ENTRIES, kind="unet")


@unet(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 80,
        "attention_head_dim": (2, 3),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 160,
    },
    modality="image",
)
def unet_2d_condition(draw: Draw) -> dict:
    """Latents (2, 4, 8, 8), 7 text tokens of width 80, pooled text (2, 64) and six size numbers."""
    return {
        "sample": draw.normal(2, 4, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "added_cond_kwargs": {
            "text_embeds": draw.normal(2, 64),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2).to(draw.dtype),
        },
        "return_dict": False,
    }


@unet(
    "UNet2DModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    },
    modality="image",
)
def unet_2d(draw: Draw) -> dict:
    """Pixels (2, 3, 8, 8)."""
    return {"sample": draw.normal(2, 3, 8, 8), "timestep": draw.integer_steps(), "return_dict": False}


@unet(
    "UNet3DConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 80,
        "attention_head_dim": 32,
    },
    modality="video",
)
def unet_3d_condition(draw: Draw) -> dict:
    """Latents (2, 4, 3, 8, 8) and 7 text tokens of width 80."""
    return {
        "sample": draw.normal(2, 4, 3, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "return_dict": False,
    }


@unet(
    "I2VGenXLUNet",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 80,
        "attention_head_dim": 32,
        "num_attention_heads": None,
    },
    modality="video",
)
def i2vgen_xl(draw: Draw) -> dict:
    """Latents (2, 4, 3, 8, 8) with first-frame latents, 7 text tokens and an image embedding of width 80."""
    return {
        "sample": draw.normal(2, 4, 3, 8, 8),
        "timestep": draw.integer_steps(),
        "fps": torch.tensor([16, 8]),
        "image_latents": draw.normal(2, 4, 3, 8, 8),
        "image_embeddings": draw.normal(2, 80),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "return_dict": False,
    }


@unet(
    "UNetSpatioTemporalConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": 80,
        "num_attention_heads": (2, 3),
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "num_frames": 3,
    },
    modality="video",
)
def unet_spatio_temporal(draw: Draw) -> dict:
    """Latents (2, 3, 8, 8, 8) frames first, one image token of width 80, three motion numbers."""
    return {
        "sample": draw.normal(2, 3, 8, 8, 8),
        "timestep": draw.steps(2.0),
        "encoder_hidden_states": draw.normal(2, 1, 80),
        "added_time_ids": torch.tensor([[6.0, 127, 0.02]] * 2).to(draw.dtype),
        "return_dict": False,
    }


@unet(
    "UNetMotionModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "cross_attention_dim": 80,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    },
    modality="video",
)
def unet_motion(draw: Draw) -> dict:
    """Latents (2, 4, 3, 8, 8) and 7 text tokens of width 80 for each of the 6 frames."""
    return {
        "sample": draw.normal(2, 4, 3, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(6, 7, 80),
        "return_dict": False,
    }


@unet(
    "Kandinsky3UNet",
    {
        "time_embedding_dim": 64,
        "groups": 16,
        "attention_head_dim": 64,
        "layers_per_block": 2,
        "block_out_channels": (128, 128),
        "cross_attention_dim": 80,
        "encoder_hid_dim": 96,
    },
    modality="image",
)
def kandinsky3(draw: Draw) -> dict:
    """Latents (2, 4, 8, 8) and 7 text tokens of width 96 with a mask."""
    return {
        "sample": draw.normal(2, 4, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=draw.dtype),
        "return_dict": False,
    }


@unet(
    "StableCascadeUNet",
    {
        "in_channels": 16,
        "out_channels": 16,
        "timestep_ratio_embedding_dim": 64,
        "conditioning_dim": 80,
        "block_out_channels": (64, 96),
        "num_attention_heads": (2, 3),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 2),
        "clip_text_in_channels": 96,
        "clip_text_pooled_in_channels": 72,
        "clip_image_in_channels": 64,
        "clip_seq": 4,
        "switch_level": (False,),
    },
    modality="image",
    timesteps=("timestep_ratio",),
)
def stable_cascade(draw: Draw) -> dict:
    """Latents (2, 16, 8, 8), text tokens (2, 7, 96), pooled text (2, 1, 72), image embedding (2, 1, 64)."""
    return {
        "sample": draw.normal(2, 16, 8, 8),
        "timestep_ratio": draw.steps(1 / 32).to(draw.dtype),
        "clip_text_pooled": draw.normal(2, 1, 72),
        "clip_text": draw.normal(2, 7, 96),
        "clip_img": draw.normal(2, 1, 64),
        "return_dict": False,
    }


@unet(
    "UNet1DModel",
    {
        "sample_size": 32,
        "in_channels": 14,
        "out_channels": 14,
        "time_embedding_type": "positional",
        "use_timestep_embedding": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1.0,
        "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
        "up_block_types": ("UpResnetBlock1D",),
        "mid_block_type": "MidResTemporalBlock1D",
        "out_block_type": "OutConv1DBlock",
        "block_out_channels": (64, 96),
        "act_fn": "swish",
        "norm_num_groups": 8,
    },
    modality="audio",
)
def unet_1d(draw: Draw) -> dict:
    """Signals (2, 14, 32)."""
    return {"sample": draw.normal(2, 14, 32), "timestep": draw.integer_steps(), "return_dict": False}


@unet(
    "UVit2DModel",
    {
        "hidden_size": 64,
        "cond_embed_dim": 80,
        "micro_cond_encode_dim": 16,
        "micro_cond_embed_dim": 80,
        "encoder_hidden_size": 96,
        "vocab_size": 72,
        "codebook_size": 64,
        "in_channels": 64,
        "block_out_channels": 64,
        "num_res_blocks": 1,
        "block_num_heads": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "sample_size": 8,
    },
    modality="image",
    timesteps=(),
    note="no timestep: image tokens are masked by degrees",
)
def uvit(draw: Draw) -> dict:
    """Token ids (2, 8, 8), 7 text tokens of width 96, pooled text (2, 80) and micro-conditions (2, 5)."""
    return {
        "input_ids": draw.below(72, 2, 8, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "pooled_text_emb": draw.normal(2, 80),
        "micro_conds": torch.tensor([[64.0, 64, 0, 0, 6]] * 2),
    }


@unet(
    "DreamLiteUNetModel",
    {
        "sample_size": 8,
        "block_out_channels": (128, 128),
        "layers_per_block": 1,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        "cross_attention_dim": 80,
        "attention_head_dim": 2,
        "ff_mult": 2,
    },
    modality="image",
)
def dreamlite(draw: Draw) -> dict:
    """Latents (2, 4, 8, 8) and 7 text tokens of width 80."""
    return {
        "sample": draw.normal(2, 4, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "return_dict": False,
    }
