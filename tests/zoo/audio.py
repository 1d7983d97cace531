"""Audio denoisers."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, register

ENTRIES: dict[str, Entry] = {}
audio = functools.partial(register, ENTRIES, modality="audio")


@audio(
    "StableAudioDiTModel",
    {
        "sample_size": 24,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 64,
        "time_proj_dim": 64,
        "global_states_input_dim": 80,
        "cross_attention_input_dim": 96,
    },
)
def stable_audio(draw: Draw) -> dict:
    """Latents (2, 64, 24), 7 text tokens of width 96, global states (2, 1, 80), rotary tables (25, 16)."""
    angles = draw.normal(25, 16, dtype=torch.float32)
    return {
        "hidden_states": draw.normal(2, 64, 24),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "global_hidden_states": draw.normal(2, 1, 80),
        "rotary_embedding": (angles.cos(), angles.sin()),
        "return_dict": False,
    }


@audio(
    "StableAudio3DiTModel",
    {
        "io_channels": 64,
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 4,
        "cond_token_dim": 96,
        "global_cond_dim": 80,
        "local_add_cond_dim": 72,
        "timestep_features_dim": 64,
        "ff_mult": 2.0,
        "num_memory_tokens": 4,
    },
)
def stable_audio_3(draw: Draw) -> dict:
    """Latents (2, 64, 24), 7 text tokens of width 96 with a mask, global states (2, 80), local states (2, 72, 24)."""
    return {
        "hidden_states": draw.normal(2, 64, 24),
        "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "global_hidden_states": draw.normal(2, 80),
        "encoder_attention_mask": torch.tensor([[True] * 7, [True] * 5 + [False] * 2]),
        "local_add_cond": draw.normal(2, 72, 24),
        "return_dict": False,
    }


@audio(
    "AceStepTransformer1DModel",
    {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "in_channels": 192,
        "audio_acoustic_hidden_dim": 64,
        "sliding_window": 8,
        "encoder_hidden_size": 96,
    },
    timesteps=("timestep", "timestep_r"),
)
def ace_step(draw: Draw) -> dict:
    """Latents (2, 24, 64), context latents (2, 24, 128), 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "timestep_r": torch.tensor([0.25, 0.0625]).to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "context_latents": draw.normal(2, 24, 128),
        "return_dict": False,
    }


@audio(
    "LongCatAudioDiTTransformer",
    {"dit_dim": 128, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 96, "latent_dim": 64, "ff_mult": 2.0},
)
def longcat_audio(draw: Draw) -> dict:
    """Latents and prompt latents (2, 24, 64), 7 text tokens of width 96, masks."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "timestep": draw.steps(1.0),
        "attention_mask": torch.ones(2, 24, dtype=torch.bool),
        "latent_cond": draw.normal(2, 24, 64),
        "return_dict": False,
    }


@audio(
    "MiniMaxMusic3Transformer1DModel",
    {
        "in_channels": 64,
        "condition_dim": 80,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "ff_inner_dim": 192,
        "rotary_dim": 16,
        "fourier_embedding_dim": 64,
    },
)
def minimax_music(draw: Draw) -> dict:
    """Latents (2, 64, 24) with a condition of width 80 for each of the 24 frames."""
    return {
        "hidden_states": draw.normal(2, 64, 24),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 24, 80),
        "return_dict": False,
    }


@audio(
    "MiniMaxMusic3RVQDepthDecoder",
    {
        "hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "audio_vocab_size": 64,
        "num_codebooks": 4,
        "max_position_embeddings": 8,
    },
    timesteps=(),
    note="no timestep: predicts codes one after another; the pipeline applies audio_heads and audio_embeddings itself",
)
def minimax_depth(draw: Draw) -> dict:
    """Embedded codes (2, 6, 128)."""
    return {"inputs_embeds": draw.normal(2, 6, 128)}


@audio(
    "T5FilmDecoder",
    {"input_dims": 64, "targets_length": 24, "d_model": 64, "num_layers": 2, "num_heads": 2, "d_kv": 32, "d_ff": 128},
    timesteps=("decoder_noise_time",),
)
def t5_film(draw: Draw) -> dict:
    """Spectrogram frames (2, 24, 64) and 7 note tokens of width 64 with a mask."""
    return {
        "encodings_and_masks": [(draw.normal(2, 7, 64), torch.ones(2, 7))],
        "decoder_input_tokens": draw.normal(2, 24, 64),
        "decoder_noise_time": draw.steps(1.0),
    }


@audio(
    "AudioLDM2UNet2DConditionModel",
    {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": ([None, 80, 72], [None, 80, 72]),
        "attention_head_dim": 2,
    },
    kind="unet",
)
def audio_ldm2(draw: Draw) -> dict:
    """Latents (2, 8, 8, 8), two text sequences (7 of width 80, 6 of width 72)."""
    return {
        "sample": draw.normal(2, 8, 8, 8),
        "timestep": draw.integer_steps(),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "encoder_hidden_states_1": draw.normal(2, 6, 72),
        "return_dict": False,
    }
