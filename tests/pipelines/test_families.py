"""The files in `pipelines/` that people copy: each runs whole, offline, on a pipeline of its class from tiny parts."""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import diffusers.utils
import numpy as np
import pytest
import torch
from PIL import Image

import dq
from dq.api import find_denoisers
from pipelines import tiny
from pipelines.tiny import recogniser
from tests.pipelines import parts

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = sorted({path.stem for path in (ROOT / "pipelines").glob("*.py")} - {"__init__", "first_pictures"})
PUBLIC = {"argparse", "pathlib", "torch", "diffusers", "diffusers.utils", "PIL", "dq"}
MOST_LINES = 60
each_family = pytest.mark.parametrize("name", FAMILIES)


def small(monkeypatch, name, folder):
    """The file as a module with few steps and small pictures, its tiny pipeline, and the arguments of its `main`."""
    assert name in parts.BUILDERS, f"pipelines/{name}.py has no tiny parts: write {name}() in tests/pipelines/parts.py"
    module, made = importlib.import_module(f"pipelines.{name}"), parts.BUILDERS[name]()
    for key in {"STEPS", "SAMPLES"} & vars(module).keys():
        monkeypatch.setattr(module, key, 3)
    monkeypatch.setattr(module, "CALL", module.CALL | made.call)
    made.pipe.save_pretrained(folder / "model")
    for argument, model in made.extra.items():
        model.save_pretrained(folder / argument)
    given = {argument: str(folder / argument) for argument in made.extra}
    return module, made.pipe, {"model": str(folder / "model"), "out": str(folder / "out"), **given}


@pytest.fixture
def reports(monkeypatch):
    """What every call of dq.quantize gave."""
    given, quantize = [], dq.quantize

    def keeping(*args, **kwargs):
        given.append(quantize(*args, progress=False, **kwargs))
        return given[-1]

    monkeypatch.setattr(dq, "quantize", keeping)
    return given


@pytest.fixture
def frames(monkeypatch):
    """Frames of the last video. Without imageio the file holds the frames as numpy writes them."""
    kept, export = [], diffusers.utils.export_to_video

    def keeping(frames, path, fps):
        kept[:] = [np.asarray(frame) for frame in frames]
        if find_spec("imageio") and find_spec("imageio_ffmpeg"):
            export(frames, path, fps=fps)
        else:
            with Path(path).open("wb") as file:
                np.save(file, np.stack(kept))
        return path

    for name in FAMILIES:
        module = importlib.import_module(f"pipelines.{name}")
        if hasattr(module, "export_to_video"):
            monkeypatch.setattr(module, "export_to_video", keeping)
    return kept


def stood(rows):
    """Layer -> weights, activations and rank, of the quantized rows of a report."""
    return {row.name: (row.weight, row.act, row.rank) for row in rows if row.weight is not None}


@each_family
def test_a_file_quantizes_saves_and_draws(name, tmp_path, monkeypatch, reports, frames):
    module, pipe, given = small(monkeypatch, name, tmp_path)
    module.main(**given)
    (report,) = reports
    for part, model in find_denoisers(pipe).items():
        layers = [row for row in report.layers if row.name.startswith(f"{part}.")]
        assert sum(row.weight is not None for row in layers) > len(layers) / 2, f"{part}: {type(model).__name__}"
    kind = pipe_class(module)
    again = kind.from_pretrained(given["out"], dtype=getattr(module, "DTYPE", torch.bfloat16))
    assert stood(dq.explain(again).layers) == stood(report.layers)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(np.asarray(module.draw(again)), drawn(Path(given["out"]), frames))


def pipe_class(module):
    """The pipeline class a file loads."""
    return next(value for key, value in vars(module).items() if key.endswith("Pipeline"))


def drawn(folder, frames):
    """The pixels a file wrote, which are not all alike."""
    if (folder / "video.mp4").exists():
        assert (folder / "video.mp4").stat().st_size > 0
        pixels = np.stack(frames)
    else:
        pixels = np.asarray(Image.open(folder / "picture.png"))
    assert pixels.std() > 0
    return pixels


@each_family
def test_a_file_is_short_and_needs_nothing_but_torch_diffusers_and_dq(name):
    text = (ROOT / "pipelines" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= PUBLIC
    assert {"quantize", "draw", "main"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_nothing_under_pipelines_imports_eval():
    for path in (ROOT / "pipelines").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("eval", "tests", "app", "demo")], path


def test_the_pixart_file_draws_its_prompt_with_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pixart.py", str(tiny.folder("tiny-pixart")), "--out", str(tmp_path)])
    space = runpy.run_path(str(ROOT / "pipelines" / "pixart.py"), run_name="__main__")
    pixels = recogniser.as_tensor(np.array(Image.open(tmp_path / "picture.png"))[None])
    found = [f"{item.size} {item.colour} {item.shape}" for item in tiny.load_recogniser().find(pixels)[0]]
    assert [f"a {words}" for words in found] == [space["PROMPT"]]
