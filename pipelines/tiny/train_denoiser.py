"""Training of the two denoisers on cached latents: v-prediction, caption dropout, averaged weights.

Loss: |v - v_hat|^2 with v = a_t e - s_t x over uniform t, plus a small term that asks the hidden states half-way
through for the object (colour, shape) that covers each 8x8 pixel cell; its readout is thrown away.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from . import scenes
from .train_text import LENGTH, WIDTH, encode
from .training import RUNS, Average, Run, optimiser_of, put

FOLDER = Path(__file__).parent
DROPOUT = 0.1  # share of captions replaced by the empty one
CELL_WEIGHT = 0.1
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
SCHEDULER = NOISE | {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "steps_offset": 1,
}
PIXART = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "cross_attention_dim": 256,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": WIDTH,
    "use_additional_conditions": False,
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (2, 4, 6),
    "norm_num_groups": 16,
    "use_linear_projection": True,
}


@dataclass
class Student:
    """A denoiser with its text encoder, and how to call it: `denoise(latents, t, states, mask) -> v`."""

    name: str
    denoiser: nn.Module
    encoder: nn.Module
    tokenizer: object
    denoise: Callable
    watched: nn.Module  # gives (N, 64, d) or (N, d, 8, 8) hidden states
    hidden: int
    padding: str
    rate: float


def pixart() -> Student:
    """PixArt transformer and the T5 encoder; residual branches start small, time modulation at zero."""
    model = PixArtTransformer2DModel(**PIXART)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    for block in model.transformer_blocks:
        block.scale_shift_table.data = torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, 256)
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            layer.weight.data.mul_(0.3)
    sizes = {"resolution": None, "aspect_ratio": None}

    def denoise(latents, t, states, mask):
        return model(latents, states, t, sizes, encoder_attention_mask=mask, return_dict=False)[0]

    folder = RUNS / "text-t5"
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    return Student("pixart", model, encoder, tokenizer, denoise, model.transformer_blocks[3], 256, "longest", 1.5e-3)


def sd() -> Student:
    """Stable Diffusion UNet and the CLIP text encoder."""
    model = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    nn.init.zeros_(model.conv_out.weight)

    def denoise(latents, t, states, mask):
        latents = latents.contiguous(memory_format=torch.channels_last)
        return model(latents, t, states, return_dict=False)[0]

    folder = RUNS / "text-clip"
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    watched = model.up_blocks[1].attentions[-1]
    return Student("sd", model, encoder, tokenizer, denoise, watched, 128, "max_length", 8e-4)


def cell_labels(drawn: Sequence[scenes.Scene]) -> torch.Tensor:
    """Which object covers the centre of each 8x8 pixel cell: (N, 2, 64), colour and shape, 0 for none."""
    axis = np.arange(8) * 8 + 4.0
    labels = np.zeros((len(drawn), 2, 8, 8), np.int64)
    for n, scene in enumerate(drawn):
        for item in scene.items:
            near = np.hypot(axis[None, :] - item.x, axis[:, None] - item.y) < item.radius
            labels[n, 0][near] = 1 + scenes.COLOUR_NAMES.index(item.colour)
            labels[n, 1][near] = 1 + scenes.SHAPES.index(item.shape)
    return torch.from_numpy(labels).flatten(2)


def batches(latents: np.ndarray, size: int, step: int) -> Iterator[tuple[torch.Tensor, list[str], torch.Tensor]]:
    """Endless (latents (size, 4, 16, 16), freshly worded captions, cell labels), drawn one batch ahead."""

    def draw(step: int):
        rng = np.random.default_rng([3, step])
        rows = np.sort(rng.integers(0, len(latents), size))
        drawn = [scenes.sample(int(row))[0] for row in rows]
        texts = ["" if rng.random() < DROPOUT else scenes.caption(scene, rng) for scene in drawn]
        return torch.from_numpy(latents[rows].astype(np.float32)), texts, cell_labels(drawn)

    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(draw, step)
        while True:
            step += 1
            batch, waiting = waiting.result(), ahead.submit(draw, step)
            yield batch


def cell_loss(hidden: torch.Tensor, readout: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the covering object's colour and shape, from hidden states of an 8x8 grid."""
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    colour, shape = readout(hidden.float()).transpose(1, 2).split((9, 7), 1)
    return F.cross_entropy(colour, labels[:, 0]) + F.cross_entropy(shape, labels[:, 1])


