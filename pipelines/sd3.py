"""Stable Diffusion 3.5 medium, `stabilityai/stable-diffusion-3.5-medium` (Esser et al., arXiv 2403.03206).

    python pipelines/sd3.py [MODEL] [--out DIR]

Weights: the transformer has 2.2 billion parameters, 4.2 GiB in bf16 and 1.6 GiB in 4 bits; the T5-XXL
text encoder 8.9 GiB and 4.6 GiB.
Recipe: `svdquant-int4` (Li et al., arXiv 2411.05007) rounds weights and activations to 4 bits and keeps what that
loses in a low-rank branch of 16 bits. The modulation layers, a third of the weights, see one token a sample and get
8-bit weights. T5 runs once a picture: 8-bit weights.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import dq

MODEL, OUT = "stabilityai/stable-diffusion-3.5-medium", "out/sd3"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff at dawn, oil painting"
STEPS, SAMPLES = 40, 64  # denoising steps of a picture; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 4.5, "height": 1024, "width": 1024}


def quantize(pipe) -> dq.Report:
    """The transformer in 4 bits, fitted to runs like `draw`'s; T5 with 8-bit weights."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL)
    return dq.quantize(pipe, "svdquant-int4", calibration=seen, components={"text_encoder_3": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
