"""Caption accuracy: share of pictures in which the scene recogniser finds every object the caption names.

    accuracy = 1/N sum_n [ every (colour, shape) of scene n is among those found in picture n ]

`exact` also asks that nothing else is found; `object_recall` counts objects instead of pictures. The recogniser is a
trained net, right on more than 98 % of held-out renders, so differences under about a point are its own noise.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from pipelines import tiny
from pipelines.tiny.recogniser import Found, Recogniser, is_right, shows_all
from pipelines.tiny.scenes import Scene

NEEDS = ("images", "scenes")
UNITS = {"caption_accuracy": "share of pictures", "exact": "share of pictures", "object_recall": "share of objects"}
BETTER = "higher"


@cache
def recogniser() -> Recogniser:
    """The scene recogniser, loaded once for all metrics."""
    return tiny.load_recogniser()


def as_batch(images) -> torch.Tensor:
    """PIL pictures or a float tensor in [0, 1] -> (N, 3, 64, 64) float32; ValueError for any other shape."""
    if not torch.is_tensor(images):
        arrays = [np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, 64, 64):
        raise ValueError(f"caption accuracy needs pictures (N, 3, 64, 64), got {tuple(images.shape)}")
    return images.float()


def _pairs(images, scenes: Sequence[Scene]) -> list[tuple[list[Found], Scene]]:
    """What each picture shows, beside the scene it is to show; ValueError when there are not as many scenes."""
    batch = as_batch(images)
    if len(batch) != len(scenes):
        raise ValueError(f"caption accuracy needs as many scenes as pictures, got {len(scenes)} and {len(batch)}")
    found = [row for part in batch.split(100) for row in recogniser().find(part)]
    return list(zip(found, scenes, strict=True))


def per_item(images, scenes: Sequence[Scene]) -> list[float]:
    """1 for each picture that shows all objects of its scene, else 0."""
    return [float(shows_all(found, scene)) for found, scene in _pairs(images, scenes)]


def score(images, scenes: Sequence[Scene]) -> dict[str, float]:
    """Accuracy figures of N pictures against the N scenes their captions came from; see the module docstring."""
    pairs = _pairs(images, scenes)
    found = [row for row, _ in pairs]
    seen = [{(f.colour, f.shape) for f in row} for row in found]
    hits = sum(pair in names for names, scene in zip(seen, scenes, strict=True) for pair in scene.wanted)
    return {
        "caption_accuracy": sum(shows_all(f, s) for f, s in pairs) / len(pairs),
        "exact": sum(is_right(f, s) for f, s in pairs) / len(pairs),
        "object_recall": hits / sum(len(scene.wanted) for scene in scenes),
    }
