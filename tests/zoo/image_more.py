"""Image transformers of other builds: single streams, language-model blocks, expert layers, inner blocks, priors."""

from __future__ import annotations

import functools

import torch

from .entry import Draw, Entry, ids, register
from .image import HEADS

ENTRIES: dict[str, Entry] = {}
image = functools.partial(register, ENTRIES, modality="image")

COGVIEW = {
    **HEADS,
    "num_layers": 2,
    "text_embed_dim": 96,
    "time_embed_dim": 64,
    "condition_dim": 64,
}


def sizes(height: int, width: int) -> torch.Tensor:
    """(2, 2) float32: the same height and width for both samples."""
    return torch.tensor([[float(height), float(width)]] * 2)


@image("CogView3PlusTransformer2DModel", COGVIEW | {"pos_embed_max_size": 16, "sample_size": 16})
def cogview3(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8), 7 text tokens of width 96, sizes and crop."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "timestep": draw.integer_steps(),
        "original_size": sizes(96, 64),
        "target_size": sizes(96, 64),
        "crop_coords": sizes(0, 0),
        "return_dict": False,
    }


@image(
    "CogView4Transformer2DModel", COGVIEW | {"pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (16, 16)}
)
def cogview4(draw: Draw) -> dict:
    """As for CogView3."""
    return cogview3(draw)


@image("GlmImageTransformer2DModel", COGVIEW | {"prior_vq_quantizer_codebook_size": 64})
def glm_image(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8), 7 glyph tokens of width 96, prior tokens (2, 24) of which none is dropped."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "prior_token_id": draw.below(64, 2, 24),
        "prior_token_drop": torch.zeros(2, 24, dtype=torch.bool),
        "timestep": draw.integer_steps(),
        "target_size": sizes(96, 64),
        "crop_coords": sizes(0, 0),
        "return_dict": False,
    }


@image(
    "ErnieImageTransformer2DModel",
    {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_layers": 2,
        "ffn_hidden_size": 192,
        "in_channels": 64,
        "out_channels": 64,
        "text_in_dim": 96,
        "rope_axes_dim": (8, 12, 12),
    },
)
def ernie_image(draw: Draw) -> dict:
    """Latents (2, 64, 6, 4) and up to 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 64, 6, 4),
        "timestep": draw.steps(),
        "text_bth": draw.normal(2, 7, 96),
        "text_lens": torch.tensor([7, 5]),
        "return_dict": False,
    }


@image(
    "Ideogram4Transformer2DModel",
    {
        "in_channels": 64,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "adaln_dim": 64,
        "llm_features_dim": 96,
        "mrope_section": (6, 5, 5),
    },
)
def ideogram4(draw: Draw) -> dict:
    """One sequence of 7 text and 24 image tokens: latents (2, 31, 64), text features (2, 31, 96), positions."""
    positions = torch.cat([torch.arange(7)[:, None].expand(7, 3), 7 + ids(1, 4, 6).long()])
    return {
        "hidden_states": draw.normal(2, 31, 64),
        "timestep": draw.steps(1.0).to(draw.dtype),
        "encoder_hidden_states": draw.normal(2, 31, 96),
        "position_ids": positions.expand(2, 31, 3),
        "segment_ids": torch.zeros(2, 31, dtype=torch.int64),
        "indicator": torch.tensor([3] * 7 + [2] * 24).expand(2, 31),
        "return_dict": False,
    }


JOY = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "text_dim": 96,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}


@image("JoyImageEditTransformer3DModel", JOY)
def joy_image_edit(draw: Draw) -> dict:
    """Latents (2, 16, 1, 12, 8) and 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 16, 1, 12, 8),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "return_dict": False,
    }


