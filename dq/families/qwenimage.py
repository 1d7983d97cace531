"""Qwen-Image: double-stream blocks, modulation by one linear a stream in every block."""

from dq.families import Family

FAMILIES = (
    Family(
        "qwen-image",
        ("QwenImageTransformer2DModel",),
        ("transformer_blocks",),
        modulation=(r"transformer_blocks\.\d+\.(img|txt)_mod\.1$", r"norm_out\.linear$"),
    ),
)
