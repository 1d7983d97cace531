"""Errors of a step counted by how far the end of a run follows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from dq.fit import steps
from dq.trace.running import Runner
from tests.fit.test_tune import WISH, Pipeline, equal, pipeline, settings, state_of, tuned


class Blind(torch.nn.Module):
    """A denoiser that does not look at the latents: what a step's answer does is the scheduler's doing alone."""

    def __init__(self):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.randn(1, 8, 32))

    def forward(self, hidden_states, timestep, text=None):
        return self.answer.expand_as(hidden_states)


def test_of_a_denoiser_that_sees_no_latents_it_is_what_the_scheduler_makes_of_a_step():
    pipe = Pipeline(Blind(), DDIMScheduler(clip_sample=False))
    found = steps.follows(Runner(pipe, settings()), {"transformer": pipe.transformer}, 7)
    pipe.scheduler.set_timesteps(4)
    alphas = [
        *(pipe.scheduler.alphas_cumprod[t] for t in pipe.scheduler.timesteps),
        pipe.scheduler.final_alpha_cumprod,
    ]
    noise = torch.stack([((1 - a) / a) ** 0.5 for a in alphas])  # x / sqrt(a) follows its fall
    wanted = (noise[:-1] - noise[1:]).square()
    torch.testing.assert_close(torch.tensor(found), wanted / wanted.mean(), rtol=1e-4, atol=1e-6)


def test_later_calls_are_differentiated_too():
    """A small change of a step's answer moves the end by what its gradient says, on average over directions."""
    pipe = pipeline()
    runner, heard = Runner(pipe, settings()), {}
    steps._walk(runner, {"transformer": pipe.transformer}, 3, lambda step, size: heard.update({step: float(size)}))
    real, end = pipe.transformer.forward, pipe(**runner.arguments(3))

    def moved(step: int, noise: torch.Tensor) -> torch.Tensor:
        left = iter([*[0] * step, noise, *[0] * (3 - step)])
        pipe.transformer.forward = lambda *args, **kwargs: real(*args, **kwargs) + next(left)
        return pipe(**runner.arguments(3))

    for step in (0, 3):
        draws = [1e-3 * torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i)) for i in range(40)]
        sizes = [float((moved(step, noise) - end).square().sum() / noise.square().sum()) for noise in draws]
        assert heard[step] == pytest.approx(sum(sizes) / len(sizes), rel=0.4)


def test_steps_that_count_unequally_lead_elsewhere_and_again_to_the_same():
    wish = replace(WISH, loss="ends", updates=8)
    (one, report), (other, _), (plain, _) = tuned(wish), tuned(wish), tuned(replace(wish, loss="plain"))
    assert equal(state_of(one), state_of(other)) and not equal(state_of(one), state_of(plain))
    assert not any("all steps alike" in note for note in report.notes)


def test_a_pipeline_without_gradients_is_tuned_with_steps_alike_and_says_so(monkeypatch):
    monkeypatch.setattr(Runner, "undecorated", None)
    wish = replace(WISH, loss="ends", updates=8)
    pipe, report = tuned(wish)
    assert any("all steps alike" in note for note in report.notes)
    plain, _ = tuned(replace(wish, loss="plain"))
    assert equal(state_of(pipe), state_of(plain))