@image("JoyImageEditPlusTransformer3DModel", JOY)
def joy_image_edit_plus(draw: Draw) -> dict:
    """Patches (2, 30, 16, 1, 2, 2) of a 4 by 6 target and a 2 by 3 reference, 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 30, 16, 1, 2, 2),
        "timestep": draw.steps(),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_hidden_states_mask": torch.ones(2, 7),
        "shape_list": [[(1, 4, 6), (1, 2, 3)]] * 2,
        "return_dict": False,
    }


@image(
    "OmniGenTransformer2DModel",
    {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 80,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16},
        "pos_embed_max_size": 16,
        "time_step_dim": 64,
    },
)
def omnigen(draw: Draw) -> dict:
    """Latents (2, 4, 12, 8) after 7 text tokens and the time token; mask (2, 32, 32), positions (2, 32)."""
    return {
        "hidden_states": draw.normal(2, 4, 12, 8),
        "timestep": draw.steps(1.0),
        "input_ids": 1 + draw.below(79, 2, 7),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(2, 32, 32, dtype=torch.int64),
        "position_ids": torch.arange(32).expand(2, 32),
        "return_dict": False,
    }


@image(
    "PRXTransformer2DModel",
    {
        "context_in_dim": 96,
        "hidden_size": 128,
        "mlp_ratio": 2.0,
        "num_heads": 4,
        "depth": 2,
        "axes_dim": [16, 16],
        "bottleneck_size": 64,
        "resolution_embeds": True,
    },
)
def prx(draw: Draw) -> dict:
    """Latents (2, 16, 12, 8) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 16, 12, 8),
        "timestep": draw.steps(1.0),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }


@image(
    "ZImageTransformer2DModel",
    {
        "dim": 128,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 96,
        "axes_dims": [8, 12, 12],
        "axes_lens": [128, 32, 32],
    },
    timesteps=("t",),
)
def z_image(draw: Draw) -> dict:
    """Two latents (16, 1, 12, 8) and two captions (7, 96) and (5, 96), as lists."""
    return {
        "x": [draw.normal(16, 1, 12, 8) for _ in range(2)],
        "t": draw.steps(1.0),
        "cap_feats": [draw.normal(7, 96), draw.normal(5, 96)],
        "return_dict": False,
    }


@image(
    "NucleusMoEImageTransformer2DModel",
    HEADS
    | {
        "num_layers": 4,
        "num_key_value_heads": 2,
        "joint_attention_dim": 96,
        "axes_dims_rope": (8, 12, 12),
        "mlp_ratio": 2.0,
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 64,
        "capacity_factors": 2.0,
    },
)
def nucleus_moe(draw: Draw) -> dict:
    """Packed latents (2, 24, 64) and 7 text tokens of width 96 with a mask."""
    return {
        "hidden_states": draw.normal(2, 24, 64),
        "img_shapes": [(1, 4, 6)] * 2,
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.bool),
        "timestep": draw.steps(1.0),
        "return_dict": False,
    }


@image(
    "Transformer2DModel",
    HEADS | {"in_channels": 64, "num_layers": 2, "cross_attention_dim": 96},
    timesteps=(),
    note="the attention block inside UNets; no timestep in this configuration",
)
def transformer_2d(draw: Draw) -> dict:
    """Feature maps (2, 64, 6, 4) and 7 text tokens of width 96."""
    return {
        "hidden_states": draw.normal(2, 64, 6, 4),
        "encoder_hidden_states": draw.normal(2, 7, 96),
        "return_dict": False,
    }


@image(
    "DreamLiteTransformer2DModel",
    HEADS | {"in_channels": 64, "num_layers": 2, "cross_attention_dim": 96, "qk_norm": "rms_norm"},
    timesteps=(),
    note="the attention block inside DreamLiteUNetModel; no timestep",
)
def dreamlite_transformer(draw: Draw) -> dict:
    """Feature maps (2, 64, 6, 4) and 7 text tokens of width 96."""
    return transformer_2d(draw)


@image(
    "PriorTransformer",
    HEADS | {"num_layers": 2, "embedding_dim": 80, "num_embeddings": 7, "additional_embeddings": 4},
)
def prior(draw: Draw) -> dict:
    """Image embedding (2, 80), text embedding (2, 80), 7 text tokens of width 80 with a mask."""
    return {
        "hidden_states": draw.normal(2, 80),
        "timestep": draw.integer_steps(),
        "proj_embedding": draw.normal(2, 80),
        "encoder_hidden_states": draw.normal(2, 7, 80),
        "attention_mask": torch.ones(2, 7, dtype=torch.bool),
        "return_dict": False,
    }
