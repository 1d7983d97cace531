"""Ship the trained models: copy the judges into their folders and write every model's card and loss curve."""

import json
from pathlib import Path

import torch

from . import CALL, PARTS, STUDENTS
from .recogniser import Recogniser
from .training import RUNS, draw_curve

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "eval" / "results" / "tiny_models.json"  # of eval.experiments.tiny_models
LINES = {"pixart": ("loss", "cells"), "sd": ("loss", "cells"), "clip": ("loss",), "recogniser": ("loss",)}
LINES |= {"pixart-4step": ("loss", "mse"), "sd-4step": ("loss", "mse")}
LINES |= {"video": ("loss", "cells")}
SHIPPED = {"pixart": "tiny-pixart", "sd": "tiny-sd", "clip": "tiny-clip", "recogniser": "scene-recogniser"}
SHIPPED |= {"pixart-4step": "tiny-pixart-4step", "sd-4step": "tiny-sd-4step"}
SHIPPED |= {"video": "tiny-video"}
DATA = """Procedural scenes (`pipelines/tiny/scenes.py`): 64x64 pictures of one to three shapes (6 shapes, 8 colours,
2 sizes) on graded or textured backgrounds, with captions from a small grammar. Training and held-out scenes come from
separate random streams. The vocabulary is that grammar: other words mean nothing to these models."""
CLIPS = """Procedural clips (`pipelines/tiny/motion.py`): eight frames of those scenes, 64x64, of one or two objects
that stand still, move left, right, up or down, turn, grow, shrink or meet, slowly or quickly; the caption names
colour, shape and motion of each. Training and held-out clips come from separate random streams. The vocabulary is that
grammar."""
STUDENT = """A LoRA on `{base}` (peft, in every matrix and convolution that has more numbers than it,
{denoiser:.1f} M parameters in bf16) with which it draws in four calls without guidance, where it takes 20 steps of two
calls, and an unmodified `TCDScheduler`. Trained for four steps; one, two and eight run, too.

Distilled on the way of the teacher (guidance 3, DPM-Solver++ 2M, 8 steps): from any of its points in one of the four
phases that the student's steps bound to the phase's end, three quarters of the ways from where the student itself
arrives (`pipelines/tiny/train_student.py`). Averaged weights (0.99). It saw captions and noise, no pictures."""
STUDENT_USE = """from diffusers import DiffusionPipeline, TCDScheduler
from peft import PeftModel
pipe = DiffusionPipeline.from_pretrained("pipelines/tiny/{base}")
pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "pipelines/tiny/{base}-4step").merge_and_unload()
pipe.scheduler = TCDScheduler.from_pretrained("pipelines/tiny/{base}-4step", subfolder="scheduler")
image = pipe("a large red circle left of a blue star", {call}).images[0]"""
WHAT = {
    "pixart-4step": STUDENT,
    "sd-4step": STUDENT,
    "pixart": """`PixArtSigmaPipeline`, unmodified: a T5 encoder (3 layers, width 128), a `PixArtTransformer2DModel`
(6 blocks, 4 heads of 64, patch 2 on a 16x16x4 latent, {denoiser:.1f} M parameters) and an `AutoencoderKL` with 4x
reduction (latents of mean 0 and variance 1, so `scaling_factor` is 1). v-prediction, averaged weights (0.999), 10 % of
the captions empty.

Two stages: trained jointly with the transformer, the encoder lost which colour belongs to which shape, so a second
stage (`pipelines/tiny/train_refine.py`) goes on with an encoder trained on text alone and frozen. The jump in the
curve is where it starts.""",
    "sd": """`StableDiffusionPipeline`, unmodified, without safety checker: a CLIP text encoder (3 layers, width 128),
a `UNet2DConditionModel` (64, 128, 192 channels, cross attention at 8x8 and 4x4, {denoiser:.1f} M parameters) and the
same `AutoencoderKL` as tiny-pixart. v-prediction, averaged weights (0.999), 10 % of the captions empty.""",
    "video": """`LattePipeline`, unmodified: a T5 encoder (3 layers, width 128), a `LatteTransformer3DModel` (6 spatial
and 6 temporal blocks, 4 heads of 64, patch 2 on eight 16x16x4 latents, {denoiser:.1f} M parameters) and the
`AutoencoderKL` of tiny-pixart, frame by frame. v-prediction, averaged weights (0.998), 10 % of the captions empty.

Spatial blocks start from tiny-pixart, temporal ones as the identity. The encoder is tiny-pixart's with the words of
motion beside, trained on text alone and frozen. The pipeline wants `mask_feature=False`: so was the training.

Two runs: 1300 steps, then those below from their weights. Objects are right; an object keeps its place better than its
outline, and moves as named in few clips. A longer training
(`python -m pipelines.tiny.train video`) goes on from these weights.""",
    "clip": """`transformers.CLIPModel` (vision: 4 layers, width 192, patch 8; text: 3 layers, width 128), contrastive,
batch 128; `CLIPProcessor.from_pretrained` loads its tokenizer and image processor (64x64, no cropping).""",
    "recogniser": """`pipelines.tiny.recogniser.Recogniser`: a convolutional net that says on an 8x8 grid which object
(shape, colour, size) is where; `find(images)` lists them, `features(images)` gives a vector per picture. Trained on
renders with blur, noise, colour casts and coarse errors, so that it reads generated pictures too.""",
}
USE = {
    "pixart-4step": STUDENT_USE,
    "sd-4step": STUDENT_USE,
    "pixart": """from diffusers import PixArtSigmaPipeline
pipe = PixArtSigmaPipeline.from_pretrained("pipelines/tiny/tiny-pixart")
image = pipe("a large red circle left of a blue star", {call}).images[0]""",
    "sd": """from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("pipelines/tiny/tiny-sd")
image = pipe("a large red circle left of a blue star", {call}).images[0]""",
    "video": """from diffusers import LattePipeline
pipe = LattePipeline.from_pretrained("pipelines/tiny/tiny-video")
frames = pipe("a large red star moving left slowly", {call}).frames[0]""",
    "clip": """from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("pipelines/tiny/tiny-clip")
processor = CLIPProcessor.from_pretrained("pipelines/tiny/tiny-clip")""",
    "recogniser": """from pipelines import tiny
found = tiny.load_recogniser().find(images)  # images: float (N, 3, 64, 64) in [0, 1]""",
}


