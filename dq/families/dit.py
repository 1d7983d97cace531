"""DiT and Hunyuan-DiT: adaLN with a timestep (and class) embedder of its own in every block, or one for all."""

from dq.families import Family

FAMILIES = (
    Family(
        "dit",
        ("DiTTransformer2DModel",),
        ("transformer_blocks",),
        modulation=(r"transformer_blocks\.\d+\.norm1\.(linear|emb\.timestep_embedder\.linear_\d)$",),
    ),
    Family(
        "hunyuan-dit",
        ("HunyuanDiT2DModel",),
        ("blocks",),
        modulation=(r"blocks\.\d+\.norm1\.linear$", r"norm_out\.linear$"),
        keep=(r"time_extra_emb\.pooler\.[qkvc]_proj$",),
    ),
)
