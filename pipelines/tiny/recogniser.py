"""The scene recogniser: which objects (shape, colour, size, place) a 64x64 picture shows, and features for FID.

A convolutional net looks at a grid of 8x8 cells of 8 pixels. Each cell says how near an object's centre is
(score = exp(-d^2 / 2 s^2), d in cells), the offset to that centre, and the object's shape, colour and size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .scenes import COLOUR_NAMES, SHAPES, SIDE, SIZES, Scene

GRID = 8
CELL = SIDE / GRID
SPREAD = 0.7  # cells
CHANNELS = (1, 2, len(SHAPES), len(COLOUR_NAMES), len(SIZES))


@dataclass(frozen=True)
class Found:
    """One object seen in a picture: names, centre (x, y) in pixels, score in [0, 1]."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    score: float


class Recogniser(nn.Module):
    """Images (N, 3, 64, 64) in [0, 1] -> cell predictions (N, 19, 8, 8)."""

    def __init__(self, width: int = 32, feature_dim: int = 128):
        super().__init__()
        self.config = {"width": width, "feature_dim": feature_dim}
        w = width
        self.stem = nn.Sequential(
            _conv(3, w, 5, 2), _conv(w, w), _conv(w, 2 * w, 3, 2), _conv(2 * w, 2 * w), _conv(2 * w, feature_dim, 3, 2)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(feature_dim, feature_dim), _conv(feature_dim, feature_dim)) for _ in range(3)
        )
        self.head = nn.Conv2d(feature_dim, sum(CHANNELS), 1)

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """Feature maps (N, feature_dim, 8, 8)."""
        x = self.stem((images - 0.5) * 4)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """One vector per picture, (N, 2 feature_dim): mean and maximum over the cells."""
        maps = self.trunk(images).flatten(2)
        return torch.cat([maps.mean(2), maps.amax(2)], 1)

    @torch.no_grad()
    def find(self, images: torch.Tensor, threshold: float = 0.4) -> list[list[Found]]:
        """Objects in each picture, best score first; two finds nearer than 9 pixels are one object."""
        cells = self(images.to(self.head.weight)).float()
        score, offset, shape, colour, size = cells.split(CHANNELS, 1)
        labels = torch.stack([shape.argmax(1), colour.argmax(1), size.argmax(1)], -1)
        centres = (_cell_centres() + offset.permute(0, 2, 3, 1)) * CELL
        rows = zip(score[:, 0].sigmoid(), centres, labels, strict=True)
        return [_decode(s.flatten(), c.reshape(-1, 2), n.reshape(-1, 3), threshold) for s, c, n in rows]

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Recogniser":
        model = cls(**json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
        return model.eval().requires_grad_(False)


def _conv(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(8, outside), nn.SiLU())


def _cell_centres() -> torch.Tensor:
    """(8, 8, 2): x, y of each cell's centre, in cells."""
    axis = torch.arange(GRID) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


def _decode(score: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, threshold: float) -> list[Found]:
    found: list[Found] = []
    for i in score.argsort(descending=True).tolist():
        if score[i] < threshold:
            break
        x, y = centres[i].tolist()
        if all((x - f.x) ** 2 + (y - f.y) ** 2 >= 81 for f in found):
            shape, colour, size = labels[i].tolist()
            found.append(Found(SHAPES[shape], COLOUR_NAMES[colour], SIZES[size], x, y, float(score[i])))
    return found


def targets(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Per cell and scene: score (N,8,8), offset (N,8,8,2), shape, colour, size (N,8,8) of the nearest object."""
    slots = max(len(scene.items) for scene in scenes)
    centres = torch.full((len(scenes), slots, 2), 1e3)
    names = torch.zeros(len(scenes), slots, 3, dtype=torch.long)
    for n, scene in enumerate(scenes):
        for j, item in enumerate(scene.items):
            centres[n, j] = torch.tensor((item.x, item.y))
            names[n, j] = torch.tensor(
                (SHAPES.index(item.shape), COLOUR_NAMES.index(item.colour), SIZES.index(item.size))
            )
    offset = centres[:, :, None, None] / CELL - _cell_centres()
    nearest = offset.square().sum(-1).argmin(1)
    pick = nearest[:, None, :, :, None]
    offset = offset.gather(1, pick.expand(-1, -1, -1, -1, 2))[:, 0]
    names = names[:, :, None, None].expand(-1, -1, GRID, GRID, -1).gather(1, pick.expand(-1, -1, -1, -1, 3))[:, 0]
    score = torch.exp(-offset.square().sum(-1) / (2 * SPREAD**2))
    return {"score": score, "offset": offset, "shape": names[..., 0], "colour": names[..., 1], "size": names[..., 2]}


def loss(cells: torch.Tensor, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of score (binary), offset (L1) and label (cross entropy) terms; labels count by nearness."""
    score, offset, shape, colour, size = cells.float().split(CHANNELS, 1)
    weight = wanted["score"]
    total = weight.sum() + 1e-6
    value = F.binary_cross_entropy_with_logits(score[:, 0], weight, reduction="sum") / total
    error = (offset.permute(0, 2, 3, 1) - wanted["offset"]).abs().sum(-1)
    value = value + (error * weight).sum() / total
    for logits, name in ((shape, "shape"), (colour, "colour"), (size, "size")):
        value = value + (F.cross_entropy(logits, wanted[name], reduction="none") * weight).sum() / total
    return value


def is_right(found: Sequence[Found], scene: Scene) -> bool:
    """True if exactly the scene's objects were found, by colour and shape."""
    return sorted((f.colour, f.shape) for f in found) == scene.wanted


def shows_all(found: Sequence[Found], scene: Scene) -> bool:
    """True if every object of the scene is among those found, by colour and shape."""
    seen = [(f.colour, f.shape) for f in found]
    return all(pair in seen for pair in scene.wanted)


def as_tensor(pictures) -> torch.Tensor:
    """uint8 (N, 64, 64, 3) array -> float (N, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
