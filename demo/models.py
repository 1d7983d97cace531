"""Pipelines in memory, shared by all users: few at once, one user of each at a time, and only from allowed places.

A quantized form shares everything but its denoisers with the pipeline it was made from.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import dq
from dq import api, cookbook, layers
from dq.errors import DQError, nearest
from dq.host import saved
from dq.model import check_fit
from dq.plan import Plan
from pipelines import tiny

MADE_FROM = "made_from.json"  # beside a result of the Quantize tab
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
LONGEST_NAME, DEPTH = 300, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Model:
    """A full-precision pipeline and its last used quantized forms. Whoever uses it holds `lock`."""

    def __init__(self, name: str, pipe, most: int):
        self.name, self.pipe, self.most = name, pipe, most
        self.lock = threading.Lock()
        self.forms: OrderedDict[str, DiffusionPipeline] = OrderedDict()
        self.warm: weakref.WeakSet = weakref.WeakSet()  # pipelines that have run here: the first run chooses kernels

    def quantized(self, key: str, make) -> DiffusionPipeline:
        """The form of that key, made by `make(pipe)` when it is not there; the least recently used one goes first."""
        if key not in self.forms:
            while len(self.forms) >= self.most:
                self.forms.popitem(last=False)
            release()
            self.forms[key] = make(self.pipe)
        self.forms.move_to_end(key)
        return self.forms[key]


class Shelf:
    """At most `most` models in memory, each with at most `forms` quantized forms.

    roots     folders whose pipelines may be opened; nothing else on the disk may
    made      folder of the pipelines that the Quantize tab saves
    """

    def __init__(self, roots: Sequence[Path], made: Path, most: int = 2, forms: int = 2):
        self.roots, self.made = [Path(root).resolve() for root in roots], Path(made).resolve()
        self.most, self.forms = most, forms
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Embedded models, then full-precision pipelines below the roots."""
        found = [name for root in self.roots for name, folder in _pipelines(root) if not saved.plans(folder)]
        return [*embedded(), *dict.fromkeys(found)]

    def choices(self, name: str) -> list[str]:
        """What a model can be quantized with at once: data-free recipes, its results, others of its class, files."""
        place = self.place(name)
        wanted = _class(place) if isinstance(place, Path) else None
        mine = [form for form, folder in _pipelines(self.made) if _made_from(folder) == str(name).strip()]
        given = [
            form
            for root in self.roots
            for form, folder in _pipelines(root)
            if saved.plans(folder) and wanted in (None, _class(folder))
        ]
        files = [form for root in self.roots for form, _ in _files(root)]
        return [*cookbook.RECIPES, *mine, *dict.fromkeys(given), *dict.fromkeys(files)]

    def place(self, name: str) -> Path | str:
        """The folder or Hub id of a name that may be opened; DQError, the same for all others, for any other name."""
        name = str(name or "").strip()
        if name in embedded():
            return tiny.folder(name)
        folder = _below(self.roots, name)
        if folder is not None:
            return folder
        if HUB_ID.fullmatch(name) and ".." not in name:
            return name
        shown = name[:80] + ("..." if len(name) > 80 else "")
        local = "a pipeline in this demo's model folders " if self.roots else ""
        expected = f"expected {', '.join(embedded())}, {local}or a Hub id (owner/name)"
        raise DQError(f"model {shown!r} is not known here, {expected}")

    @contextlib.contextmanager
    def borrow(self, name: str, plan: Plan | None = None) -> Iterator[Model]:
        """The model of a name, loaded if need be, for one user at a time. DQError when it cannot be opened.

        plan: what its user brings; one that does not fit the model is a DQError before anybody has to wait for it
        """
        place = str(self.place(name))
        with self._lock:  # one load at a time: two at once could need twice the memory
            if place not in self._models:
                while len(self._models) >= self.most:
                    self._models.popitem(last=False)
                release()
                self._models[place] = Model(str(name).strip(), load(place), self.forms)
            self._models.move_to_end(place)
            model = self._models[place]
        for part in api.find_denoisers(model.pipe).values() if plan else ():
            check_fit(part, plan)
        with model.lock:
            yield model

    def form(self, model: Model, recipe: str, plan: Plan | None = None) -> DiffusionPipeline:
        """A quantized form of a borrowed model: by a plan, a data-free recipe or a saved one. DQError if none."""
        if plan is not None:
            key = hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest()
            return model.quantized(f"plan {key}", lambda pipe: _fresh(pipe, plan))
        recipe = str(recipe or "").strip()
        if recipe in cookbook.RECIPES:
            return model.quantized(recipe, lambda pipe: _fresh(pipe, recipe))
        folder = _below((self.made, *self.roots), recipe)
        if folder is not None:
            made = (folder / saved.PIPELINE).stat().st_mtime_ns  # names of results that went are given again
            return model.quantized(f"{folder} {made}", lambda pipe: _saved(pipe, folder))
        file = _file_below(self.roots, recipe)
        if file is not None:
            return model.quantized(f"{file} {file.stat().st_mtime_ns}", lambda pipe: _of_file(pipe, file))
        if recipe in cookbook.names():
            raise DQError(f"recipe {recipe!r} needs calibration: run it in the Quantize tab, then choose its result")
        raise DQError(f"recipe {recipe[:80]!r} is unknown, {nearest(recipe[:80], self.choices(model.name))}")


