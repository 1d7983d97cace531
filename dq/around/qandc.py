"""Q&C's variance correction: the spread that rounding and caching add to latents, taken back. arXiv 2503.02508.

    x~_s = mu + K[s, c] (x^_s - mu)
    K = sum w u v / sum w u^2,   u = x^ - mu,  v = x' - mu,  w = 1 + 1 / (x'^2 + eps)

x' (latents after step s in full precision) and x^ (quantized, cached) of the same noise, mu the mean of x^ over a
channel c. Steps are corrected one after another: those of K_s are measured under K_0 ... K_(s-1). Deviations: this K
is the stationary point of the paper's objective (as printed, its closed form is that only at mu = 0), eps is 1 % of
the channel's variance, K stays within LEAST and MOST; and what leaves no less of that objective in the last step on
prompts held out is dropped. The paper's other half, calibration on clusters of cached trajectories (TAP), is
`dq.Calibration(policy="clustered")`, which records under the cache of the recipe.
"""

from __future__ import annotations

import torch

from dq.around.runs import Search
from dq.errors import DQError
from dq.surroundings import Correction

NEEDS_PAIRS = True
LEAST, MOST = 0.8, 1.25
SHARE = 1e-2  # of a channel's variance


def find(search: Search) -> tuple[Correction | None, list[str]]:
    """Gains of every step and channel, None where they leave no less error on prompts held out; and what to say."""
    count = len(search.wanted[0].steps)
    if count != search.distinct:
        raise DQError(f"qandc: {count} calls of the scheduler in {search.distinct} steps, expected one in each")
    if search.wanted[0].steps[0].dim() < 3:
        raise DQError("qandc: latents have no channels in their second dimension, as those of pictures and clips do")
    gains: list[tuple[float, ...]] = []
    means: list[tuple[float, ...]] = []

    def correction() -> Correction:
        rest = count - len(gains)
        one, zero = (1.0,) * len(gains[0]), (0.0,) * len(gains[0])
        return search.correction("variance", {"gain": (*gains, *[one] * rest), "mean": (*means, *[zero] * rest)})

    for step in range(count):
        pairs = _pairs(search, [correction()] if gains else [], step, range(search.half))
        gain, mean = fitted(*pairs)
        gains.append(gain)
        means.append(mean)
    found, held = correction(), range(search.half, len(search.batches))
    stock, corrected = (_left(*_pairs(search, each, count - 1, held)) for each in ([], [found]))
    flat = [value for row in gains for value in row]
    said = f"qandc: gains {min(flat):.3f} to {max(flat):.3f}; weighted error of held-out latents {stock:.4g} without, "
    said += f"{corrected:.4g} with"
    return (found, [said]) if corrected < stock else (None, [f"{said}: no correction"])


def fitted(got: torch.Tensor, wanted: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(gain, mean) a channel of latents (runs, channels, ...) that should have been `wanted`."""
    x, y = (each.float().transpose(0, 1).flatten(1) for each in (got, wanted))
    mean = x.mean(1, keepdim=True)
    u, v, w = x - mean, y - mean, _weights(y)
    gain = ((w * u * v).sum(1) / (w * u * u).sum(1).clamp_min(1e-20)).clamp(LEAST, MOST)
    return tuple(round(value, 6) for value in gain.tolist()), tuple(round(value, 6) for value in mean[:, 0].tolist())


def _weights(wanted: torch.Tensor) -> torch.Tensor:
    """1 + 1 / (x'^2 + eps), (channels, values)."""
    return 1 + 1 / (wanted.square() + SHARE * wanted.var(1, keepdim=True).clamp_min(1e-12))


def _left(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The objective that `fitted` minimises, a value."""
    x, y = (each.float().transpose(0, 1).flatten(1) for each in (got, wanted))
    return float((_weights(y) * (x - y).square()).mean())


def _pairs(search: Search, found: list[Correction], step: int, span: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents after a step, of some batches, under corrections and in full precision."""
    got = [search.run(index, found, until=step).steps[step] for index in span]
    return torch.cat(got), torch.cat([search.wanted[index].steps[step] for index in span])
