"""HunyuanVideo and HunyuanImage: FLUX's blocks behind a small refiner of the text tokens."""

from dq.families import Family

REFINER = "context_embedder.token_refiner.refiner_blocks"
MODULATION = (
    r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear$",
    r"transformer_blocks\.\d+\.norm1(_context)?\.linear$",
    r"norm_out\.linear$",
)

FAMILIES = (
    Family(
        "hunyuan-video",
        (
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanImageTransformer2DModel",
        ),
        (REFINER, "transformer_blocks", "single_transformer_blocks"),
        modulation=(*MODULATION, r"single_transformer_blocks\.\d+\.norm\.linear$"),
    ),
    Family(
        "hunyuan-video-1.5",
        ("HunyuanVideo15Transformer3DModel",),
        (REFINER, "transformer_blocks"),
        modulation=MODULATION,
    ),
)
