"""FLUX and its relatives: double-stream blocks, then single-stream blocks, adaLN inside or shared."""

from dq.families import Family

BLOCKS = ("transformer_blocks", "single_transformer_blocks")

FAMILIES = (
    Family(
        "flux",
        (
            "FluxTransformer2DModel",
            "BriaTransformer2DModel",
            "BriaFiboTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ),
        BLOCKS,
        modulation=(
            r"transformer_blocks\.\d+\.norm1(_context)?\.linear$",
            r"single_transformer_blocks\.\d+\.norm\.linear$",
            r"norm_out\.linear$",
        ),
    ),
    Family(
        "flux2",
        ("Flux2Transformer2DModel",),
        BLOCKS,
        modulation=(
            r"double_stream_modulation_(img|txt)\.linear$",
            r"single_stream_modulation\.linear$",
            r"norm_out\.linear$",
        ),
    ),
    Family("chroma", ("ChromaTransformer2DModel",), ("distilled_guidance_layer.layers", *BLOCKS)),
)
