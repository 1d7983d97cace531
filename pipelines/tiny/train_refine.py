"""Second stage for tiny-pixart: the transformer learns to listen to a text encoder that may not forget.

Trained jointly with the picture loss, the T5 encoder lost which colour belongs to which shape: a fresh readout of its
token states knew "red, blue, circle, star" but not "red circle, blue star" (presence loss 1.3, against 0.01 for the
UNet's CLIP encoder), and pictures of two objects swapped shapes. This stage goes on from the first one's transformer
with the encoder as `train_text` left it, frozen; the loss is that of `train_denoiser`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from .train_denoiser import CELL_WEIGHT, SCHEDULER, batches, cell_loss, pixart, v_loss, write_pipeline
from .training import RUNS, Average, Run, optimiser_of

BATCH = 32


def train_refine(minutes: float, rate: float = 1e-3) -> Path:
    """Go on from the `pixart` run's transformer and the frozen `text-t5` encoder; writes the pipeline at the end."""
    torch.manual_seed(5)
    student, readout = pixart(), nn.Linear(256, 16)
    student.encoder.requires_grad_(False)
    student.denoiser.set_attn_processor(AttnProcessor())
    before = torch.load(RUNS / "pixart" / "last.pt", weights_only=True)
    weights = {n.removeprefix("denoiser."): v for n, v in before["both"].items() if n.startswith("denoiser.")}
    student.denoiser.load_state_dict(weights)
    readout.load_state_dict(before["readout"])
    both = nn.ModuleDict({"denoiser": student.denoiser, "encoder": student.encoder})
    every = [*student.denoiser.parameters(), *readout.parameters()]
    average, optimiser = Average(both, 0.998), optimiser_of(student.denoiser.transformer_blocks, every, rate)
    parts = {"both": both, "readout": readout, "average": average, "optimiser": optimiser}
    run, seen = Run("pixart-refine", minutes, parts, optimiser), []
    student.watched.register_forward_hook(lambda module, args, out: seen.append(out))
    data = batches(np.load(RUNS / "latents.npy", mmap_mode="r"), BATCH, 10_000_000 + run.step)
    alphas = DPMSolverMultistepScheduler(**SCHEDULER).alphas_cumprod
    for clean, texts, labels in _while(run, data):
        seen.clear()
        loss = v_loss(student, clean, texts, alphas)
        cells = cell_loss(seen[0], readout, labels)
        optimiser.zero_grad()
        (loss + CELL_WEIGHT * cells).backward()
        nn.utils.clip_grad_norm_(student.denoiser.parameters(), 1.0)
        optimiser.step()
        average.update(both)
        if run.count(loss=loss.detach(), cells=cells.detach()) and run.due(120):
            run.save()
    run.save()
    return write_pipeline("pixart", average)


def _while(run: Run, data: Iterator) -> Iterator:
    while run.going():
        yield next(data)
