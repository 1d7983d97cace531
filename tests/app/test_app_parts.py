"""What the demo's pages stand on: which models may be opened, bounds, memory, drawing, errors, jobs."""

from __future__ import annotations

import gc
import os
import re
import shutil
import threading
import time
import weakref

import gradio as gr
import pytest
import torch
from PIL import Image

import dq
from demo import compare, drawing, job, models, quantizing, sessions
from demo.drawing import Request
from dq.errors import DQError
from eval import metrics
from pipelines import tiny
from tests.app import app_folders
from tests.bridges import written


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return app_folders.places(tmp_path_factory.mktemp("app"))


def test_a_model_outside_of_the_folders_is_refused_in_the_same_words_whether_it_exists_or_not(places):
    shelf = models.Shelf([places["models"]], places["made"])
    there = ["../secret/theirs", str(places["secret"] / "theirs"), "link", str(places["secret"])]
    absent = ["../secret/nobody", str(places["secret"] / "nobody"), "lonk", "/etc", "~", "", "a\0b", "x" * 5000, None]
    words = set()
    for name in there + absent:
        with pytest.raises(DQError) as refused:
            shelf.place(name)
        words.add(re.sub(r"model .* is not known", "model is not known", str(refused.value)))
    assert len(words) == 1
    assert shelf.place("mine") == (places["models"] / "mine").resolve() and "link" not in shelf.names()
    assert shelf.place("tiny-sd") == tiny.folder("tiny-sd")