def ship_recogniser() -> None:
    """Copy the trained recogniser into its folder, in bf16."""
    net = Recogniser.from_pretrained(RUNS / "recogniser" / "model")
    net.to(torch.bfloat16).save_pretrained(FOLDER / SHIPPED["recogniser"])


def _curve(name: str) -> list[dict]:
    """The losses of a run, and of its second stage if it has one, with steps and seconds going on."""
    rows = json.loads((RUNS / name / "curve.json").read_text())
    second, start = RUNS / f"{name}-refine" / "curve.json", rows[-1]
    for row in json.loads(second.read_text()) if second.exists() else ():
        rows.append(row | {key: row[key] + start[key] for key in ("step", "seconds")})
    return rows


def write_card(name: str) -> None:
    """README.md and loss.png of one shipped model, from its curve and its measured rows."""
    folder, curve = FOLDER / SHIPPED[name], _curve(name)
    base = STUDENTS.get(SHIPPED[name], "")
    draw_curve(curve, folder / "loss.png", LINES[name])
    call = ", ".join(f"{key}={value}" for key, value in CALL.get(SHIPPED[name], {}).items())
    text = [f"# {SHIPPED[name]}", WHAT[name].format(denoiser=_million(folder), base=base), "## Use"]
    use = USE[name].format(call=call, base=base, part=PARTS.get(base))
    text += [f"```python\n{use}\n```", "## Data", CLIPS if name == "video" else DATA, "## Training"]
    last, minutes = curve[-1], curve[-1]["seconds"] / 60
    text.append(
        f"{last['step']} steps in {minutes:.0f} minutes on one of {_results()['machine']}, shared with other work "
        f"(`python -m pipelines.tiny.train`); {base or 'text encoder, autoencoder and latents'} came before."
    )
    text += ["![loss over steps](loss.png)", "## Held-out figures", _figures(name)]
    (folder / "README.md").write_text("\n\n".join(text) + "\n")


def _million(folder: Path) -> float:
    """Millions of parameters of the denoiser or the LoRA, from the bytes of its bf16 file."""
    kinds = ("transformer/*.safetensors", "unet/*.safetensors", "adapter_model.safetensors")
    return sum(file.stat().st_size for kind in kinds for file in folder.glob(kind)) / 2e6


def _results() -> dict:
    """Machine, versions and rows of the held-out figures."""
    return json.loads(RESULTS.read_text())


def _figures(name: str) -> str:
    """The rows of eval/results/tiny_models.json that speak of this model, as a list."""
    base = STUDENTS.get(SHIPPED[name])  # its rows in as many steps stand beside a student's
    wanted = {SHIPPED[name]} | ({base} if base else set()) | ({"vae"} if name in ("pixart", "sd") else set())
    usual = {None, CALL.get(SHIPPED[name], {}).get("num_inference_steps")}
    rows = [row for row in _results()["rows"] if row["model"] in wanted]
    rows = [row for row in rows if base or row.get("num_inference_steps") in usual]
    lines = [f"- {', '.join(f'{key} {value}' for key, value in row.items() if key != 'seconds')}" for row in rows]
    return "From `python -m eval.experiments.tiny_models` (`eval/results/tiny_models.json`):\n\n" + "\n".join(lines)
