"""Metrics give the figures their docstrings define, refuse what does not fit, and leave the pipeline as it was."""

import importlib
import math
import pkgutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

from eval import metrics
from eval.metrics import feature_distance, noise_sqnr, psnr, trajectory_error
from pipelines.tiny import scenes
from pipelines.tiny.recogniser import as_tensor

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


@pytest.fixture(scope="module")
def renders():
    drawn = [scenes.sample(i, scenes.HELD_OUT)[0] for i in range(6)]
    return as_tensor(scenes.render(drawn))


def _blurred(images: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def test_feature_distance_of_equal_pictures_is_zero(renders):
    assert feature_distance.score(renders, renders) == {"feature_distance": 0.0, "feature_distance_worst": 0.0}


def test_feature_distance_grows_with_noise_and_with_blur(renders):
    noise = torch.randn(renders.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(renders + level * noise).clamp(0, 1) for level in (0.01, 0.03, 0.1)]
    for row in (noisy, [_blurred(renders, times) for times in (1, 2, 4)]):
        found = torch.stack([feature_distance.per_picture(images, renders) for images in row])
        assert (found > 0).all() and (found.diff(dim=0) > 0).all()


def test_feature_distance_is_symmetric_and_at_most_four_a_stage(renders):
    other = renders.flip(0)
    there, back = feature_distance.per_picture(renders, other), feature_distance.per_picture(other, renders)
    assert torch.allclose(there, back) and there.max() <= 4 * 8


def test_feature_distance_of_one_stage_is_what_its_docstring_says(renders, monkeypatch):
    maps = [torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1)]
    monkeypatch.setattr(feature_distance, "_directions", lambda images: [F.normalize(maps.pop(0), dim=1)])
    assert feature_distance.score(renders[:1], renders[:1])["feature_distance"] == pytest.approx(0.6**2 + 0.2**2)


def test_feature_distance_leaves_no_hooks_and_refuses_sets_that_do_not_fit(renders):
    feature_distance.score(renders[:1], renders[:1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in feature_distance._recogniser().modules())
    with pytest.raises(ValueError, match="equal shape"):
        feature_distance.score(renders, renders[:1])


class _Denoiser(nn.Module):
    """Answers `gain` times its input, and a variance beside it."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, hidden_states, timestep=None, return_dict=False):
        answer = self.gain * hidden_states
        return (torch.cat([answer, torch.full_like(answer, timestep)], 1),)


def _three_thirds(model):
    with noise_sqnr.record(model) as calls:
        for step in range(6):
            model(torch.full((2, 4, 3, 3), 1.0 + step), timestep=float(step), return_dict=False)
    return calls


def test_noise_sqnr_compares_predictions_of_the_same_inputs():
    exact = _Denoiser(1.0)
    calls = _three_thirds(exact)
    assert len(calls) == 6 and calls[0].prediction.shape == (2, 4, 3, 3) and not exact._forward_hooks
    reference = [call.prediction for call in calls]
    figures = noise_sqnr.score(noise_sqnr.replay(_Denoiser(1.1), calls), reference)
    assert figures == pytest.approx(dict.fromkeys(noise_sqnr.UNITS, 20.0), abs=1e-3)
    assert set(noise_sqnr.score(noise_sqnr.replay(exact, calls), reference).values()) == {noise_sqnr.MOST_DB}


def test_noise_sqnr_keeps_the_thirds_apart():
    reference = [torch.ones(1, 4)] * 7
    predictions = [torch.full((1, 4), value) for value in (1.1, 1.1, 1.01, 1.01, 1.01, 1.001, 1.001)]
    figures = noise_sqnr.score(predictions, reference)
    assert list(figures.values()) == pytest.approx([20.0, 40.0, 60.0], abs=0.1)


def test_noise_sqnr_refuses_runs_that_do_not_fit():
    with pytest.raises(ValueError, match="2 and 2 steps"):
        noise_sqnr.score([torch.ones(1, 1)] * 2, [torch.ones(1, 1)] * 2)
    with pytest.raises(ValueError, match=r"\(1, 2\), reference \(1, 1\)"):
        noise_sqnr.score([torch.ones(1, 2)] * 3, [torch.ones(1, 1)] * 3)