def test_a_hub_id_is_never_read_from_a_folder_beside_the_server(places, tmp_path, monkeypatch):
    shutil.copytree(places["secret"] / "theirs", tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    shelf = models.Shelf([], places["made"])
    with pytest.raises(DQError, match="cannot be fetched"), shelf.borrow("owner/name"):
        pass
    asked = quantizing.settings(shelf, "owner/name", "int8", 0, "", 1, 1, 0)
    with pytest.raises(DQError, match="cannot be fetched"):
        job.quantize(asked)


def test_recipes_that_name_files_are_refused(places):
    shelf = models.Shelf([places["models"]], places["made"])
    model = models.Model("tiny-sd", None, 1)
    for recipe in (str(places["secret"] / "plan.json"), "../secret/theirs", "int9", "", None):
        with pytest.raises(DQError, match="is unknown"):
            shelf.form(model, recipe)
    with pytest.raises(DQError, match="Quantize tab"):
        shelf.form(model, "svdquant-int4")


def test_users_share_one_copy_and_models_beyond_the_limit_leave_memory(places):
    shelf = models.Shelf([places["models"]], places["made"], most=1, forms=1)
    with shelf.borrow("tiny-sd") as first:
        form = shelf.form(first, "int8")
        assert form.text_encoder is first.pipe.text_encoder and form.unet is not first.pipe.unet
        assert not models.layers.packed_layers(first.pipe.unet), "the original stays in full precision"
        old = weakref.ref(form.unet)
        del form
        shelf.form(first, "int8-weight")
        gc.collect()
        gone = old() is None
        assert gone, "a second form replaces the first"
    with shelf.borrow("tiny-sd") as again:
        assert again is first
    old = weakref.ref(first.pipe.unet)
    del first, again
    with shelf.borrow("mine"):
        gc.collect()
        gone = old() is None
        assert gone


def test_a_model_serves_one_user_at_a_time(places):
    shelf, order = models.Shelf([], places["made"]), []

    def user(number):
        with shelf.borrow("tiny-sd"):
            order.append(("in", number))
            time.sleep(0.05)
            order.append(("out", number))

    threads = [threading.Thread(target=user, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [what for what, _ in order] == ["in", "out"] * 4


def test_a_quantized_pipeline_is_refused_as_an_original(places, tmp_path):
    pipe = tiny.load("tiny-sd")
    dq.quantize(pipe, "int8", progress=False)
    pipe.save_pretrained(tmp_path / "small")
    shelf = models.Shelf([tmp_path], places["made"])
    assert shelf.names() == [*tiny.NAMES, *tiny.shipped(tiny.VIDEOS)] and "small" in shelf.choices("tiny-sd")
    assert "small" not in shelf.choices("tiny-pixart"), "it is of another class"
    with pytest.raises(DQError, match="is quantized; choose the one it was made from"), shelf.borrow("small"):
        pass
    with shelf.borrow("tiny-sd") as model:
        form = shelf.form(model, "small")
        assert form.vae is model.pipe.vae and models.layers.packed_layers(form.unet)
    with shelf.borrow("tiny-pixart") as model, pytest.raises(DQError, match="has a unet"):
        shelf.form(model, "small")


def test_a_gguf_file_below_the_roots_is_a_form_of_its_model(places, tmp_path):
    pipe = tiny.load("tiny-pixart")
    state = written.named(pipe.transformer, False)
    written.file(tmp_path / "pixart.gguf", state, "Q8_0", "pixart")
    (tmp_path / "theirs.gguf").symlink_to(places["secret"] / "nobody.gguf")
    shelf = models.Shelf([tmp_path], places["made"])
    assert "pixart.gguf" in shelf.choices("tiny-pixart") and "theirs.gguf" not in shelf.choices("tiny-pixart")
    with shelf.borrow("tiny-pixart") as model:
        form = shelf.form(model, "pixart.gguf")
        layers = models.layers.packed_layers(form.transformer)
        assert form.vae is model.pipe.vae and {str(layer.plan.weight) for layer in layers.values()} == {
            "int8/group:32"
        }
    with shelf.borrow("tiny-sd") as model, pytest.raises(DQError, match=r"pixart.gguf' lacks tensor"):
        shelf.form(model, "pixart.gguf")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x" * 1001}, "at most 1000 characters"),
        ({"negative": "x" * 1001}, "at most 1000 characters"),
        ({"steps": 101}, "steps is 101, expected a whole number from 1 to 100"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": None}, "steps is None"),
        ({"steps": True}, "steps is True"),
        ({"width": 1032}, "width is 1032"),
        ({"height": 63}, "height is 63, expected a multiple of 8"),
        ({"frames": 130}, "frames is 130"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_inputs_are_bounded(asked, text):
    with pytest.raises(DQError, match=re.escape(text)):
        Request(**{"prompt": "a red circle"} | asked)


def test_drawing_stops_at_the_next_step(places):
    stop, seen = threading.Event(), []

    def tell(step):
        seen.append(step)
        if step == 3:
            stop.set()

    with pytest.raises(sessions.Stopped):
        drawing.draw(
            tiny.load("tiny-sd"), Request("a red circle", steps=50), tiny.CALL["tiny-sd"], drawing.Watch(stop, tell)
        )
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_what_is_drawn_is_what_the_pipeline_draws(name):
    pipe = tiny.load(name)
    watch = drawing.Watch(threading.Event(), lambda step: None)
    mine = drawing.draw(pipe, Request("a red circle", seed=3, steps=3, guidance=2.0), tiny.CALL[name], watch)
    call = tiny.CALL[name] | {"num_inference_steps": 3, "guidance_scale": 2.0}
    theirs = pipe("a red circle", generator=torch.Generator().manual_seed(3), **call).images[0]
    assert mine.frames[0].tobytes() == theirs.convert("RGB").tobytes() and not mine.video
    assert mine.ms_per_step > 0 and not hasattr(pipe.scheduler.step, "__wrapped__"), "the pipeline is as it was"


def test_the_embedded_video_model_is_compared_as_a_clip(places):
    if not tiny.shipped(tiny.VIDEOS):
        pytest.skip("needs the weights of tiny-video")
    shelf, wish = models.Shelf([], places["made"]), Request("a large red star moving left slowly", steps=2)
    assert "tiny-video" in shelf.names() and "int8" in shelf.choices("tiny-video")
    found = compare.compare(shelf, ("tiny-video", "int8", None), wish, threading.Event(), lambda share, text: None)
    assert found.figures["frames"] == 8 and found.figures["psnr_db"] > 25 and found.figures["share"] < 0.5
    pair, _, player, _, _ = compare.shown(found)
    assert pair[0].size == (64, 64) and [len(clip["frames"]) for clip in player["clips"]] == [8, 8, 8]


def test_frames_that_were_asked_for_reach_a_pipeline_by_either_name():
    class Latte:
        def __call__(self, prompt, num_inference_steps=1, video_length=16, generator=None):
            pass

    assert Request("x", frames=5).arguments(Latte(), {"video_length": 8})["video_length"] == 5
    assert Request("x").arguments(Latte(), {"video_length": 8})["video_length"] == 8


def test_what_the_pipeline_refuses_is_told_in_one_line():
    watch = drawing.Watch(threading.Event(), lambda step: None)
    pipe = tiny.load("tiny-sd")
    with pytest.raises(DQError, match="StableDiffusionPipeline: "):
        drawing.draw(pipe, Request("x", steps=1), {"callback_on_step_end_tensor_inputs": ["none"]}, watch)


def test_the_kernel_table_counts_every_layer():
    pipe = tiny.load("tiny-pixart")
    dq.quantize(pipe, "int8", progress=False)
    report = dq.explain(pipe)
    table = compare.kernel_table(report)
    assert table["layers"].sum() == len(report.layers) and list(table.columns) == compare.KERNEL_COLUMNS
    assert table.iloc[-1]["weight"] == "kept" and table.iloc[0]["layers"] == table["layers"].max()


def test_lpips_is_named_only_where_it_was_measured(monkeypatch):
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    lpips = metrics.load("lpips")
    monkeypatch.setattr(lpips, "why_not", lambda: "needs weights")
    name, value, note = compare.perceptual(images[:1], images[1:])
    assert (name, note) == ("feature distance", "in place of LPIPS, which needs weights") and value > 0
    monkeypatch.setattr(lpips, "why_not", lambda: None)
    monkeypatch.setattr(lpips, "per_item", lambda *_: [0.25, 0.75])
    assert compare.perceptual(images, images)[:2] == ("LPIPS", 0.5)


def test_failures_are_one_line_of_text():
    @sessions.told
    def fails(error):
        raise error

    for error, text in (
        (DQError("model <b>x</b>\nis unknown"), "model &lt;b&gt;x&lt;/b&gt; is unknown"),
        (KeyError("/secret/path"), "A fault of the demo (KeyError); its log has the rest."),
        (sessions.Stopped(), "Stopped."),
    ):
        with pytest.raises(gr.Error) as shown:
            fails(error)
        assert shown.value.message == text and shown.value.__cause__ is None


def test_stopping_reaches_only_ones_own_session():
    found = sessions.Sessions()
    mine, theirs = (gr.Request(session_hash=name) for name in ("mine", "theirs"))
    with found.working(mine) as first, found.working(theirs) as second:
        assert found.stop(mine) == "stopping 1"
        assert first.is_set() and not second.is_set()
    assert found.stop(theirs) == "nothing was running"


def test_progress_lines_are_read_from_a_job_as_they_come():
    line = "calibrate: svd:  45%|####5     | 9/20 [00:10<00:12,  1.1s/it]"
    assert quantizing.BAR.match(line).groupdict() == {
        "what": "calibrate: svd",
        "share": "45",
        "done": "9",
        "all": "20",
    }
    assert quantizing.BAR.match("dq: recipe is unknown") is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "../secret/theirs"}, "is not known here"),
        ({"recipe": "int9"}, "is unknown"),
        ({"bits": 40}, "bits per weight is 40"),
        ({"samples": 5000}, "samples is 5000"),
        ({"samples": 4, "steps": 8}, "expected at least one sample a step"),
        ({"prompts": "a\n" * 201}, "at most 200 lines"),
    ],
)
def test_jobs_are_bounded(places, changes, text):
    given = {"model": "tiny-sd", "recipe": "svdquant-int4", "bits": 0}
    given |= {"prompts": "", "samples": 8, "steps": 2, "seed": 0}
    with pytest.raises(DQError, match=text):
        quantizing.settings(models.Shelf([], places["made"]), **given | changes)


def test_only_the_newest_results_stay_on_the_disk(tmp_path):
    for number in range(quantizing.KEPT + 3):
        folder = tmp_path / f"old-{number}"
        folder.mkdir()
        (folder / quantizing.REPORT).write_text("{}")
        os.utime(folder, (number, number))
    (tmp_path / "theirs").mkdir()
    quantizing._fresh(tmp_path, "new")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert "theirs" in kept and "old-3" not in kept and "old-4" in kept and len(kept) == quantizing.KEPT
