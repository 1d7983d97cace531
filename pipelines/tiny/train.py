"""Train the embedded models: `python -m pipelines.tiny.train all|recogniser|vae|text|pixart|refine|sd|clip|...`.

Each part runs for a wall-clock budget (`--minutes`), writes checkpoints to runs/tiny/ and goes on from the last one
when started again. `all` runs everything in order; the denoisers may also be trained side by side, one thread each.
`cards` writes the model cards from the curves and eval/results/tiny_models.json.
"""

import argparse

import torch

MINUTES = {"recogniser": 7, "vae": 10, "text": 7, "pixart": 67.5, "refine": 12, "sd": 43, "clip": 4.5}
MINUTES |= {"video-text": 6, "video": 240, "pixart-4step": 26, "sd-4step": 16, "cards": 0}


def train(part: str, minutes: float) -> None:
    """One part of the training; the order of `MINUTES` is the order they need each other in."""
    from . import cards, train_clip, train_denoiser, train_refine, train_student, train_text, train_video, train_vision
    from .training import RUNS

    if part == "recogniser":
        train_vision.train_recogniser(minutes)
        cards.ship_recogniser()
    elif part == "vae":
        train_vision.cache_latents(train_vision.train_vae(minutes))
    elif part == "text":
        train_text.train_text("t5", minutes)
        train_text.train_text("clip", minutes)
    elif part == "clip":
        train_clip.train_clip(minutes)
    elif part == "video-text":
        train_video.train_text(minutes)
    elif part == "video":
        train_video.train_video(minutes)
    elif part.endswith("-4step"):
        train_student.train_student(part.removesuffix("-4step"), minutes)
    elif part == "refine":
        train_refine.train_refine(minutes)
    elif part == "cards":
        for name in cards.SHIPPED:
            if (RUNS / name).exists():
                cards.write_card(name)
    else:
        train_denoiser.train_denoiser(part, minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["all", *MINUTES])
    parser.add_argument("--minutes", type=float, help="wall-clock budget of the part (default: as shipped)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in MINUTES if options.part == "all" else [options.part]:
        train(part, options.minutes or MINUTES[part])


if __name__ == "__main__":
    main()
