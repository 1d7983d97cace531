"""Qwen-Image, `Qwen/Qwen-Image` (Wu et al., arXiv 2508.02324).

    python pipelines/qwen_image.py [MODEL] [--out DIR]

Weights: the transformer has 20.4 billion parameters, 38.1 GiB in bf16 and 13.5 GiB in 4 bits; the text
encoder, Qwen2.5-VL 7B, 15.4 GiB and 8.3 GiB.
Recipe: `gptq-int4-weight` (Frantar et al., arXiv 2210.17323): memory decides whether this model runs at all, and
4-bit weights under bf16 activations save most of it. A third of the weights is modulation, which gets 8 bits. Guidance
runs the transformer twice a step, with and without the prompt; calibration sees both.
"""

import argparse
from pathlib import Path

import torch
from diffusers import QwenImagePipeline

import dq

MODEL, OUT = "Qwen/Qwen-Image", "out/qwen-image"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a shop window with a sign that says dq"
STEPS, SAMPLES = 50, 64  # denoising steps of a picture; denoiser inputs recorded for calibration
CALL = {"true_cfg_scale": 4.0, "negative_prompt": " ", "height": 1024, "width": 1024}


def quantize(pipe) -> dq.Report:
    """The transformer with 4-bit weights, fitted to runs like `draw`'s; the text encoder with 8-bit weights."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL)
    return dq.quantize(pipe, "gptq-int4-weight", calibration=seen, components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = QwenImagePipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
