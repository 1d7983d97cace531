"""Training of the two models that look at pictures: the recogniser and the autoencoder, and the cache of latents."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from . import recogniser, scenes
from .training import RUNS, Average, Run, adamw, write_json

CACHED_SCENES = 80_000
VAE_OFFSET = 10_000_000  # each training reads its own part of the training stream
VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": scenes.SIDE,
}


def batches(size: int, start: int) -> Iterator[tuple[list[scenes.Scene], torch.Tensor]]:
    """Endless (scenes, pictures (size, 3, 64, 64)) from the training stream, drawn one batch ahead."""

    def draw(index: int):
        drawn = [scenes.sample(i)[0] for i in range(index, index + size)]
        return drawn, recogniser.as_tensor(scenes.render(drawn))

    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(draw, start)
        while True:
            start += size
            batch, waiting = waiting.result(), ahead.submit(draw, start)
            yield batch


def distort(images: torch.Tensor) -> torch.Tensor:
    """What generated pictures suffer from, each on half of the pictures: blur, coarse errors, noise, colour casts."""
    n = images.shape[0]

    def some(share: float = 0.5) -> torch.Tensor:
        return (torch.rand(n, 1, 1, 1) < share) * torch.rand(n, 1, 1, 1)

    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    images = images + some() * (F.avg_pool2d(padded, 3, 1) - images)
    coarse = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    images = images + 0.5 * some(0.3) * (coarse - images)
    images = images * (1 + 0.1 * (torch.rand(n, 3, 1, 1) - 0.5)) + 0.1 * (torch.rand(n, 3, 1, 1) - 0.5)
    blotch = F.interpolate(torch.randn(n, 3, 12, 12), size=images.shape[-1], mode="bilinear")
    images = images + 0.08 * some() * blotch + 0.06 * some() * torch.randn_like(images)
    return images.clamp(0, 1)


def train_recogniser(minutes: float) -> Path:
    """Train, check on held-out renders, save; returns the folder."""
    torch.manual_seed(0)
    model = recogniser.Recogniser().to(memory_format=torch.channels_last)
    average, optimiser = Average(model, 0.998), adamw(model.parameters(), 2e-3)
    run = Run("recogniser", minutes, {"model": model, "average": average, "optimiser": optimiser}, optimiser)
    data = batches(64, run.step * 64)
    while run.going():
        drawn, images = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            cells = model(distort(images).contiguous(memory_format=torch.channels_last))
        value = recogniser.loss(cells, recogniser.targets(drawn))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        average.update(model)
        if run.count(loss=value.detach()) and run.due(60):
            run.save()
    run.save()
    model.load_state_dict(average.values)
    model.save_pretrained(run.folder / "model")
    figures = {"held_out_right": recogniser_accuracy(model.eval(), 2000)}
    write_json(run.folder / "figures.json", figures)
    print(figures, flush=True)
    return run.folder / "model"


@torch.no_grad()
def recogniser_accuracy(model: recogniser.Recogniser, count: int, vae: AutoencoderKL | None = None) -> float:
    """Share of held-out renders (or their reconstructions) with exactly the right colours and shapes."""
    right = 0
    for start in range(0, count, 100):
        drawn = [scenes.sample(i, scenes.HELD_OUT)[0] for i in range(start, min(start + 100, count))]
        images = recogniser.as_tensor(scenes.render(drawn))
        if vae is not None:
            images = reconstruct(vae, images)
        right += sum(map(recogniser.is_right, model.find(images), drawn))
    return right / count


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] through the autoencoder (mean latent) and back."""
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def train_vae(minutes: float, batch: int = 16) -> Path:
    """Train the autoencoder on L1 + MSE + tiny KL; the saved scaling factor gives latents of unit variance."""
    torch.manual_seed(0)
    model = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)
    average, optimiser = Average(model, 0.995), adamw(model.parameters(), 2e-3, 0.0)
    run = Run("vae", minutes, {"model": model, "average": average, "optimiser": optimiser}, optimiser)
    data = batches(batch, VAE_OFFSET + run.step * batch)
    while run.going():
        images = next(data)[1].mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            output = model.decode(posterior.sample()).sample
        error = output.float() - images
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        value = error.abs().mean() + 2 * error.square().mean() + 2e-4 * kl
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        average.update(model)
        mse = error.detach().square().mean() / 4
        if run.count(loss=value.detach(), kl=kl.detach(), psnr_db=-10 * torch.log10(mse)) and run.due(60):
            run.save()
    run.save()
    model.load_state_dict(average.values)
    return _finish_vae(model.eval(), run.folder)


@torch.no_grad()
def standardise(model: AutoencoderKL) -> None:
    """Give every latent channel mean 0 and variance 1 over scenes, by folding z -> (z - m) / s into the two 1x1
    convolutions around the latent; pictures in and out stay the same."""
    images = recogniser.as_tensor(scenes.render([scenes.sample(i)[0] for i in range(1000)])) * 2 - 1
    latents = torch.cat([model.encode(part).latent_dist.mean for part in images.split(100)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = model.quant_conv, model.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]
    before.weight[:4] /= deviation[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) / deviation
    before.bias[4:] -= 2 * deviation.log()
    model.register_to_config(scaling_factor=1.0, shift_factor=None)


@torch.no_grad()
def _finish_vae(model: AutoencoderKL, folder: Path) -> Path:
    standardise(model)
    figures = {"held_out_psnr_db": psnr_db(model, 500)}
    model.save_pretrained(folder / "model")
    write_json(folder / "figures.json", figures)
    print(figures, flush=True)
    return folder / "model"


@torch.no_grad()
def psnr_db(vae: AutoencoderKL, count: int) -> float:
    """Mean over held-out renders of the reconstruction's PSNR."""
    images = recogniser.as_tensor(scenes.render([scenes.sample(i, scenes.HELD_OUT)[0] for i in range(count)]))
    error = torch.cat([(reconstruct(vae, part) - part).square().flatten(1).mean(1) for part in images.split(100)])
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def cache_latents(vae_folder: Path, count: int = CACHED_SCENES) -> Path:
    """Scaled mean latents of the first `count` training scenes: fp16 (count, 4, 16, 16) in one .npy file."""
    path = RUNS / "latents.npy"
    if path.exists():
        return path
    vae = AutoencoderKL.from_pretrained(vae_folder).to(memory_format=torch.channels_last)
    scale = vae.config.scaling_factor
    latents = np.empty((count, 4, 16, 16), np.float16)
    for start in range(0, count, 500):
        drawn = [scenes.sample(i)[0] for i in range(start, min(start + 500, count))]
        images = recogniser.as_tensor(scenes.render(drawn)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        latents[start : start + len(drawn)] = (mean.float() * scale).half().numpy()
    temporary = path.with_name("latents.tmp.npy")
    np.save(temporary, latents)
    temporary.rename(path)
    print(json.dumps({"cached": count, "deviation": float(latents[:2000].astype(np.float32).std())}), flush=True)
    return path
