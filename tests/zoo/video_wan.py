"""Video transformers built on Wan's block, and those with packed or cached sequences."""

from __future__ import annotations

import functools

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from .entry import Draw, Entry, ids, register
from .video import HEADS, WAN, latents

ENTRIES: dict[str, Entry] = {}
video = functools.partial(register, ENTRIES, modality="video")


@video(
    "WanAnimateTransformer3DModel",
    WAN
    | {
        "in_channels": 36,
        "latent_channels": 16,
        "image_dim": 80,
        "added_kv_proj_dim": 128,
        "motion_encoder_channel_sizes": {"4": 64, "8": 64, "16": 64},
        "motion_encoder_size": 16,
        "motion_style_dim": 64,
        "motion_dim": 8,
        "motion_encoder_dim": 64,
        "face_encoder_hidden_dim": 64,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
    },
)
def wan_animate(draw: Draw) -> dict:
    """Latents (2, 36, 3, 8, 4), 512 text and 5 image tokens, pose (2, 16, 2, 8, 4), face pixels (2, 3, 8, 16, 16)."""
    return {
        "hidden_states": latents(draw, 36),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 512, 96),
        "encoder_hidden_states_image": draw.normal(2, 5, 80),
        "pose_hidden_states": draw.normal(2, 16, 2, 8, 4),
        "face_pixel_values": draw.normal(2, 3, 8, 16, 16),
        "return_dict": False,
    }


