"""Measure the shipped models on held-out scenes: `python -m eval.experiments.tiny_models [--count 500] [--names ...]`.

Writes one row per figure set to eval/results/tiny_models.json. Videos have motion accuracy, and flicker beside that of
training clips.
"""

import argparse
import json
import time
from importlib.metadata import version

import torch

from eval.experiments import rows
from eval.metrics import background_consistency, caption_accuracy, motion_accuracy
from eval.static import kernels_by_rank
from pipelines import tiny
from pipelines.tiny import motion
from pipelines.tiny.training import write_json

RESULTS = rows.FOLDER / "tiny_models.json"
MACHINE = "2 cores AMD Zen 5"
TRAINING_CLIPS = 100  # that flicker is compared with


def measure(name: str, objects: int, count: int, seed: int = 0, dtype=torch.float32, **call) -> dict:
    """Caption accuracy, of a video model motion accuracy, on `count` held-out prompts of so many objects."""
    began = time.time()
    moving = name in tiny.VIDEOS
    captions, labels = zip(*(tiny.motions if moving else tiny.prompts)(count, objects, seed), strict=True)
    draw = tiny.clips if moving else tiny.pictures
    drawn = draw(tiny.load(name, dtype), name, list(captions), seed, **call)
    if moving:
        figures = motion_accuracy.score(drawn, labels)
        figures |= {"flicker": flicker(drawn), "flicker_of_training_clips": flicker(training_clips(name, objects))}
    else:
        figures = caption_accuracy.score(drawn, labels)
    row = {"model": name, "objects": objects, "prompts": count, "seed": seed, "dtype": str(dtype).split(".")[-1]}
    row |= {key: (tiny.CALL[name] | call)[key] for key in ("num_inference_steps", "guidance_scale")}
    return row | {key: round(value, 4) for key, value in figures.items()} | {"seconds": round(time.time() - began, 1)}


def flicker(clips: torch.Tensor) -> float:
    """Mean change of pixels (share of range) since the first frame where no object is: the background stands still."""
    return 1 - background_consistency.score(list(clips))["background_consistency"]


@torch.no_grad()
def training_clips(name: str, objects: int) -> torch.Tensor:
    """Clips (N, 8, 3, 64, 64) of the training stream as the model sees them, through its autoencoder."""
    vae, drawn = tiny.load(name).vae, [motion.sample(i, motion.TRAIN, objects)[0] for i in range(TRAINING_CLIPS)]
    frames = torch.from_numpy(motion.render(drawn)).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in frames.split(50)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1).unflatten(0, (len(drawn), motion.FRAMES))


def measure_judges(count: int) -> list[dict]:
    """Held-out figures of the recogniser, the autoencoder under it, and the CLIP model."""
    from diffusers import AutoencoderKL

    from pipelines.tiny import train_clip, train_vision

    net = tiny.load_recogniser()
    vae = AutoencoderKL.from_pretrained(tiny.folder("tiny-sd"), subfolder="vae")
    through = train_vision.recogniser_accuracy(net, count, vae.float())
    rows = [
        {"model": "scene-recogniser", "held_out_right": train_vision.recogniser_accuracy(net, 4 * count)},
        {"model": "vae", "psnr_db": round(train_vision.psnr_db(vae, count), 2), "recogniser_right": through},
    ]
    if tiny.folder("tiny-clip").exists():
        rows.append({"model": "tiny-clip"} | train_clip.retrieval())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, nargs="+", help="20 by default, 1, 2, 4 and 8 of few-step students")
    everything = [*tiny.NAMES, *tiny.STUDENTS, *tiny.shipped(tiny.VIDEOS), "judges"]
    parser.add_argument("--names", nargs="+", default=everything)
    options = parser.parse_args()
    kernels_by_rank()
    for name in options.names:
        if name == "judges":
            record(measure_judges(options.count))
        for objects in options.objects if name != "judges" else []:
            for steps in options.steps or ((1, 2, 4, 8) if name in tiny.STUDENTS else (20,)):
                record([measure(name, objects, options.count, num_inference_steps=steps)])


def record(fresh: list[dict]) -> None:
    """Put rows into the results file, in place of older rows of the same model and object count."""
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    replaced = {_key(row) for row in fresh}
    rows = sorted([row for row in old if _key(row) not in replaced] + fresh, key=_key)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS, {"machine": MACHINE, "versions": versions, "rows": rows})
    for row in fresh:
        print(json.dumps(row), flush=True)


def _key(row: dict) -> tuple[str, int, int]:
    return row["model"], row.get("objects", 0), row.get("num_inference_steps", 0)


if __name__ == "__main__":
    main()
