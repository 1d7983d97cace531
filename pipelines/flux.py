"""FLUX.1 dev, `black-forest-labs/FLUX.1-dev`; FLUX.1-schnell takes STEPS = 4 and guidance_scale 0.

    python pipelines/flux.py [MODEL] [--out DIR]

Weights: the transformer has 11.9 billion parameters, 22.2 GiB in bf16 and about 8 GiB in 4 bits; the
T5-XXL text encoder 8.9 GiB and 4.6 GiB.
Recipe: `svdquant-int4` (Li et al., arXiv 2411.05007, whose main model this is) rounds weights and activations to 4
bits and keeps what that loses in a low-rank branch of 16 bits. The modulation layers, a quarter of the weights, see
one token a sample and get 8-bit weights. A LoRA loads on top and fuses into the branch.
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

import dq

MODEL, OUT = "black-forest-labs/FLUX.1-dev", "out/flux"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a cat holding a sign that says dq"
STEPS, SAMPLES = 28, 64  # denoising steps of a picture; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 3.5, "height": 1024, "width": 1024}


def quantize(pipe) -> dq.Report:
    """The transformer in 4 bits, fitted to runs like `draw`'s; T5 with 8-bit weights."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL)
    return dq.quantize(pipe, "svdquant-int4", calibration=seen, components={"text_encoder_2": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
