"""Inpainting: Stable Diffusion's inpainting model fills a hole in a picture.

    python pipelines/inpainting.py [MODEL] [--out DIR]      MODEL may be pipelines/tiny/tiny-sd

Weights: the U-Net has 0.86 billion parameters, 1.6 GiB in bf16 and 0.5 GiB in 4 bits; its input has nine
channels: latents, mask and masked picture.
Recipe: `gptq-int4-weight` (Frantar et al., arXiv 2210.17323). A calibrated recipe runs the pipeline as you do, so that
the picture and the mask go into `call_kwargs`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

import dq

MODEL, OUT = "stable-diffusion-v1-5/stable-diffusion-inpainting", "out/inpainting"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a red circle and a blue star"
STEPS, SAMPLES = 30, 64  # denoising steps of a picture; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 7.5, "strength": 1.0}


def given(pipe) -> dict[str, Image.Image]:
    """The picture, in its place Image.open("yours.png"), and a mask that is white where it is to be filled."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor  # what the model was trained for
    picture, mask = Image.new("RGB", (size, size), "tan"), Image.new("L", (size, size), "black")
    ImageDraw.Draw(picture).ellipse((size // 8, size // 4, size // 2, size * 5 // 8), fill="red")
    ImageDraw.Draw(mask).rectangle((size // 2, size // 4, size * 7 // 8, size * 3 // 4), fill="white")
    return {"image": picture, "mask_image": mask}


def quantize(pipe) -> dq.Report:
    """The U-Net with 4-bit weights, fitted to what its layers see in runs like `draw`'s."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL | given(pipe))
    return dq.quantize(pipe, "gptq-int4-weight", calibration=seen)


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **given(pipe), **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
