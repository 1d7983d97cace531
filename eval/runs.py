"""The folder of an evaluation run: what was asked, what was drawn, what was measured.

    manifest.json                             suite with all defaults, commit, versions, machine, created
    items.jsonl                               one line a picture: index, prompt, seed, scene
    models/<pipeline>/<entry>/                the saved quantized pipeline
    images/<pipeline>/<entry>/00000.png       picture of item 0; a video is a folder 00000 of frames 000.png, ...
    latents/<pipeline>/<entry>/00000.safetensors   latents after every step, only for metrics of the trajectory
    figures/<pipeline>/<entry>.json           kernels, bytes, time and memory, or why the entry is missing
    scores/<pipeline>/<entry>.json            what the metrics say

Everything is written whole or not at all, so that a run killed at any moment holds nothing half done.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dq.disk import write, write_json
from dq.errors import DQError
from eval.experiments.rows import stamp
from eval.suite import Suite

MANIFEST, ITEMS = "manifest.json", "items.jsonl"


@dataclass(frozen=True)
class Item:
    """One picture to draw. index: prompt number * seeds + seed number; scene: what a prompt of the grammar names."""

    index: int
    prompt: str
    seed: int
    scene: dict[str, Any] | None = None


class Run:
    """A run's folder. Raises DQError when it holds none."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            hint = "make one with `python -m eval run SUITE.yaml --out DIR`"
            raise DQError(f"{str(folder)!r} holds no evaluation run: no {MANIFEST}; {hint}")
        self.manifest = _json(self.folder / MANIFEST)
        self.suite = Suite.from_dict(self.manifest["suite"])

    @classmethod
    def create(cls, folder: str | Path, suite: Suite, items: Sequence[Item]) -> Run:
        """The run of a suite in a folder, new or to go on with. DQError when the folder holds something else."""
        folder = Path(folder)
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        mine = {"suite": suite.to_dict(), "items": len(items), "items_crc32": f"{zlib.crc32(lines.encode()):08x}"}
        if (folder / MANIFEST).is_file():
            _same(_json(folder / MANIFEST), json.loads(json.dumps(mine)), folder)
            return cls(folder)
        if folder.is_dir() and any(path.name.removesuffix(".part") != ITEMS for path in folder.iterdir()):
            raise DQError(f"folder {str(folder)!r} is not empty and holds no run; give a new folder")
        write(folder / ITEMS, lambda fresh: fresh.write_text(lines, encoding="utf-8"))
        write_json(folder / MANIFEST, mine | stamp() | {"created": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"})
        return cls(folder)

    @property
    def pipelines(self) -> list[str]:
        return [pipeline.name for pipeline in self.suite.pipelines]

    def entries(self, pipeline: str) -> list[str]:
        """Names of all entries, `full` first, those that are missing included."""
        self.suite.pipeline(pipeline)
        return [entry.name for entry in self.suite.entries]

    @cached_property
    def items(self) -> list[Item]:
        with (self.folder / ITEMS).open(encoding="utf-8") as file:
            return [Item(**json.loads(line)) for line in file]

    def has(self, pipeline: str, entry: str, index: int) -> bool:
        """Whether that picture or video has been drawn."""
        place = self.image_path(pipeline, entry, index)
        return place.is_file() or place.with_suffix("").is_dir()

    def drawn(self, pipeline: str, entry: str) -> bool:
        """Whether every picture of an entry is there."""
        return all(self.has(pipeline, entry, item.index) for item in self.items)

    def picture(self, pipeline: str, entry: str, index: int) -> Image.Image:
        """The picture, of a video its first frame. DQError when it has not been drawn."""
        return _open(self._frame_paths(pipeline, entry, index)[0])

    def frames(self, pipeline: str, entry: str, index: int) -> list[Image.Image]:
        """The frames of a video; the one picture of an image."""
        return [_open(path) for path in self._frame_paths(pipeline, entry, index)]

    def is_video(self, pipeline: str, entry: str, index: int = 0) -> bool:
        return self.image_path(pipeline, entry, index).with_suffix("").is_dir()

    def image_path(self, pipeline: str, entry: str, index: int) -> Path:
        """Where the picture of an item is, or will be."""
        return self.folder / "images" / pipeline / entry / f"{index:05d}.png"

    def trajectory(self, pipeline: str, entry: str, index: int) -> torch.Tensor | None:
        """Latents of an item after every step, (steps, ...) fp32; None when the suite did not ask for them."""
        path = self.latents_path(pipeline, entry, index)
        return load_file(path)["latents"] if path.is_file() else None

    def latents_path(self, pipeline: str, entry: str, index: int) -> Path:
        return self.folder / "latents" / pipeline / entry / f"{index:05d}.safetensors"

    def model_path(self, pipeline: str, entry: str) -> Path:
        return self.folder / "models" / pipeline / entry

    def figures(self, pipeline: str, entry: str) -> dict[str, Any]:
        """Kernels, bytes, time and memory of an entry; {} before they are measured."""
        return _json(self._path("figures", pipeline, entry))

    def scores(self, pipeline: str, entry: str) -> dict[str, Any]:
        """What the metrics say of an entry, by metric; {} before they were computed."""
        return _json(self._path("scores", pipeline, entry))

    def missing(self, pipeline: str, entry: str) -> str | None:
        """Why an entry could not be made, None when it could."""
        return self.figures(pipeline, entry).get("missing")

    def write_figures(self, pipeline: str, entry: str, figures: dict[str, Any]) -> None:
        write_json(self._path("figures", pipeline, entry), figures)

    def write_scores(self, pipeline: str, entry: str, scores: dict[str, Any]) -> None:
        write_json(self._path("scores", pipeline, entry), scores)

    def write_frames(self, pipeline: str, entry: str, index: int, frames: Sequence[Image.Image] | Image.Image) -> None:
        """Keep a picture, or the frames of a video."""
        place = self.image_path(pipeline, entry, index)
        if isinstance(frames, Image.Image):
            write(place, lambda fresh: frames.save(fresh, format="PNG"))
        else:
            write(place.with_suffix(""), lambda fresh: _save_all(frames, fresh))

    def write_trajectory(self, pipeline: str, entry: str, index: int, latents: torch.Tensor) -> None:
        tensors = {"latents": latents.float().contiguous()}
        write(self.latents_path(pipeline, entry, index), lambda fresh: save_file(tensors, fresh))

    def _frame_paths(self, pipeline: str, entry: str, index: int) -> list[Path]:
        place = self.image_path(pipeline, entry, index)
        found = (
            [place]
            if place.is_file()
            else sorted(place.with_suffix("").glob("*.png"), key=lambda path: int(path.stem))
        )
        if not found:
            raise DQError(
                f"run {str(self.folder)!r} has no picture {index} of {pipeline} {entry}; run the suite again"
            )
        return found

    def _path(self, what: str, pipeline: str, entry: str) -> Path:
        return self.folder / what / pipeline / f"{entry}.json"


def _save_all(frames: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03d}.png", format="PNG")


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DQError(
            f"file {str(path)!r} of a run cannot be read: {error}; delete it and run the suite again"
        ) from None


def _same(found: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    """DQError when a folder's manifest is not of the suite that is asked for."""
    old, new = found["suite"] | found, mine["suite"] | mine
    differs = [key for key in new if key != "suite" and old.get(key) != new[key]]
    if differs:
        what = "the prompts" if differs[0].startswith("items") else differs[0]
        raise DQError(f"folder {str(folder)!r} holds the run of another suite: {what} differs; choose another folder")
