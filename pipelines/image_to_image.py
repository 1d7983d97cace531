"""Image to image: Stable Diffusion 1.5 paints over a picture (Meng et al., SDEdit, arXiv 2108.01073).

    python pipelines/image_to_image.py [MODEL] [--out DIR]      MODEL may be pipelines/tiny/tiny-sd

The U-Net, the recipe and the bytes are those of `pipelines/sd.py`: 1.6 GiB in bf16 and 0.8 GiB in int8. A pipeline
that is quantized already shares its layers: StableDiffusionImg2ImgPipeline(**pipe.components).
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image, ImageDraw

import dq

MODEL, OUT = "stable-diffusion-v1-5/stable-diffusion-v1-5", "out/image-to-image"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a large red circle left of a blue star"
STEPS = 30  # of which the share `strength` is done
CALL = {"guidance_scale": 7.5, "strength": 0.6}


def sketch(pipe) -> Image.Image:
    """What to start from; in its place: Image.open("yours.png").convert("RGB")."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor  # what the model was trained for
    picture = Image.new("RGB", (size, size), "tan")
    ImageDraw.Draw(picture).ellipse((size // 8, size // 4, size // 2, size * 5 // 8), fill="red")
    return picture


def quantize(pipe) -> dq.Report:
    """The U-Net, linears and convolutions, with 8-bit weights and activations."""
    return dq.quantize(pipe, "int8")


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, image=sketch(pipe), num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
