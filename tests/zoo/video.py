"""Video transformers: the CogVideoX, HunyuanVideo, LTX, Mochi and Wan families and their neighbours."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, register

ENTRIES: dict[str, Entry] = {}
video = functools.partial(register, ENTRIES, modality="video")

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
WAN = {**HEADS, "text_dim": 96, "freq_dim": 64, "ffn_dim": 192, "num_layers": 2, "rope_max_seq_len": 32}


def latents(draw: Draw, channels: int = 16) -> torch.Tensor:
    """(2, channels, 3, 8, 4) latents: 3 frames of 8 by 4."""
    return draw.normal(2, channels, 3, 8, 4)


@video("WanTransformer3DModel", WAN | {"image_dim": 80, "added_kv_proj_dim": 128})
def wan(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4), 512 text tokens of width 96 (the class counts on 512), 5 image tokens of width 80."""
    return {
        "hidden_states": latents(draw),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 512, 96),
        "encoder_hidden_states_image": draw.normal(2, 5, 80),
        "return_dict": False,
    }


@video("ChronoEditTransformer3DModel", WAN | {"image_dim": 80, "added_kv_proj_dim": 128, "rope_temporal_skip_len": 4})
def chrono_edit(draw: Draw) -> dict:
    """As for Wan with 2 frames."""
    return wan(draw) | {"hidden_states": draw.normal(2, 16, 2, 8, 4)}


@video(
    "SkyReelsV2Transformer3DModel",
    WAN | {"image_dim": 80, "added_kv_proj_dim": 128, "inject_sample_info": True},
)
def sky_reels(draw: Draw) -> dict:
    """As for Wan, plus a frame-rate class (2,)."""
    return wan(draw) | {"fps": torch.tensor([0, 1])}


