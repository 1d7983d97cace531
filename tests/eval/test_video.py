"""Rows, table and clip grid of the video model, on a pipeline of warm-started weights where the trained one is not."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from eval.experiments import clips, methods, pictures, rows, tables, tiny_models, video
from eval.suite import Suite
from pipelines import tiny
from pipelines.tiny import train_video, training
from tests.eval import made_runs


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """tiny-pixart frame by frame, with the words of motion: what the training starts from."""
    folder, patch = tmp_path_factory.mktemp("video"), pytest.MonkeyPatch()
    patch.setattr(train_video, "RUNS", folder)
    words = train_video.tokenizer()
    words.save_pretrained(folder / "text-video" / "tokenizer")
    train_video.text_encoder(words).save_pretrained(folder / "text-video" / "text_encoder")
    yield train_video.write_pipeline(training.Average(train_video.latte()), folder / "tiny-video")
    patch.undo()


@pytest.fixture
def place(tmp_path, started, monkeypatch):
    real = tiny.folder
    monkeypatch.setattr(tiny, "folder", lambda name: started if name == "tiny-video" else real(name))
    monkeypatch.setitem(tiny.CALL["tiny-video"], "num_inference_steps", 3)
    for module, file in ((video, "video.json"), (methods, "methods.json"), (tiny_models, "tiny_models.json")):
        monkeypatch.setattr(module, "RESULTS" if module is tiny_models else "FILE", tmp_path / file)
    monkeypatch.setattr(methods, "WORK", tmp_path / "work")
    return tmp_path


def test_rows_say_everything_once_and_become_the_table(place, monkeypatch):
    given = {"models": ["tiny-video"], "prompts": 2, "seed": 1, "again": False, "list": False}
    asked = argparse.Namespace(rows=["int8", video.ONE_FORMAT], **given)
    assert methods.run(asked, video.ENTRIES, video.FILE, video.measure) == {}
    found = {row["row"]: row for row in rows.read(video.FILE)}
    assert list(found) == asked.rows and not methods.FILE.exists()
    eight, five = found.values()
    assert eight["psnr_db"] > five["psnr_db"] + 5 > 20 and eight["noise_sqnr_late_db"] > five["noise_sqnr_late_db"]
    assert eight["flicker"] < five["flicker"] and five["bits"] == "W5" and eight["bytes"] > five["bytes"]
    assert eight["motion_accuracy_fp32"] == five["motion_accuracy_fp32"] and eight["fp32_ms_per_step"] > 0
    assert methods.run(asked, video.ENTRIES, video.FILE, None) == {}, "nothing is left to measure"
    lines = tables.video(list(found.values()))
    assert len(lines) == 4 and "| int8 | W8A8 |" in lines[2] and f"({100 * eight['objects_right']:.0f}" not in lines[1]
    worse = found["int8"] | {"row": "viditq-w8a8", "psnr_db": 1.0}
    assert "`viditq-w8a8` does not beat int8: no reason known" in tables.video([*found.values(), worse])[-1]


def test_controls_are_named_by_the_rows_they_are_set_against():
    names = {entry.name for entry in video.ENTRIES}
    assert {entry.against for entry in video.ENTRIES if entry.against} <= names
    budget = next(entry for entry in video.ENTRIES if entry.bits)
    assert methods.version(budget) != methods.version(methods.replace(budget, bits=4))


def test_held_out_figures_of_clips_that_stand_still(place):
    """Before training nothing moves: the objects are those of tiny-pixart, each frame from noise of its own."""
    row = tiny_models.measure("tiny-video", 1, 2)
    assert row["motion_accuracy"] <= 0.5 and row["model"] == "tiny-video" and row["objects"] == 1
    assert 0 < row["flicker_of_training_clips"] < 0.02 < row["flicker"], "frames have backgrounds of their own"


def test_the_clip_grid_has_a_sheet_for_each_frame_with_entries_below_each_other(tmp_path, monkeypatch):
    recipes = ["int8", {"name": "svdquant-int4", "recipe": "svdquant-int4"}]
    monkeypatch.setitem(made_runs.SPREAD, "svdquant-int4", 40)
    run = made_runs.make(
        tmp_path / "clips", frames=3, prompts=["a", "b"], seeds=[0], pipelines={"tiny-video": {}}, recipes=recipes
    )
    sheets = clips.grid(run, {"int8": ("40.0 dB",)})
    assert len(sheets) == 3
    for n, sheet in enumerate(sheets):
        for i, name in enumerate(clips.ENTRIES):
            for j in (0, 1):
                side = pictures.ENLARGED * 64
                left, top = clips.LABEL + j * (side + clips.GAP), clips.GAP + i * (side + clips.GAP)
                shown = np.asarray(sheet.crop((left, top, left + side, top + side)))[:: pictures.ENLARGED]
                assert (shown[:, :: pictures.ENLARGED] == np.asarray(run.frames("tiny-video", name, j)[n])).all()


def test_the_suite_is_of_the_video_model_and_has_what_the_grid_shows():
    suite = Suite.read(clips.SUITE)
    assert [pipeline.name for pipeline in suite.pipelines] == list(tiny.VIDEOS)
    assert set(clips.ENTRIES) <= {entry.name for entry in suite.entries}
    assert {"noise_sqnr", "motion_accuracy", "vbench"} <= set(suite.metrics)
