"""The transformer that denoises molecules: continuous coordinates and latents instead of pixels or sound."""

from __future__ import annotations

import torch

from .entry import Draw, Entry, register

ENTRIES: dict[str, Entry] = {}


@register(
    ENTRIES,
    "RFD4ProteinaTransformer",
    {
        "nlayers": 3,
        "token_dim": 128,
        "nheads": 4,
        "dim_cond": 64,
        "pair_repr_dim": 64,
        "latent_dim": 32,
        "token_type_emb_dim": 16,
        "t_emb_dim": 64,
        "tri_mult_c": 64,
        "num_sequence_classes": 64,
        "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
        "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
        "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
        "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents"),
    },
    "molecule",
    timesteps=("bb_ca_time", "local_latents_time"),
)
def rfd4(draw: Draw) -> dict:
    """12 tokens: coordinates (2, 12, 3), latents (2, 12, 32), token types (2, 12), bonds (2, 12, 12)."""
    return {
        "bb_ca": draw.normal(2, 12, 3),
        "local_latents": draw.normal(2, 12, 32),
        "bb_ca_time": draw.steps(1.0),
        "local_latents_time": torch.tensor([0.25, 0.0625]),
        "padding_mask": torch.ones(2, 12, dtype=torch.bool),
        "token_type": draw.below(7, 2, 12),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(2, 12, dtype=torch.bool),
            "supports_local_latent": torch.ones(2, 12, dtype=torch.bool),
            "bond_mask": draw.below(2, 2, 12, 12),
        },
        "recycle_depth": 2,
        "return_dict": False,
    }
