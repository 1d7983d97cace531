"""ControlNet: Stable Diffusion XL follows the edges of a picture (Zhang et al., arXiv 2302.05543).

    python pipelines/controlnet.py [MODEL] [--controlnet CONTROLNET] [--out DIR]

Weights: the U-Net has 2.57 billion parameters, 4.8 GiB in bf16 and 2.4 GiB in int8; the ControlNet
`diffusers/controlnet-canny-sdxl-1.0` 1.25 billion, 2.3 GiB and 1.2 GiB.
Recipe: `int8` needs no data. The ControlNet runs at every step but is no denoiser: `components` names it.
"""

import argparse
from pathlib import Path

import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from PIL import Image, ImageDraw

import dq

MODEL, OUT = "stabilityai/stable-diffusion-xl-base-1.0", "out/controlnet"
CONTROLNET = "diffusers/controlnet-canny-sdxl-1.0"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a red balloon over the sea, photograph"
STEPS = 30
CALL = {"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.5}


def edges(pipe) -> Image.Image:
    """White lines on black, as Canny's detector finds them; in its place: those of a picture of yours."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor  # what the model was trained for
    lines = Image.new("RGB", (size, size), "black")
    ImageDraw.Draw(lines).ellipse((size // 4, size // 8, size * 3 // 4, size * 5 // 8), outline="white", width=3)
    return lines


def quantize(pipe) -> dq.Report:
    """U-Net and ControlNet with 8-bit weights and activations."""
    return dq.quantize(pipe, "int8", components={"controlnet": "int8"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, image=edges(pipe), num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, controlnet: str = CONTROLNET, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    guide = ControlNetModel.from_pretrained(controlnet, dtype=torch.bfloat16)
    pipe = StableDiffusionXLControlNetPipeline.from_pretrained(model, controlnet=guide, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--controlnet", default=CONTROLNET, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
