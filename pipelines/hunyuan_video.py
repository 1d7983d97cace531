"""HunyuanVideo, `hunyuanvideo-community/HunyuanVideo` (Kong et al., arXiv 2412.03603).

    pip install imageio imageio-ffmpeg                  for the video file
    python pipelines/hunyuan_video.py [MODEL] [--out DIR]

Weights: the transformer has 12.8 billion parameters, 23.9 GiB in bf16 and 8.2 GiB in 4 bits; the text
encoder, a Llama of 7.5 billion, 14.0 GiB and 7.5 GiB.
Recipe: `gptq-int4-weight` (Frantar et al., arXiv 2210.17323): 4-bit weights, for the activations of a video need the
memory. Calibration watches clips of 9 frames, which cost a fraction of whole ones. A quarter of the weights is
modulation, which gets 8 bits.
"""

import argparse
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

import dq

MODEL, OUT = "hunyuanvideo-community/HunyuanVideo", "out/hunyuan-video"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff, waves rolling in, camera circling slowly"
STEPS, SAMPLES = 30, 32  # denoising steps of a video; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 6.0, "height": 320, "width": 512, "num_frames": 61}


def quantize(pipe) -> dq.Report:
    """The transformer with 4-bit weights, fitted to short clips; the text encoder with 8-bit weights."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL | {"num_frames": 9})
    return dq.quantize(pipe, "gptq-int4-weight", calibration=seen, components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The frames of PROMPT, the same in every run."""
    pipe.vae.enable_tiling()  # decodes a long video piece by piece
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).frames[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = HunyuanVideoPipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    export_to_video(draw(pipe), str(Path(out) / "video.mp4"), fps=15)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its video")
    main(**vars(parser.parse_args()))
