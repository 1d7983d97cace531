"""Procedural captioned clips: eight frames of the scenes of `scenes`, whose objects move, turn, grow, shrink or meet.

A clip is drawn from `numpy.random.default_rng([stream, index])` as scenes are; `TRAIN` and `HELD_OUT` never share one.
Positions change by a constant number of pixels a frame, sizes by a constant factor, angles by a constant turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import scenes
from .scenes import SIDE, Item, Scene

FRAMES = 8
TRAIN, HELD_OUT = 11, 12
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
KINDS = ("still", *DIRECTIONS, "turn", "grow", "shrink", "meet")
SHARES = (0.10, 0.14, 0.14, 0.14, 0.14, 0.10, 0.08, 0.08, 0.08)
SPEEDS = {"slow": 1.6, "fast": 3.6}  # pixels a frame
TURN = {"slow": 0.10, "fast": 0.22}  # radians a frame
GROWTH = 1.55  # of the radius, from the first frame to the last
TURNING = ("square", "triangle", "star", "cross")  # whose turn can be seen
WORDS = {
    "still": ("standing still", "at rest"),
    "left": ("moving left", "moving to the left", "sliding left"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "up": ("moving up", "rising", "sliding up"),
    "down": ("moving down", "falling", "sliding down"),
    "turn": ("turning", "spinning"),
    "grow": ("growing", "getting larger"),
    "shrink": ("shrinking", "getting smaller"),
    "meet": ("moving towards each other", "meeting"),
    "slow": ("slowly",),
    "fast": ("quickly",),
}
OBJECT_SHARE = 0.7  # of clips with one object; the rest has two


@dataclass(frozen=True)
class Motion:
    """What one object does: a kind of KINDS, "slow" or "fast" ("" where it has no speed), and its change a frame.

    step    (x, y) pixels; turn: radians; factor: on the radius
    """

    kind: str
    speed: str = ""
    step: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Clip:
    """A scene as its first frame shows it, and the motion of each of its objects."""

    scene: Scene
    motions: tuple[Motion, ...]

    @property
    def wanted(self) -> list[tuple[str, str, str]]:
        """What the clip must show: (colour, shape, motion) of every object, sorted."""
        return sorted((i.colour, i.shape, m.kind) for i, m in zip(self.scene.items, self.motions, strict=True))

    def frame(self, n: int) -> Scene:
        """The scene as frame n of FRAMES shows it: exact labels."""
        pairs = zip(self.scene.items, self.motions, strict=True)
        return replace(self.scene, items=tuple(_moved(item, motion, n) for item, motion in pairs))


def _moved(item: Item, motion: Motion, n: int) -> Item:
    (dx, dy), radius = motion.step, item.radius * motion.factor**n
    return replace(item, x=item.x + n * dx, y=item.y + n * dy, radius=radius, angle=n * motion.turn)


def sample(index: int, stream: int = TRAIN, objects: int | None = None) -> tuple[Clip, str]:
    """Clip number `index` of a stream and one caption for it; `objects` (1 or 2) fixes how many objects it has."""
    rng = np.random.default_rng([stream, index])
    count = objects or (1 if rng.random() < OBJECT_SHARE else 2)
    kinds = [_kind(rng, count) for _ in range(count)]
    while True:
        clip = Clip(scenes.sample(int(rng.integers(2**40)), stream, count)[0], ())
        made = _meeting(rng, clip) if "meet" in kinds else _apart(rng, clip, kinds)
        if made is not None:
            return made, caption(made, rng)


def _kind(rng: np.random.Generator, count: int) -> str:
    kind = KINDS[int(np.searchsorted(np.cumsum(SHARES), rng.random()))]
    return kind if count == 2 or kind != "meet" else _kind(rng, count)


def _motion(rng: np.random.Generator, kind: str) -> Motion:
    if kind == "still":
        return Motion(kind)
    if kind in ("grow", "shrink"):
        factor = GROWTH ** (1 / (FRAMES - 1))
        return Motion(kind, factor=factor if kind == "grow" else 1 / factor)
    speed = "slow" if rng.random() < 0.5 else "fast"
    if kind == "turn":
        return Motion(kind, speed, turn=TURN[speed])
    pixels = SPEEDS[speed] * rng.uniform(0.9, 1.1)
    return Motion(kind, speed, step=tuple(pixels * axis for axis in DIRECTIONS[kind]))


def _apart(rng: np.random.Generator, clip: Clip, kinds: list[str]) -> Clip | None:
    """Objects that move each for itself: placed so that none leaves the picture or touches another one; or None."""
    items, motions = [], [_motion(rng, kind) for kind in kinds]
    for item, motion in zip(clip.scene.items, motions, strict=True):
        if motion.kind == "turn" and item.shape not in TURNING:
            return None
        if motion.kind == "shrink":
            item = replace(item, radius=scenes.RADII["large"])
        if motion.kind == "grow":
            item = replace(item, radius=scenes.RADII["small"])
        size = "large" if item.radius > 11.75 else "small"
        ends = [_moved(replace(item, x=0.0, y=0.0, size=size), motion, n) for n in (0, FRAMES - 1)]
        places = []
        for axis in ("x", "y"):
            low = max(end.radius * 1.12 + 1 - getattr(end, axis) for end in ends)
            high = min(SIDE - end.radius * 1.12 - 1 - getattr(end, axis) for end in ends)
            if low > high:
                return None
            places.append(float(rng.uniform(low, high)))
        items.append(replace(item, x=places[0], y=places[1], size=size))
    made = Clip(replace(clip.scene, items=tuple(items)), tuple(motions))
    return made if all(_free(made.frame(n)) for n in range(FRAMES)) else None


def _free(scene: Scene) -> bool:
    if len(scene.items) < 2:
        return True
    a, b = scene.items
    return np.hypot(a.x - b.x, a.y - b.y) > 1.1 * (a.radius + b.radius) + 1


def _meeting(rng: np.random.Generator, clip: Clip) -> Clip | None:
    """Two objects that start at two sides of the picture and nearly touch in the last frame."""
    across = rng.random() < 0.5
    sides, items = [], []
    for item, end in zip(clip.scene.items, rng.permutation([0, 1]), strict=True):
        item = replace(item, radius=scenes.RADII["small"], size="small")
        edge = item.radius * 1.12 + 1
        sides.append(edge if end == 0 else SIDE - edge)
        items.append(item)
    gap = abs(sides[1] - sides[0]) - 1.1 * (items[0].radius + items[1].radius) - 1
    pixels = gap / 2 / (FRAMES - 1)
    level = float(rng.uniform(SIDE * 0.25, SIDE * 0.75))
    placed, motions = [], []
    for item, side in zip(items, sides, strict=True):
        step = pixels if side < SIDE / 2 else -pixels
        placed.append(replace(item, x=side if across else level, y=level if across else side))
        motions.append(Motion("meet", step=(step, 0.0) if across else (0.0, step)))
    return Clip(replace(clip.scene, items=tuple(placed)), tuple(motions))


def caption(clip: Clip, rng: np.random.Generator) -> str:
    """One of many wordings; colour, shape and motion of every object are always named, sizes and speeds by halves."""
    nouns = [scenes.noun(_fixed(i, m), rng) for i, m in zip(clip.scene.items, clip.motions, strict=True)]
    if clip.motions[0].kind == "meet":
        text = f"{nouns[0]} and {nouns[1]} {scenes.pick(rng, WORDS['meet'])}"
    else:
        text = " and ".join(f"{noun} {_words(m, rng)}" for noun, m in zip(nouns, clip.motions, strict=True))
    if rng.random() < 0.3:
        text += f" on {scenes.article(f'{clip.scene.tone} background')}"
    return scenes.pick(rng, scenes.OPENINGS) + text


def _fixed(item: Item, motion: Motion) -> Item | None:
    """The item, or without its size where that changes."""
    return replace(item, size="") if motion.kind in ("grow", "shrink") else item


def _words(motion: Motion, rng: np.random.Generator) -> str:
    words = scenes.pick(rng, WORDS[motion.kind])
    return f"{words} {scenes.pick(rng, WORDS[motion.speed])}" if motion.speed and rng.random() < 0.5 else words


def render(clips: Sequence[Clip]) -> np.ndarray:
    """Frames of clips: uint8 (N, FRAMES, 64, 64, 3)."""
    frames = scenes.render([clip.frame(n) for clip in clips for n in range(FRAMES)])
    return frames.reshape(len(clips), FRAMES, SIDE, SIDE, 3)
