"""Error of the noise prediction on identical inputs, for the early, middle and late third of the denoising steps.

    sqnr_T = 10 log10(sum_{s in T} |e_s|^2 / sum_{s in T} |e_s - ê_s|^2)

e_s, ê_s (batch, channels, ...): what the full-precision and the quantized denoiser answer to the very same input,
taken from a full-precision run (teacher forced), so that errors do not add up over steps. Early steps are the
noisiest. A learned variance beside the noise is left out.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

NEEDS = ("predictions", "reference_predictions")
THIRDS = ("early", "middle", "late")
UNITS = {f"noise_sqnr_{third}_db": "dB" for third in THIRDS}
BETTER = "higher"
MOST_DB = 200.0  # of equal predictions


@dataclass(frozen=True)
class Call:
    """One denoiser call of a full-precision run: arguments as given, and the prediction (batch, channels, ...)."""

    args: tuple
    kwargs: dict[str, Any]
    prediction: torch.Tensor


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Call]]:
    """A list that fills with every call of a denoiser, in step order, while the block runs its pipeline.

    Tensors are kept as they are: pipelines make new ones for each step.
    """
    calls: list[Call] = []

    def keep(module, args, kwargs, output):
        calls.append(Call(args, kwargs, _noise(args, kwargs, output)))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def replay(model: nn.Module, calls: Sequence[Call]) -> list[torch.Tensor]:
    """What `model` predicts for the inputs of recorded calls."""
    return [_noise(call.args, call.kwargs, model(*call.args, **call.kwargs)) for call in calls]


def _noise(args: tuple, kwargs: dict, output) -> torch.Tensor:
    """The prediction of a denoiser call in fp32, without the channels of a learned variance."""
    given = [*args, kwargs.get("sample"), kwargs.get("hidden_states")]
    sample = next(value for value in given if torch.is_tensor(value))
    answer = output[0]  # of a tuple or of a ModelOutput
    return answer[:, : sample.shape[1]].detach().float()


def score(predictions: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, float]:
    """Figures of one run, a prediction per step, noisiest first; ValueError when the runs differ or are too short."""
    if len(predictions) != len(reference) or len(reference) < len(THIRDS):
        raise ValueError(
            f"noise SQNR: runs of {len(predictions)} and {len(reference)} steps, expected equal, 3 or more"
        )
    signal, noise = [], []
    for mine, theirs in zip(predictions, reference, strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(f"noise SQNR: predictions {tuple(mine.shape)}, reference {tuple(theirs.shape)}")
        signal.append(float(theirs.double().square().sum()))
        noise.append(float((mine.double() - theirs.double()).square().sum()))
    edges = [round(i * len(reference) / len(THIRDS)) for i in range(len(THIRDS) + 1)]
    spans = zip(THIRDS, pairwise(edges), strict=True)
    return {f"noise_sqnr_{name}_db": _decibels(sum(signal[a:b]), sum(noise[a:b])) for name, (a, b) in spans}


def _decibels(signal: float, noise: float) -> float:
    if noise <= signal * 10 ** (-MOST_DB / 10):
        return MOST_DB
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))
