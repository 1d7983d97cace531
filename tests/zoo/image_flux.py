"""Image transformers of the Flux family: streams for text and image that meet in joint attention, packed latents."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, ids, register
from .image import FLUX, HEADS

ENTRIES: dict[str, Entry] = {}
image = functools.partial(register, ENTRIES, modality="image")


def packed(draw: Draw, axes: int = 3) -> dict:
    """Packed latents (2, 24, 64) of a 4 by 6 grid and 7 text tokens of width 96, with positions."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(1.0),
        "img_ids": ids(1, 4, 6, axes),
        "txt_ids": torch.zeros(7, axes),
        "return_dict": False,
    }


@image(
    "Flux2Transformer2DModel",
    FLUX | {"timestep_guidance_channels": 64, "mlp_ratio": 2.0, "axes_dims_rope": (8, 8, 8, 8)},
    timesteps=("timestep", "guidance"),
)
def flux2(draw: Draw) -> dict:
    """Packed latents, text and guidance."""
    return packed(draw, 4) | {"guidance": torch.tensor([4.0, 2.0])}


@image(
    "Flux3Transformer2DModel",
    FLUX
    | {
        "cond_in_channels": 72,
        "timestep_channels": 64,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (8, 8, 8, 8),
        "flow_map": True,
    },
    timesteps=("timestep", "target_timestep"),
)
def flux3(draw: Draw) -> dict:
    """Packed latents, text, and a condition image (2, 6, 72)."""
    return packed(draw, 4) | {
        "image_cond_hidden_states": draw.normal(2, 6, 72),
        "image_cond_ids": ids(1, 2, 3, 4),
        "target_timestep": torch.tensor([0.25, 0.0625]),
    }


@image("BriaTransformer2DModel", FLUX)
def bria(draw: Draw) -> dict:
    """Packed latents and text, timesteps up to 1000."""
    return packed(draw) | {"timestep": draw.steps()}


@image(
    "BriaFiboTransformer2DModel",
    FLUX | {"guidance_embeds": True, "text_encoder_dim": 80},
    timesteps=("timestep", "guidance"),
)
def bria_fibo(draw: Draw) -> dict:
    """Packed latents, text, guidance, and text features (2, 7, 80) for each of the 4 blocks."""
    return packed(draw) | {
        "timestep": draw.steps(),
        "guidance": torch.tensor([4.0, 2.0]),
        "text_encoder_layers": [draw.normal(2, 7, 80) for _ in range(4)],
    }


@image(
    "BriaFibo2Transformer2DModel",
    {
        "in_channels": 16,
        "dim": 128,
        "n_layers": 3,
        "n_refiner_layers": 2,
        "n_heads": 4,
        "cap_feat_dim": 96,
        "injection_layer_ids": (0, 2),
        "perceiver_num_layers": 2,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_dims": (8, 12, 12),
        "axes_lens": (64, 32, 32),
    },
)
def bria_fibo2(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8) and 7 text tokens in 3 layers of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(2, 3, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }


@image("OvisImageTransformer2DModel", FLUX | {"out_channels": 64})
def ovis(draw: Draw) -> dict:
    """Packed latents and text."""
    return packed(draw)


@image("LongCatImageTransformer2DModel", FLUX | {"pooled_projection_dim": 96})
def longcat_image(draw: Draw) -> dict:
    """Packed latents and text."""
    return packed(draw)


@image(
    "HunyuanImageTransformer2DModel",
    HEADS
    | {
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "guidance_embeds": True,
        "text_embed_dim": 96,
        "text_embed_2_dim": 80,
        "rope_axes_dim": (16, 16),
        "use_meanflow": True,
    },
    timesteps=("timestep", "timestep_r", "guidance"),
)
def hunyuan_image(draw: Draw) -> dict:
    """Latents (2, 64, 6, 4), two text sequences (7 of width 96, 6 of width 80) with masks."""
    return {
        "hidden_states": draw.normal(2, 64, 6, 4),
        "timestep": draw.steps().to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "timestep_r": torch.tensor([250.0, 64.0]).to(draw.dtype),
        "encoder_hidden_states_2": draw.normal(2, 6, 80),
        "encoder_attention_mask_2": torch.ones(2, 6, dtype=torch.int64),
        "guidance": torch.tensor([4000.0, 2000.0]).to(draw.dtype),
        "return_dict": False,
    }


@image(
    "HiDreamImageTransformer2DModel",
    HEADS
    | {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "caption_channels": [96, 80],
        "text_emb_dim": 64,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (16, 16),
        "llama_layers": [0, 1, 2, 2],
    },
    timesteps=("timesteps",),
)
def hidream(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8), T5 tokens (2, 7, 96), Llama tokens (3 layers, 2, 6, 80), pooled text (2, 64)."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.normal(2, 7, 96),
        "encoder_hidden_states_llama3": draw.normal(3, 2, 6, 80),
        "pooled_embeds": draw.normal(2, 64),
        "return_dict": False,
    }


@image(
    "Krea2Transformer2DModel",
    HEADS
    | {
        "num_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 192,
        "timestep_embed_dim": 64,
        "text_hidden_dim": 96,
        "num_text_layers": 3,
        "text_num_attention_heads": 3,
        "text_num_key_value_heads": 3,
        "text_intermediate_size": 128,
        "axes_dims_rope": (8, 12, 12),
    },
)
def krea2(draw: Draw) -> dict:
    """Packed latents (2, 24, 64), 7 text tokens in 3 layers of width 96 with a mask, positions (31, 3)."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 3, 96),
        "timestep": draw.steps(1.0),
        "position_ids": torch.cat([torch.zeros(7, 3), ids(1, 4, 6)]),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }


@image(
    "QwenImage21Transformer2DModel",
    HEADS | {"num_layers": 2, "context_in_dim": 96, "mlp_ratio": 2, "axes_dims_rope": (8, 12, 12)},
)
def qwen_image_21(draw: Draw) -> dict:
    """Packed latents (2, 24, 64) that fill 6 slots of 4 tokens after 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(1.0),
        "img_shapes": [[(1, 4, 6)]] * 2,
        "img_mask": (torch.arange(13) >= 7).expand(2, 13),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }
