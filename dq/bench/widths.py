"""Denoisers of full width and few blocks, of random weights, with inputs: what `dq bench --peers` measures.

The time of a layer depends on its shape and not on its weights, so nothing is downloaded. Every weight is cut from one
pool of normal numbers, matrices scaled by inputs ** -0.5, norms one, biases zero: the same in every process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from accelerate import init_empty_weights
from torch import nn

from dq.errors import DQError, nearest

POOL = 1_048_583  # normal numbers; a prime, so that no two rows of a weight are the same
SEED = 0

PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 64,
    "patch_size": 2,
    "use_additional_conditions": False,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SMALL_PIXART = {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "sample_size": 8}
SMALL_FLUX = {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64}
SMALL_UNET = {"sample_size": 8, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64}


@dataclass(frozen=True)
class Width:
    """A denoiser: its diffusers class and configuration, the sizes of one call, and how a table names it."""

    shown: str
    kind: str
    config: dict
    batch: int
    tokens: int  # latent tokens; a U-Net's latent pixels
    text: int

    def model(self) -> nn.Module:
        """The model on the meta device, buffers real."""
        import diffusers

        with init_empty_weights(include_buffers=False):
            return getattr(diffusers, self.kind)(**self.config)

    def inputs(self, dtype: torch.dtype) -> dict:
        """Arguments of one denoising step."""
        return _INPUTS[self.kind](self, dtype, torch.Generator().manual_seed(SEED))


PIXART_CLASS, FLUX_CLASS, UNET_CLASS = "PixArtTransformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"
WIDTHS = {
    "pixart": Width("PixArt width, 4 blocks, 2 x 1024 tokens", PIXART_CLASS, PIXART | {"num_layers": 4}, 2, 1024, 300),
    "pixart-full": Width("PixArt, 28 blocks, 1024 tokens", PIXART_CLASS, PIXART | {"num_layers": 28}, 1, 1024, 300),
    "flux": Width(
        "FLUX width, 1 double + 2 single blocks, 1536 tokens",
        FLUX_CLASS,
        FLUX | {"num_layers": 1, "num_single_layers": 2},
        1,
        1024,
        512,
    ),
    "flux-deep": Width(
        "FLUX width, 3 double + 6 single blocks, 1536 tokens",
        FLUX_CLASS,
        FLUX | {"num_layers": 3, "num_single_layers": 6},
        1,
        1024,
        512,
    ),
    "unet": Width("SD 1.5 U-Net, 2 x 64 x 64 latents", UNET_CLASS, UNET, 2, 4096, 77),
    "small-pixart": Width(
        "small PixArt", PIXART_CLASS, PIXART | SMALL_PIXART | {"num_layers": 2, "caption_channels": 64}, 2, 16, 5
    ),
    "small-flux": Width(
        "small FLUX", FLUX_CLASS, FLUX | SMALL_FLUX | {"num_layers": 1, "num_single_layers": 1}, 1, 16, 8
    ),
    "small-unet": Width("small U-Net", UNET_CLASS, UNET | SMALL_UNET | {"layers_per_block": 1}, 2, 64, 7),
}
LINEAR = re.compile(r"linear (\d+) x (\d+) -> (\d+)")


class Alone(nn.Module):
    """One linear as a model."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def shown(name: str) -> str:
    """How tables name what `build` makes. DQError for an unknown name."""
    return name if LINEAR.fullmatch(name) else width(name).shown


def width(name: str) -> Width:
    """A model's entry. DQError for an unknown name."""
    if name not in WIDTHS:
        raise DQError(f"model {name!r} is unknown, {nearest(name, WIDTHS)}; or `linear ROWS x INPUTS -> OUTPUTS`")
    return WIDTHS[name]


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A model of WIDTHS, or `linear ROWS x INPUTS -> OUTPUTS`, the same weights in every process."""
    found = LINEAR.fullmatch(name)
    if found:
        with init_empty_weights(include_buffers=False):
            model = Alone(int(found[2]), int(found[3]))
    else:
        model = width(name).model()
    nn.Module.to(model, dtype)  # buffers; parameters are made in it
    for (key, shape), start in zip(_shapes(model), _starts(model), strict=True):
        home, _, leaf = key.rpartition(".")
        value = _values(shape, leaf, start, dtype)
        setattr(model.get_submodule(home), leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


def inputs(name: str, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Keyword arguments of one call of the model."""
    found = LINEAR.fullmatch(name)
    if not found:
        return width(name).inputs(dtype)
    dice = torch.Generator().manual_seed(SEED)
    return {"x": torch.randn(int(found[1]), int(found[2]), generator=dice).to(dtype)}


def run(model: Callable, given: dict) -> torch.Tensor:
    """The output tensor of one call."""
    out = model(**given)
    return out if isinstance(out, torch.Tensor) else out[0]


def _shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, value.shape) for key, value in model.named_parameters()]


def _starts(model: nn.Module) -> Iterator[int]:
    """Where in the pool each parameter's numbers begin."""
    place = 0
    for _, shape in _shapes(model):
        yield place % POOL
        place += shape.numel()


@cache
def _pool() -> torch.Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(SEED))


def _values(shape: torch.Size, leaf: str, start: int, dtype: torch.dtype) -> torch.Tensor:
    if len(shape) < 2:
        return torch.full(shape, float(leaf == "weight"), dtype=dtype)
    count, pool = shape.numel(), _pool() * (shape.numel() // shape[0]) ** -0.5
    pool = pool.roll(-start).to(dtype)
    return pool.repeat(-(-count // POOL))[:count].reshape(shape)


def _pixart(width: Width, dtype: torch.dtype, dice: torch.Generator) -> dict:
    side = width.config["sample_size"]
    return {
        "hidden_states": torch.randn(width.batch, 4, side, side, generator=dice).to(dtype),
        "encoder_hidden_states": torch.randn(
            width.batch, width.text, width.config["caption_channels"], generator=dice
        ).to(dtype),
        "timestep": torch.full((width.batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _flux(width: Width, dtype: torch.dtype, dice: torch.Generator) -> dict:
    side = int(width.tokens**0.5)
    place = torch.arange(width.tokens)
    sizes = {"hidden_states": (width.tokens, 64), "encoder_hidden_states": (width.text, _text_width(width))}
    given = {key: torch.randn(width.batch, *size, generator=dice).to(dtype) for key, size in sizes.items()}
    return given | {
        "pooled_projections": torch.randn(width.batch, width.config["pooled_projection_dim"], generator=dice).to(
            dtype
        ),
        "timestep": torch.full((width.batch,), 0.5, dtype=dtype),
        "img_ids": torch.stack([torch.zeros(width.tokens), place // side, place % side], 1),
        "txt_ids": torch.zeros(width.text, 3),
        "return_dict": False,
    }


def _unet(width: Width, dtype: torch.dtype, dice: torch.Generator) -> dict:
    side = width.config["sample_size"]
    text = (width.batch, width.text, width.config["cross_attention_dim"])
    return {
        "sample": torch.randn(width.batch, 4, side, side, generator=dice).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(text, generator=dice).to(dtype),
        "return_dict": False,
    }


def _text_width(width: Width) -> int:
    return width.config["joint_attention_dim"]


_INPUTS = {PIXART_CLASS: _pixart, FLUX_CLASS: _flux, UNET_CLASS: _unet}
