"""CogVideoX 5B, `THUDM/CogVideoX-5b` (Yang et al., arXiv 2408.06072).

    pip install imageio imageio-ffmpeg                  for the video file
    python pipelines/cogvideox.py [MODEL] [--out DIR]

Weights: the transformer has 5.6 billion parameters, 10.4 GiB in bf16 and 5.2 GiB in int8; the T5-XXL text
encoder 8.9 GiB and 4.6 GiB.
Recipe: `viditq-w8a8` (Zhao et al., arXiv 2406.02540, made for such transformers) evens out the channels of each input
by smoothing or rotation before weights and activations are rounded to 8 bits. Calibration watches clips of 9 frames,
which cost a fraction of whole ones. Without data, `int8` takes the same lines less `calibration`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

import dq

MODEL, OUT = "THUDM/CogVideoX-5b", "out/cogvideox"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff, waves rolling in, camera circling slowly"
STEPS, SAMPLES = 50, 50  # denoising steps of a video; denoiser inputs recorded for calibration
CALL = {"guidance_scale": 6.0, "height": 480, "width": 720, "num_frames": 49}


def quantize(pipe) -> dq.Report:
    """The transformer with 8-bit weights and activations, fitted to short clips; T5 with 8-bit weights."""
    seen = dq.Calibration(steps=STEPS, samples=SAMPLES, call_kwargs=CALL | {"num_frames": 9})
    return dq.quantize(pipe, "viditq-w8a8", calibration=seen, components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The frames of PROMPT, the same in every run."""
    pipe.vae.enable_tiling()  # decodes a long video piece by piece
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).frames[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = CogVideoXPipeline.from_pretrained(model, dtype=torch.bfloat16).to(DEVICE)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    export_to_video(draw(pipe), str(Path(out) / "video.mp4"), fps=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its video")
    main(**vars(parser.parse_args()))
