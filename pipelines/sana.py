"""Sana 1.6B, `Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers` (Xie et al., arXiv 2410.10629).

    python pipelines/sana.py [MODEL] [--out DIR]

Weights: the transformer has 1.6 billion parameters, 3.0 GiB in bf16 and 1.5 GiB in int8; the text
encoder, Gemma 2 of 2.6 billion, 4.9 GiB and 3.0 GiB (its table of 256,000 tokens stays).
Recipe: `int8` needs no data. Half of the weights are pointwise convolutions of the feed-forward, which dq runs
as linears over channels; the depthwise ones between them get 8-bit weights alone.
"""

import argparse
from pathlib import Path

import torch
from diffusers import SanaPipeline

import dq

MODEL, OUT = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "out/sana"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff at dawn, oil painting"
STEPS = 20
CALL = {"guidance_scale": 4.5, "height": 1024, "width": 1024, "use_resolution_binning": False}


def quantize(pipe) -> dq.Report:
    """The transformer with 8-bit weights and activations, the text encoder with 8-bit weights."""
    return dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = SanaPipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
