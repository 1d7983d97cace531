"""Procedural captioned scenes: 64x64 pictures of one to three coloured shapes, with exact labels.

A scene is drawn from `numpy.random.default_rng([stream, index])`, so every stream is endless, every scene can be
made again alone, and `TRAIN` and `HELD_OUT` never share one. Edges are anti-aliased with signed distances d (pixels):
coverage = clip(1/2 - d, 0, 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 64
TRAIN, HELD_OUT = 1, 2
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.08, 0.62, 0.20),
    "blue": (0.12, 0.24, 0.90),
    "yellow": (0.97, 0.88, 0.10),
    "purple": (0.58, 0.14, 0.74),
    "orange": (0.98, 0.50, 0.05),
    "cyan": (0.12, 0.84, 0.90),
    "white": (0.97, 0.97, 0.97),
}
COLOUR_NAMES = tuple(COLOURS)
RADII = {"small": 9.5, "large": 14.0}  # pixels
SIZES = tuple(RADII)
TONES = {
    "dark": (0.12, 0.12, 0.14),
    "grey": (0.48, 0.48, 0.48),
    "sandy": (0.62, 0.55, 0.44),
    "slate": (0.27, 0.33, 0.41),
    "mossy": (0.30, 0.36, 0.27),
}
TEXTURES = ("graded", "striped", "checked", "glowing")
OBJECT_SHARE = (0.45, 0.40, 0.15)  # one, two, three objects
WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus sign"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ", "a drawing of ")


@dataclass(frozen=True)
class Item:
    """One object: names, centre (x, y) and radius in pixels, fill colour in [0, 1], turned clockwise by radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    fill: tuple[float, float, float]
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One to three objects on a background; `slope` is the direction (x, y) of grading or stripes."""

    items: tuple[Item, ...]
    tone: str
    texture: str
    slope: tuple[float, float]
    strength: float
    phase: float

    @property
    def wanted(self) -> list[tuple[str, str]]:
        """What a picture of this scene must show: (colour, shape) of every object, sorted."""
        return sorted((item.colour, item.shape) for item in self.items)


def sample(index: int, stream: int = TRAIN, objects: int | None = None) -> tuple[Scene, str]:
    """Scene number `index` of a stream and one caption for it; `objects` fixes how many objects it has."""
    rng = np.random.default_rng([stream, index])
    count = objects or 1 + int(np.searchsorted(np.cumsum(OBJECT_SHARE), rng.random()))
    angle = rng.random() * 2 * np.pi
    scene = Scene(
        items=_place(rng, count),
        tone=pick(rng, tuple(TONES)),
        texture=pick(rng, TEXTURES),
        slope=(float(np.cos(angle)), float(np.sin(angle))),
        strength=float(rng.uniform(0.04, 0.10)),
        phase=float(rng.random()),
    )
    return scene, caption(scene, rng)


def pick(rng: np.random.Generator, options: Sequence):
    """One of the options, by one draw."""
    return options[int(rng.random() * len(options))]


def _place(rng: np.random.Generator, count: int) -> tuple[Item, ...]:
    """Objects that do not touch: distinct (shape, colour) pairs, at most one large of three."""
    pairs = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    while True:
        sizes = [pick(rng, SIZES) for _ in range(count)]
        if count == 3 and sizes.count("large") > 1:
            continue
        for _ in range(20):
            radii = [RADII[size] + rng.uniform(-0.6, 0.6) for size in sizes]
            centres = [rng.uniform(r * 1.12 + 1, SIDE - r * 1.12 - 1, 2) for r in radii]
            if _apart(centres, radii):
                return tuple(_item(rng, *row) for row in zip(pairs, sizes, centres, radii, strict=True))


def _apart(centres: list[np.ndarray], radii: list[float]) -> bool:
    for i in range(len(radii)):
        for j in range(i):
            gap = np.hypot(*(centres[i] - centres[j]))
            if gap < 1.12 * (radii[i] + radii[j]) + 1:
                return False
    return True


def _item(rng: np.random.Generator, pair: int, size: str, centre: np.ndarray, radius: float) -> Item:
    colour, shape = COLOUR_NAMES[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)]
    fill = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1)
    return Item(shape, colour, size, float(centre[0]), float(centre[1]), float(radius), tuple(map(float, fill)))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many wordings for a scene; shape and colour of every object are always named."""
    names = [noun(item, rng) for item in scene.items]
    if len(names) == 1:
        text = names[0] + (f" {_spot(scene.items[0], rng)}" if rng.random() < 0.4 else "")
    elif len(names) == 2:
        text = _pair(scene.items, names, rng)
    else:
        text = _triple(scene.items, names, rng)
    if rng.random() < 0.3:
        texture = f"{scene.texture} " if rng.random() < 0.5 else ""
        text += f" on {article(f'{texture}{scene.tone} background')}"
    return pick(rng, OPENINGS) + text


