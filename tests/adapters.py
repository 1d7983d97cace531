"""What users put on a tiny pipeline: an IP-Adapter, LoRAs, a ControlNet; with random weights from a seed."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

TINY = Path(__file__).resolve().parents[1] / "pipelines" / "tiny"
IMAGE = 32  # width of the image embeddings of the IP-Adapter


def tiny(name: str = "tiny-sd", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """An embedded pipeline, without a progress bar."""
    pipe = DiffusionPipeline.from_pretrained(str(TINY / name), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ip_adapter(unet: nn.Module, seed: int = 0) -> dict:
    """The state of an IP-Adapter for a UNet as its files have it, in fp32."""
    dice = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=dice)
    width, state, key = unet.config.cross_attention_dim, {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            rows = unet.config.block_out_channels[-1] if name.startswith("mid") else _rows(unet, name)
            state |= {f"{key}.to_{part}_ip.weight": 0.1 * draw(rows, width) for part in ("k", "v")}
            key += 2
    proj = {"proj.weight": 0.1 * draw(4 * width, IMAGE), "proj.bias": torch.zeros(4 * width)}
    return {
        "image_proj": {**proj, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": state,
    }


def _rows(unet: nn.Module, name: str) -> int:
    side, block, *_ = name.split(".")
    widths = unet.config.block_out_channels
    return (widths if side == "down_blocks" else widths[::-1])[int(block)]


def add_ip_adapter(unet: nn.Module, seed: int = 0) -> None:
    """Load an IP-Adapter into a UNet, quantized or not, as `pipe.load_ip_adapter` does."""
    unet._load_ip_adapter_weights([ip_adapter(unet, seed)])


def image_prompt(dtype: torch.dtype = torch.float32) -> dict:
    """UNet arguments of an image prompt."""
    embeds = torch.randn(1, 1, IMAGE, generator=torch.Generator().manual_seed(5))
    return {"added_cond_kwargs": {"image_embeds": [embeds.to(dtype)]}}


@torch.no_grad()
def noise(unet: nn.Module, dtype: torch.dtype = torch.float32, **given) -> torch.Tensor:
    """A UNet's output on seeded inputs, fp32."""
    dice = torch.Generator().manual_seed(3)
    x, text = (
        torch.randn(1, 4, 16, 16, generator=dice),
        torch.randn(1, 20, unet.config.cross_attention_dim, generator=dice),
    )
    return unet(x.to(dtype), 500, text.to(dtype), **given).sample.float()


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((value - truth).norm() / truth.norm())
