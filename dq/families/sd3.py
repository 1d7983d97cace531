"""Multimodal DiTs with adaLN in every block: Stable Diffusion 3, AuraFlow."""

from dq.families import Family

FAMILIES = (
    Family(
        "sd3",
        ("SD3Transformer2DModel",),
        ("transformer_blocks",),
        modulation=(r"transformer_blocks\.\d+\.norm1(_context)?\.linear$", r"norm_out\.linear$"),
    ),
    Family(
        "auraflow",
        ("AuraFlowTransformer2DModel",),
        ("joint_transformer_blocks", "single_transformer_blocks"),
        modulation=(
            r"joint_transformer_blocks\.\d+\.norm1(_context)?\.linear$",
            r"single_transformer_blocks\.\d+\.norm1\.linear$",
            r"norm_out\.linear$",
        ),
    ),
)
