"""Variance correction of Q&C: the latents' spread around their mean, after a step. arXiv 2503.02508.

x~ = mu + K (x - mu)      K[s, channel], mu[s, channel]; x (batch, channels, ...) as a scheduler's step gives it
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def after(values: Mapping[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
    """The sample with its channels' spread corrected, in its own dtype; a gain of 1 leaves a channel as it is."""
    shape = (1, -1, *[1] * (sample.dim() - 2))
    gain, mean = (values[name].view(shape) for name in ("gain", "mean"))
    return torch.where(gain == 1, sample, (mean + gain * (sample.float() - mean)).to(sample.dtype))


def line(values: Mapping) -> str:
    """The range of the gains, as `dq.explain` shows it."""
    gains = [value for row in values["gain"] for value in row]
    return f"spread of the latents times {min(gains):.3f} to {max(gains):.3f}"
