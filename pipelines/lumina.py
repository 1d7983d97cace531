"""Lumina-Image 2.0, `Alpha-VLLM/Lumina-Image-2.0` (Qin et al., arXiv 2503.21758).

    python pipelines/lumina.py [MODEL] [--out DIR]

Weights: the transformer has 2.6 billion parameters, 4.9 GiB in bf16 and 2.4 GiB in int8; the text
encoder, Gemma 2 of 2.6 billion, 4.9 GiB and 3.0 GiB (its table of 256,000 tokens stays).
Recipe: `int8` needs no data; half of the bytes are the text encoder's, so that it is quantized
as well, in its weights alone.
"""

import argparse
from pathlib import Path

import torch
from diffusers import Lumina2Pipeline

import dq

MODEL, OUT = "Alpha-VLLM/Lumina-Image-2.0", "out/lumina"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff at dawn, oil painting"
STEPS = 30
CALL = {"guidance_scale": 4.0, "height": 1024, "width": 1024}


def quantize(pipe) -> dq.Report:
    """The transformer with 8-bit weights and activations, the text encoder with 8-bit weights."""
    return dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = Lumina2Pipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