def article(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def noun(item: Item, rng: np.random.Generator) -> str:
    """An object in words; its size is named by halves, and not at all where it has none ("")."""
    size = f"{pick(rng, WORDS[item.size])} " if rng.random() < 0.5 and item.size else ""
    return article(f"{size}{item.colour} {pick(rng, WORDS[item.shape])}")


def _spot(item: Item, rng: np.random.Generator) -> str:
    """Where in the picture a lone object is, in thirds (centres range over about 11..53 pixels)."""
    column = ("left", "", "right")[int(item.x > 27) + int(item.x > 37)]
    row = ("top", "", "bottom")[int(item.y > 27) + int(item.y > 37)]
    if not column and not row:
        return pick(rng, ("in the middle", "in the centre"))
    if column and row:
        return f"in the {row} {column}"
    return f"on the {column}" if column else f"at the {row}"


def _relation(a: Item, b: Item, rng: np.random.Generator) -> str | None:
    """A relation of a to b that clearly holds (the longer axis of their distance), as words."""
    dx, dy = a.x - b.x, a.y - b.y
    if min(abs(dx), abs(dy)) > 0.75 * max(abs(dx), abs(dy)):
        return None
    name = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return pick(rng, WORDS[name])


def _pair(items: Sequence[Item], names: list[str], rng: np.random.Generator) -> str:
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    relation = _relation(items[order[0]], items[order[1]], rng)
    first, second = names[order[0]], names[order[1]]
    if relation is None or rng.random() < 0.3:
        return f"{first} {pick(rng, ('and', 'and', 'with', 'next to'))} {second}"
    return f"{first} {relation} {second}"


def _triple(items: Sequence[Item], names: list[str], rng: np.random.Generator) -> str:
    order = rng.permutation(3)
    first, second, third = (names[i] for i in order)
    relation = _relation(items[order[0]], items[order[1]], rng)
    if relation is None or rng.random() < 0.5:
        return f"{first}, {second} and {third}"
    return f"{first} {relation} {second}, and {third}"


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Pictures of scenes: uint8 (N, 64, 64, 3)."""
    parts = [_render(scenes[i : i + 128]) for i in range(0, len(scenes), 128)]
    return np.concatenate(parts) if parts else np.zeros((0, SIDE, SIDE, 3), np.uint8)


def _render(scenes: Sequence[Scene]) -> np.ndarray:
    picture = _background(scenes)
    for slot in range(max(len(scene.items) for scene in scenes)):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if len(s.items) > slot and s.items[slot].shape == shape]
            if rows:
                items = [scenes[i].items[slot] for i in rows]
                alpha = np.clip(0.5 - distance(shape, *_local(items)), 0, 1)[..., None]
                fill = np.array([item.fill for item in items], np.float32)[:, None, None]
                picture[rows] += alpha * (fill - picture[rows])
    return (picture * 255 + 0.5).astype(np.uint8)


def _local(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel coordinates in each object's frame, and the radii: x (n, 1 or 64, 64), y (n, 64, 1 or 64), r (n, 1, 1)."""
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - np.array([i.x for i in items], np.float32)[:, None, None]
    y = grid[None, :, None] - np.array([i.y for i in items], np.float32)[:, None, None]
    if any(item.angle for item in items):
        angle = np.array([i.angle for i in items], np.float32)[:, None, None]
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return x, y, np.array([i.radius for i in items], np.float32)[:, None, None]


def distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance (pixels, negative inside, exact near straight edges) to a shape of radius r at the origin."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.96 * r
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.80 * r) - 0.22 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84 * r
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(a, b) - r, np.minimum(a, b) - 0.30 * r)
    if shape == "triangle":
        return np.maximum(y - 0.72 * r, 0.8746 * np.abs(x) - 0.4848 * y - 0.52 * r)
    return _star(x, y, r)


def _star(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Five-pointed star, point up: fold the angle into one tenth of a turn, then one straight edge."""
    outer, inner, tenth = 1.12, 0.50, np.pi / 5
    radius, angle = np.sqrt(x * x + y * y), np.arctan2(x, -y)
    folded = np.abs((angle + tenth) % (2 * tenth) - tenth)
    px, py = radius * np.cos(folded), radius * np.sin(folded)
    ex, ey = inner * np.cos(tenth) - outer, inner * np.sin(tenth)
    norm = float(np.hypot(ex, ey))
    return (ey * (px - outer * r) - ex * py) / norm


def _background(scenes: Sequence[Scene]) -> np.ndarray:
    """Float pictures (n, 64, 64, 3): a tone, a gentle grade, and for some a low-contrast texture."""
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE - 0.5
    slope = np.array([s.slope for s in scenes], np.float32)[:, :, None, None]
    along = slope[:, 0] * grid[None, None, :] + slope[:, 1] * grid[None, :, None]
    strength = np.array([s.strength for s in scenes], np.float32)[:, None, None]
    phase = np.array([s.phase for s in scenes], np.float32)[:, None, None] * (2 * np.pi)
    texture = np.array([TEXTURES.index(s.texture) for s in scenes])[:, None, None]
    wave = np.sin(along * 38 + phase)
    check = np.sin(grid * 25 + phase)[:, :, :] * np.sin(grid[:, None] * 25 + phase)
    glow = 0.8 - 4 * (grid[None, None, :] ** 2 + grid[None, :, None] ** 2)
    shade = np.select([texture == 0, texture == 1, texture == 2], [2 * along, 0.6 * wave, 0.8 * check], glow)
    tone = np.array([TONES[s.tone] for s in scenes], np.float32)[:, None, None]
    return np.clip(tone + (strength * shade)[..., None], 0, 1).astype(np.float32)
