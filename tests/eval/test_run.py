"""A run draws the same pictures however it is shared, killed or resumed, and says what it could not make."""

import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from dq.errors import DQError
from eval import __main__ as command
from eval import generate, prompts
from eval.runs import Run
from eval.score import score
from eval.suite import Suite
from pipelines import tiny
from tests.lines import told_by

PICTURES = {
    "name": "pictures",
    "pipelines": {"tiny-pixart": {}},
    "recipes": ["int8"],
    "prompts": {"scenes": 5, "seed": 1},
    "steps": 2,
    "batch": 2,
    "metrics": ["psnr", "caption_accuracy", "fid"],
    "fid": {"features": "scene-recogniser"},
    "timing": None,
}
CALIBRATION = {"prompts": ["a red circle", "a blue square"], "samples": 4}
VIDEOS = {
    "name": "videos",
    "prompts": {"scenes": 3, "seed": 1},
    "recipes": [
        {"name": "gptq", "recipe": "gptq-int4-weight", "calibration": CALIBRATION},
        {"name": "budget", "recipe": "int8-weight", "budget": {"no_such_limit": 1}},
        "no-such-recipe",
    ],
    "steps": 2,
    "batch": 2,
    "timing": None,
}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A Wan pipeline of random weights on disk: five frames of 16 by 16."""
    torch.manual_seed(0)
    base = tiny.load("tiny-pixart")
    size = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 2}
    width = base.text_encoder.config.d_model
    denoiser = WanTransformer3DModel(**size, text_dim=width, freq_dim=32, rope_max_seq_len=32)
    decoder = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts = {"tokenizer": base.tokenizer, "text_encoder": base.text_encoder, "vae": decoder, "transformer": denoiser}
    folder = tmp_path_factory.mktemp("video") / "wan"
    WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    return str(folder)


def suite_of(given, video=None, **changes):
    if given is VIDEOS:
        call = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 40}
        given = given | {"pipelines": {"video": {"path": video, "call": call}}}
    return Suite.from_dict(given | changes)


def draw(suite, folder, only=()):
    return generate.generate(suite, folder, command._chosen(suite, list(only)), progress=False)


def found(folder, *rooms):
    """Bytes of every file of a run that has to be the same each time."""
    rooms = rooms or ("images", "models", "latents")
    paths = [path for room in rooms for path in (folder / room).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != generate.REPORT}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, video):
    """Undisturbed runs of one process, by name."""
    folder = tmp_path_factory.mktemp("whole")
    return {given["name"]: draw(suite_of(given, video), folder / given["name"]) for given in (PICTURES, VIDEOS)}


def start(work, *args, **env):
    def child():
        os.environ.update(env)
        PartialState._reset_state()
        work(*args)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def evaluated(path, folder):
    command.run(path, folder, [])


def drawn(path, folder):
    draw(Suite.read(path), folder)


@pytest.mark.parametrize(("work", "given"), [(evaluated, PICTURES), (drawn, VIDEOS)], ids=["pictures", "videos"])
def test_two_processes_give_what_one_gives(work, given, whole, tmp_path):
    path, name = tmp_path / "suite.yaml", given["name"]
    path.write_text(yaml.safe_dump(whole[name].suite.to_dict()))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    work = [start(work, path, tmp_path / "two", **env, **rank) for rank in ranks]
    for process in work:
        process.join(120)
    assert [process.exitcode for process in work] == [0, 0]
    one, two = whole[name], Run(tmp_path / "two")
    assert found(two.folder, "images", "models") == found(one.folder, "images", "models")
    (pipeline,) = one.pipelines
    for entry in one.entries(pipeline):
        ours, theirs = (run.figures(pipeline, entry) | {"seconds": 0, "notes": 0} for run in (two, one))
        assert ours == theirs
        for metric, row in two.scores(pipeline, entry).items():
            assert row["value"] == pytest.approx(score(one, pipeline, entry)[metric]["value"], abs=1e-6, rel=1e-6)


def test_a_picture_comes_from_its_own_prompt_and_seed_whatever_the_batch(whole):
    run = whole["pictures"]
    captions = [item.prompt for item in run.items]
    alone = tiny.pictures(tiny.load("tiny-pixart"), "tiny-pixart", captions, 0, batch=1, num_inference_steps=2)
    for item, expected in zip(run.items, alone, strict=True):
        drawn = np.asarray(run.picture("tiny-pixart", "full", item.index), np.float32) / 255
        assert np.abs(drawn - expected.permute(1, 2, 0).numpy()).max() < 2 / 255


def test_a_video_pipeline_keeps_its_frames(whole):
    run = whole["videos"]
    for entry in ("full", "gptq"):
        frames = [run.frames("video", entry, item.index) for item in run.items]
        assert [len(each) for each in frames] == [5, 5, 5] and run.is_video("video", entry)
        assert frames[0][0].size == (16, 16) and run.picture("video", entry, 0) == frames[0][0]
        assert np.asarray(frames[0][1]).std() > 1
    assert found(run.folder, "images/video/full") != found(run.folder, "images/video/gptq")


def test_what_this_version_cannot_do_is_noted_and_the_run_goes_on(whole):
    run = whole["videos"]
    assert run.entries("video") == ["full", "gptq", "budget", "no-such-recipe"]
    assert [run.missing("video", entry) is None for entry in run.entries("video")] == [True, True, False, False]
    assert "'no-such-recipe' is unknown" in run.missing("video", "no-such-recipe")
    assert "budget" in run.missing("video", "budget").lower()
    assert not run.drawn("video", "budget") and run.drawn("video", "gptq")


def test_figures_tell_kernels_and_bytes(whole):
    run = whole["pictures"]
    full, quantized = (run.figures("tiny-pixart", entry) for entry in ("full", "int8"))
    assert full["bytes"] == full["full_bytes"] == quantized["full_bytes"] > 3 * quantized["bytes"]
    assert sum(quantized["kernels"].values()) == 62 and any("int8" in name for name in quantized["kernels"])
    assert all(name.startswith("torch ") for name in full["kernels"])


def test_time_and_memory_are_measured_when_asked(tmp_path):
    suite = suite_of(PICTURES, prompts={"scenes": 1}, timing={"repeats": 1})
    run = draw(suite, tmp_path / "run", ["full"])
    figures = run.figures("tiny-pixart", "full")
    assert figures["ms_per_step"] > 0 and figures["threads"] >= 1
    assert figures["full_bytes"] < figures["peak_gib"] * 2**30 < 20 * figures["full_bytes"]
    assert not run.figures("tiny-pixart", "int8")


def test_latents_of_every_step_are_kept_only_for_metrics_of_the_trajectory(whole, tmp_path):
    run = draw(
        suite_of(PICTURES, metrics=["psnr", "trajectory_error"], prompts={"scenes": 3, "seed": 1}), tmp_path / "run"
    )
    assert run.trajectory("tiny-pixart", "int8", 2).shape == (2, 4, 16, 16)
    assert run.trajectory("tiny-pixart", "int8", 2).dtype == torch.float32
    assert whole["pictures"].trajectory("tiny-pixart", "int8", 2) is None


def test_answers_to_the_calls_of_full_precision_are_kept_and_scored_by_thirds(video, tmp_path):
    asked = {"metrics": ["noise_sqnr", "motion_accuracy", "flicker"], "prompts": {"clips": 3, "seed": 1}, "steps": 4}
    suite = suite_of(VIDEOS, video, recipes=["int8-weight", "int4-weight"], **asked)
    run = draw(suite, tmp_path / "run")
    kept = run.predictions("video", "int4-weight")
    assert kept["predictions"].shape == kept["reference"].shape and len(kept["reference"]) >= 4
    assert torch.equal(kept["reference"], run.predictions("video", "int8-weight")["reference"])
    assert not run.predictions("video", "full")
    eight, four, full = (score(run, "video", name) for name in ("int8-weight", "int4-weight", "full"))
    for third in ("early", "middle", "late"):
        high, low = (rows[f"noise_sqnr_{third}"] for rows in (eight, four))
        assert high["value"] > low["value"] + 10 > 20 and high["unit"] == "dB" and high["count"] == 3
    assert list(full) == ["motion_accuracy"] and "needs clips (8, 3, 64, 64)" in full["motion_accuracy"]["missing"]
    run.predictions_path("video", "int4-weight").write_bytes(b"no tensors")
    with pytest.raises(DQError, match=r"predictions .* cannot be read"):
        score(run, "video", "int4-weight")


def test_a_lost_picture_is_drawn_again_to_the_same_bytes_and_nothing_else_is(whole, tmp_path):
    folder = tmp_path / "run"
    run = draw(suite_of(PICTURES), folder)
    lost, kept = (run.image_path("tiny-pixart", "int8", index) for index in (2, 3))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    draw(suite_of(PICTURES), folder)
    assert found(folder) == found(whole["pictures"].folder)
    assert kept.stat().st_mtime_ns == before


def files(folder):
    return sum(len(inner) + len(names) for _, inner, names in os.walk(folder))


def test_killed_ten_times_it_ends_like_an_undisturbed_run(tmp_path):
    path, moments = tmp_path / "suite.yaml", random.Random(0)
    path.write_text(yaml.safe_dump(PICTURES | {"batch": 1}))
    once = start(evaluated, path, tmp_path / "once")
    once.join(120)
    assert once.exitcode == 0
    total, killed = files(tmp_path / "once"), 0
    for moment in sorted(moments.randrange(total) for _ in range(10)):
        process = start(evaluated, path, tmp_path / "killed")
        while process.is_alive() and files(tmp_path / "killed") < moment:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        killed += process.is_alive()
        process.kill()
        process.join()
    last = start(evaluated, path, tmp_path / "killed")
    last.join(120)
    assert last.exitcode == 0 and killed >= 9
    rooms = ("images", "models", "scores")
    assert found(tmp_path / "killed", *rooms) == found(tmp_path / "once", *rooms)
    assert (tmp_path / "killed" / "report.html").is_file()
    assert not list((tmp_path / "killed").rglob("*.work"))


def test_another_suite_or_other_prompts_in_the_same_folder_are_refused(whole, tmp_path):
    folder = whole["pictures"].folder
    before = found(folder, ".")
    with pytest.raises(DQError, match="holds the run of another suite: steps differs; choose another folder"):
        draw(suite_of(PICTURES, steps=3), folder)
    assert found(folder, ".") == before
    (tmp_path / "prompts.txt").write_text("a cat\n")
    suite = suite_of(PICTURES, prompts={"file": str(tmp_path / "prompts.txt")})
    Run.create(tmp_path / "run", suite, prompts.items(suite))
    (tmp_path / "prompts.txt").write_text("a dog\n")
    with pytest.raises(DQError, match="the prompts differs"):
        Run.create(tmp_path / "run", suite, prompts.items(suite))


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(DQError, match="holds no evaluation run"):
        Run(tmp_path)
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(DQError, match="is not empty and holds no run"):
        Run.create(tmp_path, suite_of(PICTURES), [])


WRONG = [
    ({"pipelines": {}}, "pipelines is missing"),
    ({"pipelines": {"tiny-pixart": {"dtyp": "float32"}}}, "unknown key 'dtyp', .*Did you mean 'dtype'"),
    ({"pipelines": {"tiny-pixart": {"dtype": "int8"}}}, "dtype is 'int8'"),
    ({"pipelines": {"tiny-pixart": {"call": {"num_inference_steps": 3}}}}, "call holds 'num_inference_steps'"),
    ({"pipelines": {"../up": {"path": "tiny-pixart"}}}, "name '../up'"),
    ({"recipes": "int8"}, "recipes is 'int8', expected a list"),
    ({"recipes": ["int8", "int8"]}, "'int8' is there twice"),
    ({"recipes": [{"name": "x"}]}, "got none, expected one of recipe, plan and folder"),
    ({"recipes": [{"recipe": "int8", "plan": "x.json"}]}, "got recipe and plan"),
    ({"recipes": [{"name": "full", "recipe": "int8"}]}, "belongs to the model as it came"),
    ({"recipes": [{"recipe": "int8", "calibration": {"sample": 3}}]}, "Did you mean 'samples'"),
    ({"prompts": {"scenes": 0}}, "scenes is 0"),
    ({"prompts": {"scenes": 3, "file": "x.txt"}}, "expected either"),
    ({"prompts": {"clips": 3, "scenes": 3}}, "expected either"),
    ({"prompts": {"clips": 3, "objects": 3}}, "expected 1 or 2"),
    ({"seeds": []}, "seeds is empty"),
    ({"steps": True}, "steps is True"),
    ({"metric": []}, "unknown key 'metric', .*Did you mean 'metrics'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_suite_is_refused_in_one_line(changes, message):
    with pytest.raises(DQError, match=message) as caught:
        Suite.from_dict(PICTURES | changes)
    assert "\n" not in str(caught.value)


def test_a_suite_with_its_defaults_filled_in_is_the_same_suite():
    for path in sorted(Path("eval/suites").glob("*.yaml")):
        suite = Suite.read(path)
        assert Suite.from_dict(json.loads(json.dumps(suite.to_dict()))) == suite
        assert suite.entries[0].name == "full"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipelines": {"tiny-pixart": {"call": {"hight": 64}}}}, "takes no 'hight', .*Did you mean 'height'"),
        ({"pipelines": {"x": {"path": "no/such/folder"}}}, "'no/such/folder' does not exist"),
        ({"pipelines": {"tiny-pixart": {"call": {"height": 63}}}}, "refuses its call: .*63"),
        ({"pipelines": {"tiny-pixart": {"call": {"height": "64"}}}}, "refuses its call"),
    ],
)
def test_a_pipeline_that_cannot_be_called_so_is_refused(changes, message, tmp_path):
    with pytest.raises(DQError, match=message):
        draw(Suite.from_dict(PICTURES | changes), tmp_path / "run")


def told(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["eval", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        command.main()
    return left.value.code, told_by("eval", capsys.readouterr().err)


def test_the_command_line_leaves_with_2_and_one_line_for_wrong_use(monkeypatch, capsys, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(PICTURES))
    wrong = [
        (("run", tmp_path / "none.yaml", "--out", tmp_path / "run"), "No such file"),
        (("run", path, "--out", tmp_path / "run", "--only", "int7"), "--only 'int7' is not in the suite.*int8"),
        (("report", tmp_path), "holds no evaluation run"),
        (("run", path), "--out"),
        (("run", path, "--out", tmp_path / "run", "--foo"), "No such option"),
        (("sun",), "No such command"),
        (("compare", tmp_path), "Missing argument"),
    ]
    for words, message in wrong:
        code, line = told(monkeypatch, capsys, *words)
        assert code == 2 and "\n" not in line
        assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_a_wrong_suite_is_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "suite.yaml").write_text("steps: 3\n")
    words = ["eval", "run", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "run")]
    code = f"import sys; sys.argv = {words}\nfrom eval.__main__ import main\ntry: main()\nexcept SystemExit as left: "
    code += "print(left.code, *sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["2"] and "pipelines is missing" in told_by("eval", found.stderr)


def test_only_keeps_full_precision_which_all_else_is_compared_with():
    suite = suite_of(PICTURES, pipelines={"tiny-pixart": {}, "tiny-sd": {}}, recipes=["int8", "fp8"])
    assert command._chosen(suite, ["tiny-sd/fp8"]) == [("tiny-sd", "full"), ("tiny-sd", "fp8")]
    assert command._chosen(suite, ["fp8"]) == [(p, e) for p in ("tiny-pixart", "tiny-sd") for e in ("full", "fp8")]
    assert len(command._chosen(suite, [])) == 6
