"""Image transformers of the class-conditional, PixArt and MMDiT families."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, ids, register

ENTRIES: dict[str, Entry] = {}
image = functools.partial(register, ENTRIES, modality="image")

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
FLUX = {
    **HEADS,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 96,
    "axes_dims_rope": (8, 12, 12),
}


@image(
    "FluxTransformer2DModel",
    FLUX | {"patch_size": 1, "pooled_projection_dim": 80, "guidance_embeds": True},
    timesteps=("timestep", "guidance"),
)
def flux(draw: Draw) -> dict:
    """Packed latents (2, 24, 64), 7 text tokens of width 96, pooled text of width 80."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "pooled_projections": draw.normal(2, 80),
        "timestep": draw.steps(1.0),
        "img_ids": ids(1, 4, 6),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([4.0, 2.0]),
        "return_dict": False,
    }


@image(
    "SD3Transformer2DModel",
    HEADS
    | {
        "sample_size": 16,
        "num_layers": 3,
        "joint_attention_dim": 96,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 80,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
)
def stable_diffusion_3(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8), 7 text tokens of width 96, pooled text of width 80."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "pooled_projections": draw.normal(2, 80),
        "timestep": draw.steps(),
        "return_dict": False,
    }


@image(
    "PixArtTransformer2DModel",
    HEADS
    | {
        "num_attention_heads": 3,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 96,
        "sample_size": 128,
        "caption_channels": 96,
        "use_additional_conditions": True,
    },
)
def pixart(draw: Draw) -> dict:
    """Latents (2, 4, 12, 8), 7 text tokens of width 96 with a mask, resolution and aspect ratio."""
    return {
        "hidden_states": draw.normal(2, 4, 12, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[96.0, 64.0]] * 2).to(draw.dtype),
            "aspect_ratio": torch.tensor([[1.5]] * 2).to(draw.dtype),
        },
        "encoder_attention_mask": torch.ones(2, 7, dtype=draw.dtype),
        "return_dict": False,
    }


@image(
    "DiTTransformer2DModel",
    HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 1000},
)
def dit(draw: Draw) -> dict:
    """Latents (2, 4, 8, 8) and class labels (2,)."""
    return {
        "hidden_states": draw.normal(2, 4, 8, 8),
        "timestep": draw.integer_steps(),
        "class_labels": draw.below(1000, 2),
        "return_dict": False,
    }


@image(
    "HunyuanDiT2DModel",
    HEADS
    | {
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 16,
        "hidden_size": 128,
        "num_layers": 4,
        "cross_attention_dim": 96,
        "cross_attention_dim_t5": 64,
        "pooled_projection_dim": 80,
        "text_len": 7,
        "text_len_t5": 9,
    },
)
def hunyuan_dit(draw: Draw) -> dict:
    """Latents (2, 4, 12, 8), two text sequences (7 of width 96, 9 of width 64), rotary tables (24, 32)."""
    angles = draw.normal(24, 32, dtype=torch.float32)
    return {
        "hidden_states": draw.normal(2, 4, 12, 8),
        "timestep": draw.steps().to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "text_embedding_mask": torch.ones(2, 7, dtype=torch.int64),
        "encoder_hidden_states_t5": draw.normal(2, 9, 64),
        "text_embedding_mask_t5": torch.ones(2, 9, dtype=torch.int64),
        "image_meta_size": torch.tensor([[96.0, 64, 96, 64, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


@image(
    "AuraFlowTransformer2DModel",
    HEADS
    | {
        "sample_size": 16,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": 96,
        "caption_projection_dim": 128,
        "pos_embed_max_size": 64,
    },
)
def aura_flow(draw: Draw) -> dict:
    """Latents (2, 4, 12, 8) and 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 4, 12, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "return_dict": False,
    }


@image(
    "SanaTransformer2DModel",
    HEADS
    | {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 128,
        "caption_channels": 96,
        "sample_size": 8,
    },
)
def sana(draw: Draw) -> dict:
    """Latents (2, 16, 6, 4) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 16, 6, 4),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "return_dict": False,
    }


@image("QwenImageTransformer2DModel", {k: v for k, v in FLUX.items() if k != "num_single_layers"} | {"patch_size": 2})
def qwen_image(draw: Draw) -> dict:
    """Packed latents (2, 24, 64) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.int64),
        "timestep": draw.steps(1.0),
        "img_shapes": [[(1, 4, 6)]] * 2,
        "return_dict": False,
    }


@image(
    "ChromaTransformer2DModel",
    FLUX | {"approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 2},
)
def chroma(draw: Draw) -> dict:
    """Packed latents (2, 24, 64), 7 text tokens of width 96, a mask over text and image tokens."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(1.0),
        "img_ids": ids(1, 4, 6),
        "txt_ids": torch.zeros(7, 3),
        "attention_mask": torch.ones(2, 31, dtype=torch.bool),
        "return_dict": False,
    }


@image(
    "Lumina2Transformer2DModel",
    {
        "sample_size": 16,
        "hidden_size": 96,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 3,
        "multiple_of": 32,
        "axes_dim_rope": (8, 12, 12),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": 80,
    },
)
def lumina2(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8) and 7 text tokens of width 80 with a mask."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }


@image(
    "LuminaNextDiT2DModel",
    {
        "sample_size": 8,
        "hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 32,
        "cross_attention_dim": 96,
    },
)
def lumina_next(draw: Draw) -> dict:
    """Latents (2, 4, 12, 8), 7 text tokens of width 96, complex rotary table (96, 96, 16)."""
    angles = torch.rand(96, 96, 16, generator=draw.generator) * 6
    return {
        "hidden_states": draw.normal(2, 4, 12, 8),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_mask": torch.ones(2, 7, dtype=torch.int64),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }
