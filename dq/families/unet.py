"""U-Nets of ResNet and attention blocks: Stable Diffusion 1, 2 and XL, DDPM, AnimateDiff, Stable Video, Kandinsky 3.

Kandinsky 3 has four convolutions in each residual block and projections on its shortcuts, so that errors add up over
some 200 layers in a row: int8 activations of its convolutions leave 21-24 dB of a random model, weight-only 26-29 dB.
"""

from dq.families import Family

BLOCKS = ("down_blocks", "up_blocks", "mid_block")
TIME = r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.resnets\.\d+\."

FAMILIES = (
    Family(
        "unet",
        ("UNet2DConditionModel", "UNet2DModel", "UNetMotionModel", "AudioLDM2UNet2DConditionModel"),
        BLOCKS,
        modulation=(TIME + r"time_emb_proj$",),
    ),
    Family(
        "unet3d",
        ("UNet3DConditionModel", "I2VGenXLUNet"),
        ("transformer_in.transformer_blocks", *BLOCKS),
        modulation=(TIME + r"time_emb_proj$",),
    ),
    Family(
        "stable-video",
        ("UNetSpatioTemporalConditionModel",),
        BLOCKS,
        modulation=(TIME + r"(spatial|temporal)_res_block\.time_emb_proj$",),
    ),
    Family(
        "kandinsky3",
        ("Kandinsky3UNet",),
        ("down_blocks", "up_blocks"),
        modulation=(r"(down|up)_blocks\.\d+\.(\w+\.)+(group|in|out)_norm\.context_mlp\.1$",),
        weight_only=(
            r"(down|up)_blocks\.\d+\.resnets_(in|out)\.\d+\.(\w+\.)*(projection|\w+_projection|\w*(up|down)_sample)$",
            r"(down|up)_blocks\.\d+\.attentions\.\d+\.feed_forward\.\d$",
        ),
    ),
)
