"""adaLN-single: one modulation projection for all blocks (PixArt, Latte, Allegro, Sana, LTX-Video)."""

from dq.families import Family

BLOCKS = ("transformer_blocks",)

FAMILIES = (
    Family(
        "pixart",
        ("PixArtTransformer2DModel", "AllegroTransformer3DModel"),
        BLOCKS,
        modulation=(r"adaln_single\.linear$",),
    ),
    Family(
        "latte",
        ("LatteTransformer3DModel",),
        (*BLOCKS, "temporal_transformer_blocks"),
        modulation=(r"adaln_single\.linear$",),
    ),
    Family(
        "sana",
        ("SanaTransformer2DModel", "SanaVideoTransformer3DModel"),
        BLOCKS,
        modulation=(r"time_embed\.linear$",),
    ),
    Family("ltx", ("LTXVideoTransformer3DModel",), BLOCKS, modulation=(r"time_embed\.linear$",)),
    Family(
        "ltx2",
        ("LTX2VideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel"),
        BLOCKS,
        modulation=(r"(audio_)?time_embed\.linear$",),
    ),
)
