"""The embedded trained models: small, real, and shipped with the repository.

    import pipelines.tiny as tiny
    pipe = tiny.load("tiny-pixart")
    caption, scene = tiny.prompts(1, objects=1)[0]
    image = pipe(caption, **tiny.CALL["tiny-pixart"]).images[0]

or with nothing but diffusers: `PixArtSigmaPipeline.from_pretrained("pipelines/tiny/tiny-pixart")`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .motion import Clip
    from .recogniser import Recogniser
    from .scenes import Scene

NAMES = ("tiny-pixart", "tiny-sd")
VIDEOS = ("tiny-video",)  # drawn by `clips`, from prompts of `motions`
STUDENTS = {"tiny-pixart-4step": "tiny-pixart", "tiny-sd-4step": "tiny-sd"}  # LoRA folders, on what they lie
PARTS = {"tiny-pixart": "transformer", "tiny-sd": "unet"}
JUDGES = ("tiny-clip", "scene-recogniser")
_COMMON = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 64, "width": 64}
CALL = {
    "tiny-pixart": _COMMON | {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 40},
    "tiny-sd": dict(_COMMON),
    "tiny-video": _COMMON | {"video_length": 8, "mask_feature": False, "clean_caption": False},
}
CALL |= {name: CALL[base] | {"num_inference_steps": 4, "guidance_scale": 1.0} for name, base in STUDENTS.items()}


def folder(name: str) -> Path:
    """Where an embedded model lies; ValueError names the choices."""
    known = (*NAMES, *STUDENTS, *VIDEOS, *JUDGES)
    if name not in known:
        raise ValueError(f"unknown embedded model {name!r}: expected one of {', '.join(known)}")
    return Path(__file__).parent / name


def shipped(names: tuple[str, ...]) -> list[str]:
    """Those of some embedded models whose files are there."""
    return [name for name in names if folder(name).is_dir()]


def load(name: str, dtype=None):
    """The diffusers pipeline of that name on the CPU, progress bar off; `dtype` defaults to torch.float32."""
    import torch
    from diffusers import DiffusionPipeline, TCDScheduler

    known = (*NAMES, *STUDENTS, *VIDEOS)
    if name not in known:
        raise ValueError(f"unknown embedded pipeline {name!r}: expected one of {', '.join(known)}")
    if not shipped((name,)):
        raise ValueError(f"embedded pipeline {name!r}: its files are not in {str(folder(name))!r}; train or fetch it")
    if name in STUDENTS:
        from peft import PeftModel

        pipe, part = load(STUDENTS[name], dtype), PARTS[STUDENTS[name]]
        setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), folder(name)).merge_and_unload())
        pipe.scheduler = TCDScheduler.from_pretrained(folder(name), subfolder="scheduler")
        return pipe
    pipe = DiffusionPipeline.from_pretrained(folder(name), dtype=dtype or torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_recogniser() -> "Recogniser":
    """The scene recogniser, in evaluation mode."""
    from .recogniser import Recogniser

    return Recogniser.from_pretrained(folder("scene-recogniser"))


def pictures(pipe, name: str, captions: list[str], seed: int = 0, batch: int = 50, **call) -> "torch.Tensor":
    """Pictures (N, 3, 64, 64) in [0, 1]; picture n starts from noise of its own seed, whatever the batch size."""
    return _drawn(lambda rows, **given: pipe(rows, **given).images, captions, seed, batch, CALL[name] | call)


def clips(pipe, name: str, captions: list[str], seed: int = 0, batch: int = 10, **call) -> "torch.Tensor":
    """Clips (N, 8, 3, 64, 64) in [0, 1] of a pipeline of VIDEOS; seeds as in `pictures`."""
    return _drawn(lambda rows, **given: pipe(rows, **given).frames, captions, seed, batch, CALL[name] | call)


def _drawn(draw, captions: list[str], seed: int, batch: int, call: dict) -> "torch.Tensor":
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(captions), batch):
            rows = captions[start : start + batch]
            generators = [torch.Generator().manual_seed(seed * 1_000_000 + start + i) for i in range(len(rows))]
            parts.append(draw(rows, generator=generators, **{"output_type": "pt"} | call).float().clamp(0, 1))
        return torch.cat(parts)


def prompts(n: int, objects: int | None = None, seed: int = 0) -> list[tuple[str, "Scene"]]:
    """`n` held-out captions with their labels; `objects` (1, 2 or 3) fixes how many each names.

    Seeds and object counts give disjoint ranges of the held-out stream, which training never reads.
    """
    from . import scenes

    first = ((objects or 0) + 4 * seed) * 1_000_000 + 500_000
    drawn = [scenes.sample(i, scenes.HELD_OUT, objects) for i in range(first, first + n)]
    return [(caption, scene) for scene, caption in drawn]


def motions(n: int, objects: int | None = None, seed: int = 0) -> list[tuple[str, "Clip"]]:
    """`n` held-out captions of clips with their labels; `objects` (1 or 2) and `seed` as in `prompts`."""
    from . import motion

    first = ((objects or 0) + 4 * seed) * 1_000_000 + 500_000
    drawn = [motion.sample(i, motion.HELD_OUT, objects) for i in range(first, first + n)]
    return [(caption, clip) for clip, caption in drawn]
