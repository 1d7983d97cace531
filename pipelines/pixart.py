"""PixArt-Sigma, `PixArt-alpha/PixArt-Sigma-XL-2-1024-MS` (Chen et al., arXiv 2403.04692).

    python pipelines/pixart.py [MODEL] [--out DIR]      MODEL may be pipelines/tiny/tiny-pixart

Weights: the transformer has 0.61 billion parameters, 1.1 GiB in bf16 and 0.6 GiB in int8;
the T5-XXL text encoder 8.9 GiB and 4.6 GiB.
Recipe: `int8` needs no data. Nine of ten bytes are the text encoder's, which runs once a picture: there 8-bit weights
save the memory, and the activations stay as they are.
"""

import argparse
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline

import dq

MODEL, OUT = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "out/pixart"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a large orange star"
STEPS = 20
CALL = {"guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False}


def quantize(pipe) -> dq.Report:
    """The transformer with 8-bit weights and activations, the text encoder with 8-bit weights."""
    return dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The picture of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).images[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = PixArtSigmaPipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    draw(pipe.to(DEVICE)).save(Path(out) / "picture.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its picture")
    main(**vars(parser.parse_args()))