def train_denoiser(name: str, minutes: float, batch: int = 32, snapshot_s: float = 600) -> Path:
    """Train `pixart` or `sd`, writing an early version of the pipeline every `snapshot_s` seconds."""
    torch.manual_seed(0)
    student = pixart() if name == "pixart" else sd()
    student.denoiser.set_attn_processor(AttnProcessor())  # trains faster here than the fused kernel
    both = nn.ModuleDict({"denoiser": student.denoiser, "encoder": student.encoder})
    readout = nn.Linear(student.hidden, 16)
    average = Average(both)
    blocks = getattr(student.denoiser, "transformer_blocks", ())
    every = [*student.denoiser.parameters(), *student.encoder.parameters(), *readout.parameters()]
    optimiser = optimiser_of(blocks, every, student.rate)
    parts = {"both": both, "readout": readout, "average": average, "optimiser": optimiser}
    run = Run(name, minutes, parts, optimiser)
    seen: list[torch.Tensor] = []
    student.watched.register_forward_hook(lambda module, args, out: seen.append(out[0] if _is_pair(out) else out))
    data = batches(np.load(RUNS / "latents.npy", mmap_mode="r"), batch, run.step)
    alphas = DPMSolverMultistepScheduler(**SCHEDULER).alphas_cumprod
    written_s = run.spent_s
    while run.going():
        clean, texts, labels = next(data)
        seen.clear()
        loss = v_loss(student, clean, texts, alphas)
        cells = cell_loss(seen[0], readout, labels)
        optimiser.zero_grad()
        (loss + CELL_WEIGHT * cells).backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        average.update(both)
        if run.count(loss=loss.detach(), cells=cells.detach()) and run.due(120):
            run.save()
            if run.spent_s - written_s > snapshot_s:
                written_s = run.spent_s
                write_pipeline(name, average)
    run.save()
    return write_pipeline(name, average)


def _is_pair(out) -> bool:
    return not torch.is_tensor(out)


def v_loss(student: Student, clean: torch.Tensor, texts: list[str], alphas: torch.Tensor) -> torch.Tensor:
    """Mean squared error of v at uniform steps, in bf16 arithmetic."""
    t = torch.randint(0, len(alphas), (len(clean),))
    a, s = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
    noise = torch.randn_like(clean)
    with torch.autocast("cpu", torch.bfloat16):
        states, mask = encode(student.encoder, student.tokenizer, texts, student.padding)
        v = student.denoise(a * clean + s * noise, t, states, mask)
    return F.mse_loss(v.float(), a * noise - s * clean)


def write_pipeline(name: str, average: Average) -> Path:
    """Write the pipeline with averaged weights, replacing the folder in one rename.

    Denoiser and autoencoder are stored in bf16, the small text encoder in fp32: transformers loads the stored type
    where diffusers loads fp32, so that a bare `from_pretrained` gives one type throughout.
    """
    student = pixart() if name == "pixart" else sd()
    both = nn.ModuleDict({"denoiser": student.denoiser, "encoder": student.encoder})
    both.load_state_dict(average.values, strict=False)
    vae = AutoencoderKL.from_pretrained(RUNS / "vae" / "model")
    parts = {"tokenizer": student.tokenizer, "text_encoder": student.encoder, "vae": vae}
    parts["scheduler"] = DPMSolverMultistepScheduler(**SCHEDULER)
    if name == "pixart":
        pipe = PixArtSigmaPipeline(transformer=student.denoiser, **parts)
    else:
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(unet=student.denoiser, **parts, **extra)
    student.denoiser.to(torch.bfloat16)
    vae.to(torch.bfloat16)
    return put(pipe, FOLDER / f"tiny-{name}", RUNS, kept=("README.md", "loss.png"))


__all__ = ["LENGTH", "train_denoiser", "write_pipeline"]
