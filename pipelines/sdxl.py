"""Stable Diffusion XL, `stabilityai/stable-diffusion-xl-base-1.0` (Podell et al., arXiv 2307.01952).

    python pipelines/sdxl.py [MODEL] [--out DIR]

Weights: the U-Net has 2.57 billion parameters, 4.8 GiB in bf16 and 1.4 GiB in 4 bits.
Recipe: `gptq-int4-weight` (Frantar et al., arXiv 2210.17323) has 4-bit weights in groups of 64, convolutions too, and
leaves activations in bf16: the least memory on any device. It needs to see the model at work: dq draws SAMPLES / 4
pictures of its own prompts first. Without calibration `int8` takes the same lines less `calibration`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

import dq

MODEL, OUT = "stabilityai/stable-diffusion-xl-base-1.0", "out/sdxl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff at dawn, oil painting"
STEPS, SAMPLES = 30, 64  # denoising steps of a picture; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 5.0}


def quantize(pipe) -> dq.Report:
    """The U-Net with 4-bit weights, fitted to what its layers see in runs like `draw`'s."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL)
    return dq.quantize(pipe, "gptq-int4-weight", calibration=seen)


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