@video(
    "WanAnimate2Transformer3DModel",
    {
        "text_len": 7,
        "in_dim": 36,
        "dim": 128,
        "ffn_dim": 192,
        "freq_dim": 64,
        "text_dim": 96,
        "num_heads": 4,
        "num_layers": 2,
    },
    eager=True,
    note="the generation pass, whose flex attention mask is compiled unless torch.compile is turned off",
)
def wan_animate_2(draw: Draw) -> dict:
    """Two latents (16, 3, 8, 4) with conditions (20, 3, 8, 4), keys of 2 reference frames, image (2, 257, 1280)."""
    cache = WanAnimate2KVCache(2)
    for layer in range(2):
        cache.get(layer).store(draw.normal(2, 16, 4, 32), draw.normal(2, 16, 4, 32))
    return {
        "hidden_states": [draw.normal(16, 3, 8, 4) for _ in range(2)],
        "timestep": draw.steps(),
        "encoder_hidden_states": [draw.normal(7, 96), draw.normal(5, 96)],
        "condition_latents": [draw.normal(20, 3, 8, 4) for _ in range(2)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 24,
        "encoder_hidden_states_image": draw.normal(2, 257, 1280),
        "reference_grid_sizes": torch.tensor([[2, 4, 2]] * 2),
        "origin_len": 5,
        "origin_area": [64, 32],
        "return_dict": False,
    }


ANYFLOW = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"} | {"rope_max_seq_len": 64}


@video("AnyFlowTransformer3DModel", ANYFLOW | {"image_dim": 96}, timesteps=("timestep", "r_timestep"))
def any_flow(draw: Draw) -> dict:
    """Latents (2, 3, 16, 8, 4) frames first, 7 text and 5 image tokens of width 96, a time for every frame (2, 3)."""
    return {
        "hidden_states": draw.normal(2, 3, 16, 8, 4),
        "timestep": draw.steps()[:, None].expand(2, 3),
        "r_timestep": torch.tensor([[250.0] * 3, [64.0] * 3]),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_hidden_states_image": draw.normal(2, 5, 96),
        "return_dict": False,
    }


@video(
    "AnyFlowFARTransformer3DModel",
    ANYFLOW | {"full_chunk_limit": 2, "chunk_partition": (1, 1, 1), "image_dim": 96},
    timesteps=("timestep", "r_timestep"),
)
def any_flow_far(draw: Draw) -> dict:
    """As for AnyFlow, the three frames in three chunks of which the first is compressed."""
    return any_flow(draw) | {"chunk_partition": [1, 1, 1]}


@video(
    "HeliosTransformer3DModel",
    HEADS
    | {
        "text_dim": 96,
        "freq_dim": 64,
        "ffn_dim": 192,
        "num_layers": 2,
        "rope_dim": (12, 10, 10),
    },
)
def helios(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4), histories of 2, 2 and 4 frames with their frame numbers, 7 text tokens of width 96."""
    frames = torch.arange(11).expand(2, 11)
    return {
        "hidden_states": latents(draw),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "indices_hidden_states": frames[:, 8:],
        "indices_latents_history_short": frames[:, 6:8],
        "indices_latents_history_mid": frames[:, 4:6],
        "indices_latents_history_long": frames[:, :4],
        "latents_history_short": draw.normal(2, 16, 2, 8, 4),
        "latents_history_mid": draw.normal(2, 16, 2, 8, 4),
        "latents_history_long": draw.normal(2, 16, 4, 8, 4),
        "return_dict": False,
    }


@video(
    "MiniMaxH3Transformer3DModel",
    HEADS
    | {
        "hidden_size": 128,
        "num_layers": 2,
        "num_refiner_layers": 2,
        "ffn_dim": 192,
        "in_channels": 24,
        "audio_in_channels": 64,
        "text_dim": 80,
        "freq_dim": 64,
        "time_embed_hidden_dim": 128,
        "time_embed_dim": 64,
        "rope_freq_dim": 5,
    },
    note="timestep holds the distinct noise levels of the sequence, not one per sample",
)
def minimax_h3(draw: Draw) -> dict:
    """One layout for both samples: 7 text, 24 video (2, 24, 96) and 5 audio (2, 5, 64) tokens at two noise levels."""
    order = torch.arange(36)
    return {
        "hidden_states": draw.normal(2, 24, 96),
        "audio_hidden_states": draw.normal(2, 5, 64),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "timestep": draw.steps(),
        "timestep_indices": (order >= 7).long(),
        "token_tags": (order >= 7).long() + (order >= 31).long(),
        "position_ids": torch.cat([torch.zeros(7, 3), ids(3, 4, 2), torch.zeros(5, 3)]),
        "video_indices": order[7:31],
        "audio_indices": order[31:],
        "text_indices": order[:7],
        "return_dict": False,
    }


@video(
    "Cosmos3OmniTransformer",
    {
        "head_dim": 32,
        "hidden_size": 128,
        "intermediate_size": 192,
        "latent_channel": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_latent_dim": 64,
        "rope_axes_dim": (6, 5, 5),
        "action_dim": 64,
        "action_gen": True,
        "num_embodiment_domains": 3,
        "sound_dim": 64,
        "sound_gen": True,
        "vocab_size": 80,
    },
    timesteps=("vision_timesteps", "sound_timesteps", "action_timesteps"),
    note="one packed sequence without a batch axis; times are per noisy token; lm_head is not run",
)
def cosmos3(draw: Draw) -> dict:
    """7 text, 2 times 12 vision, 5 sound and 4 action tokens in one sequence of 40."""
    order = torch.arange(40)
    return {
        "input_ids": draw.below(80, 7),
        "text_indexes": order[:7],
        "position_ids": order.expand(3, 40),
        "und_len": 7,
        "sequence_length": 40,
        "vision_tokens": [draw.normal(1, 16, 2, 4, 6) for _ in range(2)],
        "vision_token_shapes": [(2, 2, 3)] * 2,
        "vision_sequence_indexes": order[7:31],
        "vision_mse_loss_indexes": order[7:31],
        "vision_timesteps": draw.steps().repeat_interleave(12),
        "vision_noisy_frame_indexes": [order[:2]] * 2,
        "sound_tokens": [draw.normal(64, 5)],
        "sound_token_shapes": [(5, 1, 1)],
        "sound_sequence_indexes": order[31:36],
        "sound_mse_loss_indexes": order[31:36],
        "sound_timesteps": torch.full((5,), 500.0),
        "sound_noisy_frame_indexes": [order[:5]],
        "action_tokens": [draw.normal(4, 64)],
        "action_token_shapes": [(4, 1, 1)],
        "action_sequence_indexes": order[36:],
        "action_mse_loss_indexes": order[36:],
        "action_timesteps": torch.full((4,), 500.0),
        "action_noisy_frame_indexes": [order[:4]],
        "action_domain_ids": [torch.tensor(1)],
        "return_dict": False,
    }
