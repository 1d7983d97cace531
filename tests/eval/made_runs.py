"""Folders of evaluation runs with made-up pictures and scores, as quick as files are written."""

import numpy as np
from PIL import Image

from eval.runs import Item, Run
from eval.suite import Suite

PROMPTS = ["a red circle", "a blue square", 'a <b>star</b> & "ring"', "a yellow disc", "a cyan cross", "a white box"]
SPREAD = {"full": 0, "int8": 3, "int4-weight": 30}
FULL_BYTES = 27_819_072


def suite(**changes):
    given = {
        "name": "made",
        "pipelines": {"tiny-pixart": {}},
        "recipes": ["int8", "int4-weight", {"name": "mixed", "recipe": "int8-weight", "budget": {"bits": 5}}],
        "prompts": {"file": "made.txt"},
        "seeds": [0, 1],
    }
    return Suite.from_dict(given | changes)


def make(folder, prompts=PROMPTS, side=64, frames=None, **changes):
    """A whole run; frames: of each video, None for pictures."""
    asked = suite(**changes)
    pairs = [(prompt, seed) for prompt in prompts for seed in asked.seeds]
    run = Run.create(folder, asked, [Item(index, *pair) for index, pair in enumerate(pairs)])
    for pipeline in run.pipelines:
        for entry in run.entries(pipeline):
            if entry == "mixed":
                run.write_figures(pipeline, entry, {"missing": "budget: this version of dq has no dq.Budget"})
                continue
            for item in run.items:
                run.write_frames(pipeline, entry, item.index, _drawn(item.index, SPREAD[entry], side, frames))
            run.write_figures(pipeline, entry, figures(entry))
            run.write_scores(pipeline, entry, scores(entry, len(run.items)))
    return run


def _drawn(index, spread, side, frames):
    rng = np.random.default_rng(index)
    base = rng.integers(60, 196, (8, 8, 3))
    smooth = np.asarray(Image.fromarray(base.astype(np.uint8)).resize((side, side)), np.int16)
    noise = rng.integers(-spread, spread + 1, (frames or 1, side, side, 3))
    pictures = [Image.fromarray((smooth + part).clip(0, 255).astype(np.uint8)) for part in noise]
    return pictures if frames else pictures[0]


def figures(entry):
    kernels = {"full": {"torch Linear": 62}, "int8": {"dq cpu int8 x int8": 60, "decode int8 + F.linear": 2}}
    own = {"kernels": kernels.get(entry, {"decode int4 + F.linear, int4a emulated": 60, "decode int8 + F.linear": 2})}
    ms = {"full": 18.0, "int8": 14.0}.get(entry, 22.5)
    size = {"full": FULL_BYTES, "int8": 7_655_488}.get(entry, 4_746_402)
    times = {"ms_per_step": ms, "ms_spread": [ms - 0.5, ms + 0.5], "peak_gib": 0.12, "threads": 2, "timed_on": "cpu"}
    own["emulated"] = entry not in kernels
    return own | times | {"missing": None, "seconds": 1.5, "notes": [], "bytes": size, "full_bytes": FULL_BYTES}


def scores(entry, count):
    """psnr is worst at item 3, feature_distance at item 5; lpips and ssim are missing, fid has a note."""
    rng, found = np.random.default_rng(len(entry)), {}
    if entry != "full":
        decibels = (60 - SPREAD[entry] + rng.normal(0, 0.5, count)).tolist()
        decibels[3 % count] = 12.5
        found["psnr"] = score(decibels, "dB")
        distances = (SPREAD[entry] / 100 + rng.uniform(0, 0.01, count)).tolist()
        distances[5 % count] = 3.25
        found["feature_distance"] = score(distances, "1", "lower")
        found["fid_to_full (scene-recogniser)"] = score(None, "1", "lower", value=SPREAD[entry] * 1.5) | {
            "note": f"{count} pictures are too few for a covariance of 256 features"
        }
        found["lpips"] = {"missing": "needs torchvision, not installed here", "instead": "feature_distance"}
        found["ssim"] = {"missing": "needs torchvision, not installed here", "instead": None}
    found["caption_accuracy"] = score([float(index % 6 > 0) for index in range(count)], "1")
    return found


def score(values, unit, better="higher", value=None):
    value = float(np.nanmean(np.array(values, float))) if value is None else value
    row = {"value": value, "low": 0.9 * value, "high": 1.1 * value, "unit": unit, "better": better}
    return row | {"count": 12 if values is None else len(values), "per_item": values, "note": ""}
