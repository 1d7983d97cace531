"""The least that is a pipeline, and a calibration for it."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

import dq


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts noise as a fixed function of the sample, times `gain`."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(64, 64), 1.0

    def forward(self, x, timestep):
        return self.gain * (0.5 * x + 0.1 * self.inner(x))


class Pipeline(DiffusionPipeline):
    """The least that is one: latents (batch, 1, 4, 64) in, latents out."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="latent", return_dict=True):
        generators = generator if isinstance(generator, list) else [generator]
        x = torch.cat([torch.randn(1, 1, 4, 64, generator=each) for each in generators])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep=t), t, x).prev_sample
        return (x,)


def small() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(Denoiser().eval(), DDIMScheduler())


def settings(**more) -> dq.Calibration:
    return dq.Calibration(prompts=["one", "two", "three", "four"], steps=4, samples=4, **more)
