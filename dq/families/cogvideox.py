"""CogVideoX and CogView: adaLN in every block, image and text tokens side by side."""

from dq.families import Family

BLOCKS = ("transformer_blocks",)

FAMILIES = (
    Family(
        "cogvideox",
        ("CogVideoXTransformer3DModel",),
        BLOCKS,
        modulation=(r"transformer_blocks\.\d+\.norm[12]\.linear$", r"norm_out\.linear$"),
    ),
    Family(
        "cogview",
        ("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
        BLOCKS,
        modulation=(r"transformer_blocks\.\d+\.norm1\.linear$", r"norm_out\.linear$"),
    ),
)
