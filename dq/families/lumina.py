"""Lumina 2 and Z-Image: refiners of noise and text, then one stream of blocks with adaLN."""

from dq.families import Family

BLOCKS = ("noise_refiner", "context_refiner", "layers")

FAMILIES = (
    Family(
        "lumina2",
        ("Lumina2Transformer2DModel",),
        BLOCKS,
        modulation=(r"(layers|noise_refiner)\.\d+\.norm1\.linear$",),
    ),
    Family(
        "z-image",
        ("ZImageTransformer2DModel",),
        BLOCKS,
        timestep="t",
        modulation=(
            r"(layers|noise_refiner)\.\d+\.adaLN_modulation\.\d$",
            r"all_final_layer\.[\d-]+\.adaLN_modulation\.\d$",
        ),
    ),
)
