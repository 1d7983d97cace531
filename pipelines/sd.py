"""Stable Diffusion 1.5, `stable-diffusion-v1-5/stable-diffusion-v1-5` (Rombach et al., arXiv 2112.10752).

    python pipelines/sd.py [MODEL] [--out DIR]      MODEL may be pipelines/tiny/tiny-sd

Weights: the U-Net has 0.86 billion parameters, 1.6 GiB in bf16 and 0.8 GiB in int8.
Recipe: `int8` needs no data. Two thirds of this U-Net are convolutions; dq quantizes them as well. Other
models fine-tuned from it take the same lines.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import dq

MODEL, OUT = "stable-diffusion-v1-5/stable-diffusion-v1-5", "out/sd"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a large red circle left of a blue star"
STEPS = 30
CALL = {"guidance_scale": 7.5}


def quantize(pipe) -> dq.Report:
    """The U-Net, linears and convolutions, with 8-bit weights and activations."""
    return dq.quantize(pipe, "int8")


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
