"""What moves in a clip, and how, as the scene recogniser sees it frame by frame.

An object is followed by its colour. Its motion is read from the line through its centres (least squares), from the
area of its pixels and from their change about the centre; thresholds lie half-way between no motion and the slowest.
"""

from collections.abc import Sequence

import numpy as np
import torch

from . import motion, scenes
from .recogniser import Found, Recogniser

MOVED = 0.5 * motion.SPEEDS["slow"] * (motion.FRAMES - 1)  # pixels
MET = 6.0  # pixels that two objects came nearer
GROWN = motion.GROWTH  # of the area: half-way to the square of it, in logarithms
TURNED = 0.3  # pixels that differ from the first frame's, as a share of the object's
REACH = 20  # pixels around a centre that belong to an object
NEAR = 0.45  # distance of colours, of the unit cube
SEEN = 0.6  # share of the frames that an object must be found in


def judge(frames: torch.Tensor, clip: motion.Clip, recogniser: Recogniser) -> list[tuple[bool, str]]:
    """frames (F, 3, 64, 64) in [0, 1] -> for each object of the clip: whether its shape and colour are seen, and the
    kind of its motion, "" for one that was lost."""
    found = recogniser.find(frames)
    tracks = [_track(found, item.colour, item.shape) for item in clip.scene.items]
    kinds = [_kind(frames, track, item.colour) for track, item in zip(tracks, clip.scene.items, strict=True)]
    if len(tracks) == 2 and all(kinds) and _met(*tracks):
        kinds = ["meet", "meet"]
    return [
        (_right(track, item.shape, len(frames), moves.kind), kind)
        for track, item, moves, kind in zip(tracks, clip.scene.items, clip.motions, kinds, strict=True)
    ]


def _track(found: Sequence[Sequence[Found]], colour: str, shape: str) -> dict[int, Found]:
    """By frame, the object of that colour, of that shape if there are several."""
    track = {}
    for n, items in enumerate(found):
        same = [item for item in items if item.colour == colour]
        if same:
            track[n] = max(same, key=lambda item: (item.shape == shape, item.score))
    return track


def _right(track: dict[int, Found], shape: str, frames: int, kind: str) -> bool:
    """A turned shape looks like another one in some frames: there two are enough."""
    hits = sum(item.shape == shape for item in track.values())
    return hits >= (2 if kind == "turn" else SEEN * frames)


def _line(track: dict[int, Found]) -> np.ndarray:
    """(2,) pixels that the line through the centres goes from the first frame to the last."""
    n = np.array(list(track), float)
    places = np.array([(item.x, item.y) for item in track.values()])
    return np.polyfit(n, places, 1)[0] * (motion.FRAMES - 1)


def _met(a: dict[int, Found], b: dict[int, Found]) -> bool:
    both = sorted(a.keys() & b.keys())
    if len(both) < 2:
        return False
    first, last = (np.hypot(a[n].x - b[n].x, a[n].y - b[n].y) for n in (both[0], both[-1]))
    way, other = _line(a), _line(b)
    speeds = np.hypot(*way), np.hypot(*other)
    opposite = way @ other < -0.9 * speeds[0] * speeds[1]
    return bool(first - last > MET and opposite and max(speeds) < 2 * min(speeds))


def _kind(frames: torch.Tensor, track: dict[int, Found], colour: str) -> str:
    if len(track) < SEEN * len(frames):
        return ""
    dx, dy = _line(track)
    if max(abs(dx), abs(dy)) > MOVED:
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
    masks = {n: _mask(frames[n], item, colour) for n, item in track.items()}
    areas = np.array([mask.sum() for mask in masks.values()], float) + 1
    growth = float(np.exp(np.polyfit(list(masks), np.log(areas), 1)[0] * (motion.FRAMES - 1)))
    if not 1 / GROWN < growth < GROWN:
        return "grow" if growth > 1 else "shrink"
    start = next(iter(masks.values()))
    change = max(float((mask != start).sum()) / (start.sum() + 1) for mask in masks.values())
    return "turn" if change > TURNED else "still"


def _mask(frame: torch.Tensor, item: Found, colour: str) -> np.ndarray:
    """(64, 64) pixels near the object's centre that have its colour."""
    away = np.linalg.norm(frame.permute(1, 2, 0).float().numpy() - np.array(scenes.COLOURS[colour]), axis=-1)
    axis = np.arange(scenes.SIDE) + 0.5
    near = np.hypot(axis[None, :] - item.x, axis[:, None] - item.y) < REACH
    return (away < NEAR) & near
