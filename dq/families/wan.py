"""Wan 2.1 and 2.2 and what is built on them: modulation by tables and one projection of the timestep."""

from dq.families import Family

PROJECTION = (r"condition_embedder\.time_proj$",)

FAMILIES = (
    Family(
        "wan",
        ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
        ("blocks",),
        modulation=PROJECTION,
    ),
    Family("wan-vace", ("WanVACETransformer3DModel",), ("blocks", "vace_blocks"), modulation=PROJECTION),
    Family("wan-animate", ("WanAnimateTransformer3DModel",), ("blocks", "face_adapter"), modulation=PROJECTION),
)
