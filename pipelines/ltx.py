"""LTX-Video, `Lightricks/LTX-Video` (HaCohen et al., arXiv 2501.00103).

    pip install imageio imageio-ffmpeg                  for the video file
    python pipelines/ltx.py [MODEL] [--out DIR]

Weights: the transformer has 1.9 billion parameters, 3.6 GiB in bf16 and 1.8 GiB in int8; the T5-XXL text
encoder 8.9 GiB and 4.6 GiB.
Recipe: `int8` needs no data. Most of the bytes are the text encoder's, which runs once a video:
there 8-bit weights save the memory, and its activations stay as they are.
"""

import argparse
from pathlib import Path

import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

import dq

MODEL, OUT = "Lightricks/LTX-Video", "out/ltx"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "a lighthouse on a cliff, waves rolling in, camera circling slowly"
STEPS = 50
CALL = {"guidance_scale": 3.0, "height": 480, "width": 704, "num_frames": 161}


def quantize(pipe) -> dq.Report:
    """The transformer with 8-bit weights and activations, the text encoder with 8-bit weights."""
    return dq.quantize(pipe, "int8", components={"text_encoder": "int8-weight"})


def draw(pipe):
    """The frames of PROMPT, the same in every run."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=STEPS, generator=seeded, **CALL).frames[0]


def main(model: str = MODEL, out: str = OUT) -> None:
    """Load, quantize, save and draw: the order of your own program."""
    pipe = LTXPipeline.from_pretrained(model, dtype=torch.bfloat16)
    print(quantize(pipe))
    pipe.save_pretrained(out)
    export_to_video(draw(pipe.to(DEVICE)), str(Path(out) / "video.mp4"), fps=24)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--out", default=OUT, help="folder of the quantized pipeline and its video")
    main(**vars(parser.parse_args()))
