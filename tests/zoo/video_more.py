"""Video transformers of other builds: EasyAnimate, Kandinsky 5 and 6, LTX-2, Motif, SANA-WM and a temporal block."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, register
from .video import HEADS, latents

ENTRIES: dict[str, Entry] = {}
video = functools.partial(register, ENTRIES, modality="video")


@video(
    "EasyAnimateTransformer3DModel",
    HEADS
    | {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 4,
        "mmdit_layers": 2,
        "time_embed_dim": 64,
        "add_norm_text_encoder": True,
        "text_embed_dim": 96,
    },
)
def easy_animate(draw: Draw) -> dict:
    """Latents (2, 16, 3, 8, 4) and 7 text tokens of width 96."""
    return {
        "hidden_states": latents(draw),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "return_dict": False,
    }


@video(
    "Kandinsky5Transformer3DModel",
    {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 96,
        "in_text_dim2": 80,
        "time_dim": 64,
        "model_dim": 128,
        "ff_dim": 192,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
    },
)
def kandinsky5(draw: Draw) -> dict:
    """Latents (2, 3, 8, 4, 16) channels last, 7 text tokens of width 96, pooled text (2, 80)."""
    return {
        "hidden_states": draw.normal(2, 3, 8, 4, 16),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "pooled_projections": draw.normal(2, 80),
        "visual_rope_pos": (torch.arange(3), torch.arange(4), torch.arange(2)),
        "text_rope_pos": torch.arange(7),
        "return_dict": False,
    }


@video(
    "Kandinsky6Transformer3DModel",
    {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 96,
        "in_text_dim2": 80,
        "time_dim": 64,
        "model_dim": 128,
        "ff_dim": 192,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
        "in_audio_dim": 64,
        "out_audio_dim": 64,
        "model_dim_a": 96,
        "ff_dim_a": 160,
        "axes_dims_a": (8, 12, 12),
        "ca_rope": True,
        "cross_gates": True,
        "visual_token_type_num_embeddings": 2,
    },
)
def kandinsky6(draw: Draw) -> dict:
    """Conditioned latents (2, 3, 8, 4, 33) channels last, audio (2, 5, 64), 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 3, 8, 4, 33),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "pooled_projections": draw.normal(2, 80),
        "timestep": draw.steps(),
        "audio_hidden_states": draw.normal(2, 5, 64),
        "visual_token_type_ids": torch.tensor([[1, 0, 0]] * 2),
        "return_dict": False,
    }


@video(
    "Kandinsky6SRTransformer3DModel",
    {
        "in_visual_dim": 16,
        "out_visual_dim": 64,
        "time_dim": 64,
        "model_dim": 64,
        "ff_dim": 128,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
        "nabla_window": (3, 3, 3),
    },
)
def kandinsky6_sr(draw: Draw) -> dict:
    """Conditioned latents (2, 2, 8, 8, 33) channels last; attention works in tiles of 8 by 8 tokens."""
    return {"hidden_states": draw.normal(2, 2, 8, 8, 33), "timestep": draw.steps(), "return_dict": False}


LTX2 = {
    **HEADS,
    "in_channels": 64,
    "out_channels": 64,
    "cross_attention_dim": 128,
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "num_layers": 2,
    "caption_channels": 96,
}


@video("LTX2VideoTransformer3DModel", LTX2, timesteps=("timestep", "audio_timestep", "sigma", "audio_sigma"))
def ltx2(draw: Draw) -> dict:
    """Packed video (2, 24, 64) of 3 frames of 4 by 2, audio (2, 5, 64), 7 text tokens of width 96 for each."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "audio_hidden_states": draw.normal(2, 5, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "audio_encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "audio_timestep": torch.tensor([250.0, 64.0]),
        "sigma": draw.steps(),
        "audio_sigma": torch.tensor([250.0, 64.0]),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "audio_encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "num_frames": 3,
        "height": 4,
        "width": 2,
        "audio_num_frames": 5,
        "return_dict": False,
    }


@video(
    "SanaWMLTX2RefinerTransformer3DModel",
    {key: value for key, value in LTX2.items() if not key.endswith("cross_attn_mod")},
    note="the LTX-2 layers for audio are there and never run",
)
def sana_wm_refiner(draw: Draw) -> dict:
    """Packed video (2, 24, 64), 7 text tokens of width 96 with a mask, rotary tables (2, 24, 128)."""
    angles = draw.normal(2, 24, 64, dtype=torch.float32).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.steps(),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "return_dict": False,
    }


@video(
    "SanaWMTransformer3DModel",
    {
        "in_channels": 64,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "softmax_every_n": 2,
        "linear_head_dim": 32,
        "caption_channels": 96,
        "mlp_ratio": 2.0,
    },
    bf16=False,
    note="its camera grid refuses bfloat16 on the CPU; on CUDA it takes it",
)
def sana_wm(draw: Draw) -> dict:
    """Latents (2, 64, 3, 4, 4), 7 text tokens of width 96, camera poses (2, 3, 20), rays (2, 48, 3, 4, 4)."""
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])]).expand(2, 3, 20).clone()
    camera[:, :, 3] = torch.arange(3) * 0.1
    return {
        "hidden_states": draw.normal(2, 64, 3, 4, 4),
        "timestep": draw.steps()[:, None, None].expand(2, 1, 3),
        "encoder_hidden_states": draw.normal(2, 1, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "camera_conditions": camera.to(draw.dtype),
        "chunk_plucker": draw.normal(2, 48, 3, 4, 4),
        "return_dict": False,
    }


@video(
    "MotifVideoTransformer3DModel",
    HEADS
    | {
        "num_layers": 2,
        "num_single_layers": 4,
        "num_decoder_layers": 2,
        "text_embed_dim": 96,
        "image_embed_dim": 80,
        "rope_axes_dim": (8, 12, 12),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
)
def motif_video(draw: Draw) -> dict:
    """Latents (2, 33, 3, 8, 4), 7 text tokens of width 96 with a mask, 5 image tokens of width 80."""
    return {
        "hidden_states": latents(draw, 33),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64),
        "image_embeds": draw.normal(2, 5, 80),
        "return_dict": False,
    }


@video(
    "TransformerTemporalModel",
    HEADS | {"in_channels": 64, "num_layers": 2},
    timesteps=(),
    note="the temporal attention block inside UNets; no timestep",
)
def transformer_temporal(draw: Draw) -> dict:
    """Feature maps (6, 64, 6, 4): two samples of 3 frames."""
    return {"hidden_states": draw.normal(6, 64, 6, 4), "num_frames": 3, "return_dict": False}
