"""Metrics give the figures their docstrings define, refuse what does not fit, and leave the pipeline as it was."""

import importlib
import math
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from eval import metrics
from eval.metrics import psnr, trajectory_error

NAMES = [item.name for item in pkgutil.iter_modules(metrics.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_says_what_it_needs_and_in_which_unit_it_answers(name):
    module = importlib.import_module(f"eval.metrics.{name}")
    assert module.NEEDS and module.UNITS and callable(module.score)
    better = module.BETTER.values() if isinstance(module.BETTER, dict) else [module.BETTER]
    assert set(better) <= {"higher", "lower"}


def test_psnr_is_twenty_db_for_an_error_of_a_tenth():
    reference = torch.full((3, 3, 8, 8), 0.5)
    assert psnr.score(reference + 0.1, reference)["psnr_db"] == pytest.approx(20.0, abs=1e-4)


def test_psnr_averages_decibels_and_names_the_worst_picture():
    reference = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr.score(images, reference) == pytest.approx({"psnr_db": 30.0, "psnr_db_worst": 20.0}, abs=1e-4)


def test_psnr_of_equal_pictures_is_finite():
    images = torch.rand(2, 3, 4, 4)
    assert psnr.score(images, images)["psnr_db"] == 100.0


def test_psnr_reads_pil_pictures():
    pair = [Image.new("RGB", (4, 4), (value,) * 3) for value in (0, 255)]
    assert psnr.score(pair[:1], pair[1:])["psnr_db"] == pytest.approx(0.0)


def test_psnr_refuses_sets_that_do_not_fit():
    with pytest.raises(ValueError, match="equal shape"):
        psnr.score(torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4))


def _run(pipe, steps: int = 3) -> torch.Tensor:
    pipe.scheduler.set_timesteps(steps)
    latents = torch.ones(2, 4, 2, 2)
    for t in pipe.scheduler.timesteps:
        latents = pipe.scheduler.step(0.1 * latents, t, latents, return_dict=False)[0]
    return latents


def test_recording_sees_the_latents_of_every_step_and_changes_none():
    pipe = SimpleNamespace(scheduler=DDIMScheduler())
    plain = _run(pipe)
    with trajectory_error.record(pipe) as latents:
        recorded = _run(pipe)
    assert len(latents) == 3 and torch.equal(latents[-1], recorded) and torch.equal(plain, recorded)
    _run(pipe)
    assert len(latents) == 3, "the scheduler is itself again after the block"


def test_trajectory_error_counts_every_step():
    reference = [torch.full((1, 1, 2, 2), 2.0)] * 2
    run = [reference[0], reference[1] + 0.2]
    figures = trajectory_error.score(run, reference)
    assert figures["trajectory_mse"] == pytest.approx(0.02)
    assert figures["trajectory_mse_last"] == pytest.approx(0.04)
    assert figures["trajectory_sqnr_db"] == pytest.approx(10 * math.log10(8 / 0.04), abs=1e-3)


def test_trajectory_error_refuses_runs_of_different_length():
    with pytest.raises(ValueError, match="2 and 1 steps"):
        trajectory_error.score([torch.ones(1, 1), torch.ones(1, 1)], [torch.ones(1, 1)])