def embedded() -> list[str]:
    """The trained pipelines of the repository that are there, those of pictures first."""
    return tiny.shipped(tiny.NAMES + tiny.VIDEOS)


def load(place: str):
    """A full-precision pipeline on the device of this demo. DQError when it is none, or is quantized already."""
    if not Path(place).is_absolute():
        place = _downloaded(place)
    pipe = saved.load(place, str(DTYPE).removeprefix("torch."))
    if any(layers.packed_layers(model) for model in api.find_denoisers(pipe).values()):
        raise DQError("that pipeline is quantized; choose the one it was made from, and this one as the recipe")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)


def plan_of(file: str | Path) -> Plan:
    """The plan in an uploaded file. DQError when it holds none."""
    found = cookbook.get(Path(file))
    if not isinstance(found, Plan):
        raise DQError("the file is a recipe, expected a plan: JSON with a list of layers")
    return found


def release() -> None:
    """Give freed memory back."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def _downloaded(name: str) -> str:
    """The folder of a Hub id, which is never taken for a folder beside the server."""
    try:
        return str(DiffusionPipeline.download(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DQError(f"model {name!r} cannot be fetched from the Hub: {reason}") from error


def _fresh(pipe, wanted: str | Plan):
    """A copy of the pipeline with quantized denoisers."""
    form = copy.copy(pipe)
    for name, model in api.find_denoisers(pipe).items():
        setattr(form, name, copy.deepcopy(model))
    dq.quantize(form, wanted, progress=False)
    return form


def _saved(pipe, folder: Path):
    """A saved quantized pipeline that shares what is not quantized. DQError when it was made from another model."""
    parts = saved.plans(folder)
    if not parts or "" in parts:
        raise DQError(f"{folder.name!r} is no quantized pipeline; {saved.MAKE_ONE}")
    for name, (_, plan) in parts.items():
        part = pipe.components.get(name)
        if part is None:
            raise DQError(f"{folder.name!r} has a {name}, {type(pipe).__name__} has none; choose the model it is of")
        check_fit(part, plan)
    shared: Mapping = {name: part for name, part in pipe.components.items() if name not in parts}
    try:
        form = type(pipe).from_pretrained(folder, dtype=DTYPE, **shared)
    except (OSError, ValueError) as error:
        raise DQError(f"{folder.name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    form.set_progress_bar_config(disable=True)
    return form.to(DEVICE)


def _of_file(pipe, file: Path):
    """A pipeline whose denoiser comes out of a single file, with the codes it has. DQError when it is of another."""
    name, model = next(iter(api.find_denoisers(pipe).items()))
    form = copy.copy(pipe)
    config = {**model.config, "_class_name": type(model).__name__}
    setattr(form, name, dq.from_file(file, config=config, dtype=DTYPE, progress=False).to(DEVICE))
    return form


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """GGUF files at most DEPTH folders below a root: name relative to it, path."""
    for depth in range(DEPTH + 1):
        for path in sorted(root.glob("/".join(["*"] * depth + ["*.gguf"]))):
            if path.is_file() and path.resolve().is_relative_to(root):
                yield str(path.relative_to(root)), path


def _file_below(roots: Sequence[Path], name: str) -> Path | None:
    """The GGUF file of that name inside one of the roots, else None."""
    return next((path for root in roots for found, path in _files(root) if found == name), None)


def _below(roots: Sequence[Path], name: str) -> Path | None:
    """The pipeline folder of that name (or full path) inside one of the roots, after following links; else None."""
    if not name or len(name) > LONGEST_NAME or "\0" in name:
        return None
    for root in roots:
        folder = (root / name).resolve()
        if folder.is_relative_to(root) and (folder / saved.PIPELINE).is_file():
            return folder
    return None


def _pipelines(root: Path) -> Iterator[tuple[str, Path]]:
    """Pipelines at most DEPTH folders below a root: name relative to it, folder."""
    for depth in range(1, DEPTH + 1):
        for index in sorted(root.glob("/".join(["*"] * depth + [saved.PIPELINE]))):
            if index.parent.resolve().is_relative_to(root):
                yield str(index.parent.relative_to(root)), index.parent


def _made_from(folder: Path) -> str:
    """The model that the Quantize tab made a result from."""
    return saved.read_json(folder / MADE_FROM)["model"] if (folder / MADE_FROM).is_file() else ""


def _class(folder: Path) -> str:
    return saved.read_json(folder / saved.PIPELINE).get("_class_name", "")
