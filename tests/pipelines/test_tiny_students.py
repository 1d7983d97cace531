"""The few-step students and their training: strides are those of the scheduler, ways begin where they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import TCDScheduler

from eval import generate
from eval.metrics import caption_accuracy
from eval.suite import Suite
from pipelines import tiny
from pipelines.tiny import train_student, training

ANGLES = train_student.Angles()
folder = tiny.folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Trainings of seconds, into a folder of their own."""
    monkeypatch.setattr(train_student, "RUNS", tmp_path)
    monkeypatch.setattr(training, "RUNS", tmp_path)
    monkeypatch.setattr(train_student, "BATCH", 2)
    monkeypatch.setattr(train_student, "FRESH", 2)
    monkeypatch.setattr(train_student, "folder", lambda name: tmp_path / name if "step" in name else folder(name))
    return tmp_path


def test_a_stride_is_a_step_of_the_scheduler_that_ships():
    scheduler = TCDScheduler(**train_student.SCHEDULER)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 4, 16, 16)
    for phase, t in enumerate(scheduler.timesteps):
        points = torch.full((2,), phase * train_student.PHASE)
        assert ANGLES.times[points[0]] == t
        v = torch.randn_like(x)
        mine, x = ANGLES.leads(x, v, points), scheduler.step(v, t, x, eta=0.0).prev_sample
        torch.testing.assert_close(mine, x, atol=1e-5, rtol=1e-4)


def test_the_wanted_v_leads_to_the_end_from_every_point_and_eight_steps_meet_all_points():
    points = torch.arange(train_student.POINTS)
    x, end = torch.randn(2, len(points), 4, 16, 16)
    torch.testing.assert_close(ANGLES.leads(x, ANGLES.wanted(x, end, points), points), end, atol=1e-5, rtol=1e-4)
    scheduler = TCDScheduler(**train_student.SCHEDULER)
    scheduler.set_timesteps(train_student.POINTS)
    assert torch.equal(scheduler.timesteps, ANGLES.times)


@pytest.mark.parametrize("name", tiny.STUDENTS.values())
def test_ways_begin_where_the_student_arrives_and_pairs_lie_in_one_phase(name, small):
    source = train_student.teacher(name)
    ways = train_student.Ways(source, ANGLES)
    ways.draw(source.model, 2)
    first = 2 * train_student.PHASE
    assert not ways.latents[:, :first].any() and ways.latents[:, first:].flatten(2).any(-1).all()
    x, points, ends, captions = ways.batch(50)
    assert points.min() == first and set(captions) == set(ways.captions(ways.index))
    for latents, point, end in zip(x, points, ends, strict=True):
        way = ways.latents[(ways.latents[:, point].float() == latents).flatten(1).all(1)][0]
        assert torch.equal(way[point // train_student.PHASE * train_student.PHASE + train_student.PHASE].float(), end)


@pytest.mark.parametrize("part", ["pixart", "sd"])
def test_training_goes_a_few_steps_stops_goes_on_and_writes_a_lora_that_loads(part, small, monkeypatch):
    name = f"tiny-{part}-4step"
    train_student.train_student(part, 0.03)
    first = torch.load(small / f"{part}-4step" / "last.pt", weights_only=True)["run"]
    assert first["step"] >= 1
    train_student.train_student(part, first["spent_s"] / 60 + 0.03)
    assert torch.load(small / f"{part}-4step" / "last.pt", weights_only=True)["run"]["step"] > first["step"]
    assert json.loads((small / name / "adapter_config.json").read_text())["r"] == train_student.RANKS[f"tiny-{part}"]
    monkeypatch.setattr(tiny, "folder", lambda name: small / name if "step" in name else folder(name))
    before, after = tiny.load(tiny.STUDENTS[name]), tiny.load(name)
    assert type(after) is type(before) and isinstance(after.scheduler, TCDScheduler)
    old, new = (dict(getattr(p, tiny.PARTS[tiny.STUDENTS[name]]).named_parameters()) for p in (before, after))
    assert list(old) == list(new) and any(not torch.equal(old[key], new[key]) for key in old)
    images = tiny.pictures(after, name, ["a red circle"])
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


@pytest.mark.parametrize("name", tiny.STUDENTS)
def test_four_steps_show_what_captions_say_and_are_nearer_to_the_teacher_than_the_base_is(name):
    captions, drawn = zip(*tiny.prompts(40, objects=1, seed=3), strict=True)
    student, base = tiny.load(name), tiny.load(tiny.STUDENTS[name])
    images = tiny.pictures(student, name, list(captions))
    assert caption_accuracy.score(images, drawn)["caption_accuracy"] >= 0.85
    assert caption_accuracy.score(images, drawn[1:] + drawn[:1])["caption_accuracy"] < 0.3
    truth = tiny.pictures(base, tiny.STUDENTS[name], list(captions[:8]))
    base.scheduler = student.scheduler
    near, far = (
        (images - truth).square().mean() for images in (images[:8], tiny.pictures(base, name, list(captions[:8])))
    )
    assert near < 0.7 * far


@pytest.mark.parametrize("name", tiny.STUDENTS)
def test_a_student_is_a_small_lora_with_a_card(name):
    files = [path for path in tiny.folder(name).rglob("*") if path.is_file()]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in files}
    base = tiny.folder(tiny.STUDENTS[name]) / tiny.PARTS[tiny.STUDENTS[name]]
    weights = (tiny.folder(name) / "adapter_model.safetensors").stat().st_size
    assert weights < sum(path.stat().st_size for path in base.glob("*.safetensors")) / 3
    assert json.loads((tiny.folder(name) / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        f"pipelines/tiny/{tiny.STUDENTS[name]}/{tiny.PARTS[tiny.STUDENTS[name]]}"
    )


def test_the_suite_draws_both_students_in_four_steps_and_loads_them():
    suite = Suite.read(Path(__file__).parents[2] / "eval" / "suites" / "few-step.yaml")
    assert {pipeline.path for pipeline in suite.pipelines} == set(tiny.STUDENTS) and suite.steps == 4
    assert all(pipeline.call["guidance_scale"] == 1 for pipeline in suite.pipelines)
    assert not any(path in tiny.STUDENTS for path in tiny.NAMES), "rows of the models stay as they are"
    pipe = generate.load("tiny-sd-4step", "bfloat16", torch.device("cpu"))
    assert isinstance(pipe.scheduler, TCDScheduler) and pipe.unet.dtype == torch.bfloat16
