"""What the tests of the demo read: pipelines, a video pipeline, an evaluation run, and what is not theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw

from eval.runs import Item, Run
from eval.suite import Suite
from pipelines import tiny


def small_run(folder):
    """An evaluation run of made-up figures, with pictures."""
    recipes = ["int8", "int4-weight", {"name": "lost", "recipe": "int8"}]
    given = {"name": "small", "pipelines": {"tiny-pixart": {}}, "recipes": recipes, "prompts": {"scenes": 12}}
    items = [Item(i, f"a red circle number {i}", 0) for i in range(12)]
    run = Run.create(folder, Suite.from_dict(given), items)
    for place, (entry, shift) in enumerate({"full": 0, "int8": 3, "int4-weight": 20}.items()):
        for item in items:
            image = Image.new("RGB", (64, 64), (30, 40, 60))
            ImageDraw.Draw(image).ellipse(
                (8 + item.index, 10, 40 + item.index, 44), fill=(220 - shift, 60 + shift, 50)
            )
            run.write_frames("tiny-pixart", entry, item.index, image)
        kernels = {"torch._int_mm int8 x int8": 60} if place else {"torch": 62}
        figures = {"bytes": 28_000_000 // (1 + 2 * place), "full_bytes": 28_000_000, "ms_per_step": 20.0 - 3 * place}
        run.write_figures("tiny-pixart", entry, figures | {"kernels": kernels, "missing": None})
        if place:
            values = [45.0 - 8 * place - item.index / 4 for item in items]
            score = {"value": sum(values) / 12, "low": min(values), "high": max(values), "unit": "dB", "count": 12}
            run.write_scores("tiny-pixart", entry, {"psnr": score | {"better": "higher", "per_item": values}})
    run.write_figures("tiny-pixart", "lost", {"missing": "recipe 'lost' is unknown"})
    return run


def small_video(folder):
    """A video pipeline of random weights around the text encoder of tiny-pixart."""
    texts, one = tiny.load("tiny-pixart"), (False,) * 5
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=one,
        upsample_residual=one[1:],
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    width = {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}
    denoiser = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_layers=2, caption_channels=texts.text_encoder.config.d_model, **width
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTXPipeline(scheduler, vae, texts.text_encoder, texts.tokenizer, denoiser)
    pipe.save_pretrained(folder)


def places(base: Path) -> dict[str, Path]:
    """Folders below base: pipelines in models, a run in runs, made for results; secret is nobody's to read."""
    found = {name: base / name for name in ("models", "runs", "made", "secret")}
    for folder in found.values():
        folder.mkdir()
    shutil.copytree(tiny.folder("tiny-sd"), found["models"] / "mine")
    shutil.copytree(tiny.folder("tiny-sd"), found["secret"] / "theirs")
    (found["models"] / "link").symlink_to(found["secret"] / "theirs")
    (found["secret"] / "plan.json").write_text("{}")
    return found
