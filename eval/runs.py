"""The folder of an evaluation run: what was asked, what was drawn, what was measured.

    manifest.json                             suite with all defaults, commit, versions, machine, created
    items.jsonl                               one line a picture: index, prompt, seed, scene
    models/<pipeline>/<entry>/                the saved quantized pipeline
    images/<pipeline>/<entry>/00000.png       picture of item 0; a video is a folder 00000 of frames 000.png, ...
    latents/<pipeline>/<entry>/00000.safetensors   latents after every step, only for metrics of the trajectory
    predictions/<pipeline>/<entry>.safetensors     what the denoisers answer to the calls that full precision makes for
                                                   the first REPLAYED items, and what it answered; only for noise_sqnr
    figures/<pipeline>/<entry>.json           kernels, bytes, time and memory, or why the entry is missing
    scores/<pipeline>/<entry>.json            what the metrics say

Everything is written whole or not at all, so that a run killed at any moment holds nothing half done. What was damaged
afterwards is named, with what to delete for it to be made again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from PIL import Image
from pydantic import Field, model_validator

from dq.disk import write, write_json
from dq.errors import DQError
from eval import reading
from eval.experiments.rows import stamp
from eval.reading import Open, Text, whole
from eval.suite import Suite

if TYPE_CHECKING:
    import torch

MANIFEST, ITEMS = "manifest.json", "items.jsonl"
REPLAYED = 8  # items whose denoiser calls an entry answers, too
AGAIN = "delete it and run the suite again"
NO_MANIFEST = "it says what the pictures are of: put it back, or delete the folder and run the suite again"


class Manifest(Open):
    """What manifest.json must hold, as the forms below of other files."""

    suite: dict[str, Any]
    items: whole(0)
    items_crc32: Text
    commit: Text
    versions: dict[str, Text]
    machine: Text
    created: Text


class Figures(Open):
    missing: Text | None = None
    emulated: bool = False
    kernels: dict[str, whole(0)] = {}  # noqa: RUF012
    bytes: whole(0) | None = None
    full_bytes: whole(0) | None = None
    ms_per_step: float | None = None
    ms_spread: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    peak_gib: float | None = None
    seconds: float | None = None
    notes: list[str] = []  # noqa: RUF012


class Score(Open):
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: Text = ""
    better: Literal["higher", "lower"] = "higher"
    per_item: list[float | None] | None = None
    note: str = ""
    missing: str | None = None
    instead: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> Score:
        if self.value is not None and not {"unit", "better"} <= self.model_fields_set:
            raise ValueError("a value needs unit and better beside it")
        return self


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
        self.manifest = _json(self.folder / MANIFEST, Manifest, NO_MANIFEST)
        try:
            self.suite = Suite.from_dict(self.manifest["suite"])
        except DQError as error:
            raise DQError(
                f"file {str(self.folder / MANIFEST)!r} of a run is damaged: {error}; {NO_MANIFEST}"
            ) from None
        self._shapes: dict[tuple[str, str], tuple] = {}

    @classmethod
    def create(cls, folder: str | Path, suite: Suite, items: Sequence[Item]) -> Run:
        """The run of a suite in a folder, new or to go on with. DQError when the folder holds something else."""
        folder = Path(folder)
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items).encode()
        mine = {"suite": suite.to_dict(), "items": len(items), "items_crc32": _crc32(lines)}
        if (folder / MANIFEST).is_file():
            found = cls(folder)
            _same(found.manifest, json.loads(json.dumps(mine)), folder)
            if not (folder / ITEMS).is_file():
                write(folder / ITEMS, lambda fresh: fresh.write_bytes(lines))
            return found
        if folder.is_dir() and any(path.name.removesuffix(".part") != ITEMS for path in folder.iterdir()):
            raise DQError(f"folder {str(folder)!r} is not empty and holds no run; give a new folder")
        write(folder / ITEMS, lambda fresh: fresh.write_bytes(lines))
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
        what = f"file {str(self.folder / ITEMS)!r} of a run"
        text = reading.text(self.folder / ITEMS, what, reading.MOST_JSON, AGAIN)
        if _crc32(text.encode()) != self.manifest["items_crc32"]:
            raise DQError(f"{what} is damaged: its checksum is not the one of {MANIFEST}; {AGAIN}")
        rows = [reading.from_json(line, what, AGAIN) for line in text.split("\n") if line]
        found = reading.checked(list[Item], rows, what, AGAIN)
        if [item.index for item in found] != list(range(self.manifest["items"])):
            raise DQError(f"{what} is damaged: its items are not numbered from 0; {AGAIN}")
        return found

    def has(self, pipeline: str, entry: str, index: int) -> bool:
        """Whether that picture or video has been drawn."""
        place = self.image_path(pipeline, entry, index)
        return place.is_file() or place.with_suffix("").is_dir()

    def drawn(self, pipeline: str, entry: str) -> bool:
        """Whether every picture of an entry is there."""
        return all(self.has(pipeline, entry, item.index) for item in self.items)

    def picture(self, pipeline: str, entry: str, index: int) -> Image.Image:
        """The picture, of a video its first frame. DQError when it has not been drawn."""
        return reading.picture(self._frame_paths(pipeline, entry, index)[0], AGAIN)

    def frames(self, pipeline: str, entry: str, index: int) -> list[Image.Image]:
        """The frames of a video; the one picture of an image. DQError when other items of the entry look different."""
        paths = self._frame_paths(pipeline, entry, index)
        found = [reading.picture(path, AGAIN) for path in paths]
        shape = (len(found), *found[0].size)
        first, wanted = self._shapes.setdefault((pipeline, entry), (paths[0], shape))
        if shape != wanted or any(frame.size != found[0].size for frame in found):
            sizes = " and ".join(f"{count} x {width} x {height}" for count, width, height in (shape, wanted))
            pair = f"{str(paths[0])!r} and {str(first)!r}"
            raise DQError(f"pictures {pair} are {sizes} (frames, width, height); delete the wrong one and run again")
        return found

    def is_video(self, pipeline: str, entry: str, index: int = 0) -> bool:
        return self.image_path(pipeline, entry, index).with_suffix("").is_dir()

    def image_path(self, pipeline: str, entry: str, index: int) -> Path:
        """Where the picture of an item is, or will be."""
        return self.folder / "images" / pipeline / entry / f"{index:05d}.png"

    def trajectory(self, pipeline: str, entry: str, index: int) -> torch.Tensor | None:
        """Latents of an item after every step, (steps, ...) fp32; None when the suite did not ask for them."""
        path = self.latents_path(pipeline, entry, index)
        if not path.is_file():
            return None
        from safetensors.torch import load_file  # here: the command line answers without torch

        try:
            return load_file(path)["latents"]
        except Exception as error:  # of whatever the bytes were taken for
            picture = str(self.image_path(pipeline, entry, index))
            hint = f"delete it and {picture!r}, and run the suite again"
            raise DQError(f"latents {str(path)!r} cannot be read: {error}; {hint}") from None

    def latents_path(self, pipeline: str, entry: str, index: int) -> Path:
        return self.folder / "latents" / pipeline / entry / f"{index:05d}.safetensors"

    def predictions(self, pipeline: str, entry: str) -> dict[str, torch.Tensor]:
        """`predictions` and `reference` (calls, ...), noisiest first; {} when the suite did not ask for them."""
        path = self.predictions_path(pipeline, entry)
        if not path.is_file():
            return {}
        from safetensors.torch import load_file  # here: the command line answers without torch

        try:
            found = load_file(path)
        except Exception as error:  # of whatever the bytes were taken for
            raise DQError(f"predictions {str(path)!r} cannot be read: {error}; {AGAIN}") from None
        if found.keys() != {"predictions", "reference"}:
            got = ", ".join(sorted(found)) or "nothing"
            raise DQError(f"predictions {str(path)!r} hold {got}, expected predictions and reference; {AGAIN}")
        return found

    def predictions_path(self, pipeline: str, entry: str) -> Path:
        return self._path("predictions", pipeline, entry).with_suffix(".safetensors")

    def model_path(self, pipeline: str, entry: str) -> Path:
        return self.folder / "models" / pipeline / entry

    def figures(self, pipeline: str, entry: str) -> dict[str, Any]:
        """Kernels, bytes, time and memory of an entry; {} before they are measured."""
        return _json(self._path("figures", pipeline, entry), Figures)

    def scores(self, pipeline: str, entry: str) -> dict[str, Any]:
        """What the metrics say of an entry, by metric; {} before they were computed."""
        return _json(self._path("scores", pipeline, entry), dict[str, Score])

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
        from safetensors.torch import save_file

        tensors = {"latents": latents.float().contiguous()}
        write(self.latents_path(pipeline, entry, index), lambda fresh: save_file(tensors, fresh))

    def write_predictions(self, pipeline: str, entry: str, found: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        write(self.predictions_path(pipeline, entry), lambda fresh: save_file(found, fresh))

    def _frame_paths(self, pipeline: str, entry: str, index: int) -> list[Path]:
        place = self.image_path(pipeline, entry, index)
        folder = place.with_suffix("")
        if place.is_file():
            return [place]
        found = sorted(folder.glob("*.png"), key=lambda path: (len(path.name), path.name))
        if not found:
            raise DQError(
                f"run {str(self.folder)!r} has no picture {index} of {pipeline} {entry}; run the suite again"
            )
        if [path.name for path in found] != [f"{number:03d}.png" for number in range(len(found))]:
            raise DQError(f"folder {str(folder)!r} of a run lacks a frame or holds other pictures; {AGAIN}")
        return found

    def _path(self, what: str, pipeline: str, entry: str) -> Path:
        return self.folder / what / pipeline / f"{entry}.json"


def _save_all(frames: Sequence[Image.Image], folder: Path) -> None:
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:03d}.png", format="PNG")


def _json(path: Path, form: Any, hint: str = AGAIN) -> dict[str, Any]:
    """What a JSON file of a run holds, as it is, if it fits the form; {} when there is no file."""
    if not path.is_file():
        return {}
    what = f"file {str(path)!r} of a run"
    found = reading.from_json(reading.text(path, what, reading.MOST_JSON, hint), what, hint)
    reading.checked(form, found, what, hint)
    return found


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _same(found: dict[str, Any], mine: dict[str, Any], folder: Path) -> None:
    """DQError when a folder's manifest is not of the suite that is asked for."""
    old, new = found["suite"] | found, mine["suite"] | mine
    differs = [key for key in new if key != "suite" and old.get(key) != new[key]]
    if differs:
        what = "the prompts" if differs[0].startswith("items") else differs[0]
        raise DQError(f"folder {str(folder)!r} holds the run of another suite: {what} differs; choose another folder")