@video("WanVACETransformer3DModel", WAN | {"num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 24})
def wan_vace(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4), control latents (2, 24, 3, 8, 4), 7 text tokens of width 96."""
    return {
        "hidden_states": latents(draw),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "control_hidden_states": latents(draw, 24),
        "return_dict": False,
    }


@video(
    "HunyuanVideoTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 96,
        "pooled_projection_dim": 80,
        "rope_axes_dim": (8, 12, 12),
    },
    timesteps=("timestep", "guidance"),
)
def hunyuan_video(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4), 7 text tokens of width 96 (the second sample has 5), pooled text of width 80."""
    return {
        "hidden_states": latents(draw),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "pooled_projections": draw.normal(2, 80),
        "guidance": torch.tensor([4000.0, 2000.0]).to(draw.dtype),
        "return_dict": False,
    }


@video(
    "HunyuanVideo15Transformer3DModel",
    HEADS
    | {
        "in_channels": 17,
        "out_channels": 8,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 96,
        "text_embed_2_dim": 80,
        "image_embed_dim": 64,
        "rope_axes_dim": (8, 12, 12),
        "use_meanflow": True,
    },
    timesteps=("timestep", "timestep_r"),
)
def hunyuan_video_15(draw: Draw) -> dict:
    """Latents (2, 17, 3, 8, 4), two text sequences (7 of width 96, 6 of width 80), 5 image tokens of width 64."""
    return {
        "hidden_states": latents(draw, 17),
        "timestep": draw.steps().to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "timestep_r": torch.tensor([250.0, 64.0]).to(draw.dtype),
        "encoder_hidden_states_2": draw.normal(2, 6, 80),
        "encoder_attention_mask_2": torch.ones(2, 6, dtype=torch.int64),
        "image_embeds": draw.normal(2, 5, 64),
        "return_dict": False,
    }


@video(
    "HunyuanVideoFramepackTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 2,
        "text_embed_dim": 96,
        "pooled_projection_dim": 80,
        "rope_axes_dim": (8, 12, 12),
        "has_image_proj": True,
        "image_proj_dim": 64,
        "has_clean_x_embedder": True,
    },
    timesteps=("timestep", "guidance"),
)
def framepack(draw: Draw) -> dict:
    """As for HunyuanVideo, plus 5 image tokens of width 64 and clean latents of 2, 2 and 4 frames."""
    indices = torch.arange(11)
    return hunyuan_video(draw) | {
        "image_embeds": draw.normal(2, 5, 64),
        "indices_latents": indices[:3],
        "latents_clean": draw.normal(2, 16, 2, 8, 4),
        "indices_latents_clean": indices[3:5],
        "latents_history_2x": draw.normal(2, 16, 2, 8, 4),
        "indices_latents_history_2x": indices[5:7],
        "latents_history_4x": draw.normal(2, 16, 4, 8, 4),
        "indices_latents_history_4x": indices[7:11],
    }


@video(
    "CogVideoXTransformer3DModel",
    HEADS
    | {
        "time_embed_dim": 64,
        "text_embed_dim": 96,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 7,
        "ofs_embed_dim": 64,
        "use_rotary_positional_embeddings": True,
    },
    timesteps=("timestep", "ofs"),
)
def cog_video(draw: Draw) -> dict:
    """Latents (2, 3, 16, 8, 4) frames first, 7 text tokens of width 96, rotary tables (24, 32)."""
    angles = draw.normal(24, 32, dtype=torch.float32)
    return {
        "hidden_states": draw.normal(2, 3, 16, 8, 4),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "ofs": torch.tensor([2.0, 2.0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


@video(
    "ConsisIDTransformer3DModel",
    HEADS
    | {
        "attention_head_dim": 24,
        "time_embed_dim": 64,
        "text_embed_dim": 96,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 7,
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 32,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 80,
        "LFE_vit_dim": 64,
        "LFE_depth": 5,
        "LFE_dim_head": 32,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 4,
        "LFE_output_dim": 64,
        "LFE_ff_mult": 2,
        "LFE_num_scale": 5,
    },
)
def consis_id(draw: Draw) -> dict:
    """Latents (2, 3, 16, 8, 4) frames first, 7 text tokens of width 96, face features (80 and 5 times 5 x 64)."""
    return {
        "hidden_states": draw.normal(2, 3, 16, 8, 4),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "id_cond": draw.normal(2, 80),
        "id_vit_hidden": [draw.normal(2, 5, 64) for _ in range(5)],
        "return_dict": False,
    }


@video(
    "LTXVideoTransformer3DModel",
    HEADS
    | {"in_channels": 64, "out_channels": 64, "cross_attention_dim": 128, "num_layers": 2, "caption_channels": 96},
)
def ltx(draw: Draw) -> dict:
    """Packed latents (2, 24, 64) of 3 frames of 4 by 2, 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "num_frames": 3,
        "height": 4,
        "width": 2,
        "return_dict": False,
    }


@video(
    "MochiTransformer3DModel",
    HEADS
    | {
        "num_layers": 3,
        "pooled_projection_dim": 64,
        "text_embed_dim": 96,
        "time_embed_dim": 64,
        "max_sequence_length": 7,
    },
)
def mochi(draw: Draw) -> dict:
    """Latents (2, 12, 3, 8, 4) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": latents(draw, 12),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }


@video(
    "AllegroTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "cross_attention_dim": 128,
        "sample_height": 8,
        "sample_width": 4,
        "sample_frames": 3,
        "caption_channels": 96,
    },
)
def allegro(draw: Draw) -> dict:
    """Latents (2, 4, 3, 8, 4) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": latents(draw, 4),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "return_dict": False,
    }


@video(
    "LatteTransformer3DModel",
    HEADS
    | {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 128,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 96,
        "video_length": 3,
    },
)
def latte(draw: Draw) -> dict:
    """Latents (2, 4, 3, 8, 8) and 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 4, 3, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "return_dict": False,
    }


@video(
    "CosmosTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "concat_padding_mask": False,
        "text_embed_dim": 96,
        "adaln_lora_dim": 64,
        "max_size": (8, 16, 16),
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": 80,
        "encoder_hidden_states_channels": 96,
    },
)
def cosmos(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4), 7 text tokens of width 80."""
    return {
        "hidden_states": latents(draw),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "fps": 16,
        "return_dict": False,
    }


@video(
    "SanaVideoTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 128,
        "caption_channels": 96,
        "sample_size": 8,
    },
)
def sana_video(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": latents(draw),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "return_dict": False,
    }
