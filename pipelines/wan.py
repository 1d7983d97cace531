"""Wan 2.2 text to video, `Wan-AI/Wan2.2-T2V-A14B-Diffusers` (Wan Team, arXiv 2503.20314): two transformers.

    pip install imageio imageio-ffmpeg                  for the video file
    python pipelines/wan.py [MODEL] [--out DIR]

Weights: `transformer` (noisy steps) and `transformer_2` (the others) have 14.3 billion parameters each, together
53.2 GiB in bf16 and 26.7 GiB in int8; the UMT5-XXL text encoder 10.6 GiB and 6.3 GiB.
Recipe: `int8` needs no data, and a pipeline means all of its denoisers: both get the same recipe. For another one,
name it: components={"transformer_2": "int8-weight"}. It is quantized on the CPU, for 64 GiB of bf16 do
not fit most cards. The decoder computes in fp32, as its authors do.
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import dq

MODEL, OUT = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "out/wan"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff, waves rolling in, camera circling slowly"
DTYPE = {"default": torch.bfloat16, "vae": torch.float32}
STEPS = 40
CALL = {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "height": 480, "width": 832, "num_frames": 81}


def quantize(pipe) -> dq.Report:
    """Both transformers with 8-bit weights and activations, the text encoder with 8-bit weights."""
    return dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The frames of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).frames[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = WanPipeline.from_pretrained(model, dtype=DTYPE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    export_to_video(draw(pipe.to(DEVICE)), str(Path(out) / "video.mp4"), fps=16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its video")
    main(**vars(parser.parse_args()))
