"""Which range a stored scale covers: all values, all but the rarest, or what leaves the least rounding error.

    minmax  |x|max,    percentile  the best (least squares) of three,    mse  argmin_f mean |x - Q(x; f |x|max)|^2.4

x (rows, n), one range per row: a channel, or a whole activation as one row. The mse search is that of PTQ4DM
(arXiv 2211.15736) and Q-Diffusion (arXiv 2302.04304): 80 shrinks of 1 %. Losses are taken on a fixed sample of large
inputs, minmax on everything.
"""

from __future__ import annotations

import torch

from dq.errors import DQError, nearest
from dq.formats.base import Format, Granularity, check_finite

POWER = 2.4
SHRINKS = 80
FRACTIONS = (0.999, 0.9999, 0.99999)
SAMPLE = 200_000  # values a search looks at
ROW, TENSOR = Granularity("channel"), Granularity("tensor")


def minmax(x: torch.Tensor, spec: Format) -> torch.Tensor:
    """(rows, 1) fp32 scales that cover every value of x (rows, n)."""
    low, high = _ends(x)
    return _covering(low, high, spec)


def percentile(x: torch.Tensor, spec: Format, fractions: tuple[float, ...] = FRACTIONS) -> torch.Tensor:
    """(rows, 1) scales that cover the middle `fraction` of the values; of several fractions the one of least error."""
    some = _sample(x)
    tails = [(1 - fraction) / 2 for fraction in fractions]
    tried = [_covering(_cut(some, tail), _cut(some, 1 - tail), spec) for tail in tails]
    return _least(some, spec, tried, 2.0)


def mse(x: torch.Tensor, spec: Format, power: float = POWER, shrinks: int = SHRINKS) -> torch.Tensor:
    """(rows, 1) scales of least mean |x - x̂|^power among shrinks by 1 % each of the full range."""
    some, whole = _sample(x), minmax(x, spec)
    return _least(some, spec, [whole * (1 - 0.01 * i) for i in range(shrinks)], power)


METHODS = {"minmax": minmax, "percentile": percentile, "mse": mse}


@torch.no_grad()
def static(x: torch.Tensor, spec: Format, method: str = "mse", centre: bool = False) -> tuple[float, float]:
    """-> (scale, shift) of a stored activation scale for values x of any shape: x̂ = Q(x + shift) - shift.

    centre: let a one-sided input use the whole symmetric grid, shift = -(high + low) / 2 of the range that `method`
    keeps; the shift is 0 where that is no better. Shifts have six digits, as plans write them.
    DQError: no values, an unknown method, or a format whose scales are not stored as fp32. FormatError: not finite.
    """
    if method not in METHODS:
        raise DQError(f"range method: got {method!r}, {nearest(method, METHODS)}")
    if spec.fixed:
        raise DQError(f"static scale: got format {spec.name!r}, expected int or float; micro formats scale per call")
    if not x.numel():
        raise DQError("static scale: got no values, expected at least one; record more calibration calls")
    flat = check_finite(x.detach().reshape(1, -1), "static scale")
    scale = METHODS[method](flat, spec)
    if not centre:
        return float(scale), 0.0
    some = _sample(flat)
    best, least = (float(scale), 0.0), float(_loss(some, spec, scale, POWER))
    for low, high in _windows(flat, some, method):
        shift = float(f"{-(high + low) / 2:g}")
        width = torch.tensor([[max(high + shift, -low - shift)]], device=flat.device)
        scale = _covering(-width, width, spec)
        loss = float(_loss(some + shift, spec, scale, POWER))
        if loss < least:
            best, least = (float(scale), shift), loss
    return best


def _windows(flat: torch.Tensor, some: torch.Tensor, method: str) -> list[tuple[float, float]]:
    """Ranges [low, high] to centre on. The far end alone is shrunk: the near one is where most values lie."""
    low, high = (float(end) for end in _ends(flat))
    if method == "minmax":
        return [(low, high)]
    if method == "percentile":
        return [(float(_cut(some, (1 - f) / 2)), float(_cut(some, (1 + f) / 2))) for f in FRACTIONS]
    factors = [1 - 0.01 * i for i in range(SHRINKS)]
    return [(low, high * f) if high >= -low else (low * f, high) for f in factors]


def _ends(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin(1, keepdim=True).float(), x.amax(1, keepdim=True).float()


def _covering(low: torch.Tensor, high: torch.Tensor, spec: Format) -> torch.Tensor:
    """(rows, 1) scales whose grid spans [low, high]."""
    return spec.fit(torch.cat([low, high], 1), ROW).scale


def _sample(x: torch.Tensor) -> torch.Tensor:
    """x fp32, or about SAMPLE of its values: the same columns of each row, drawn from a fixed seed."""
    rows, count = x.shape
    keep = max(1, SAMPLE // max(1, rows))
    if count <= keep:
        return x.float()
    picked = torch.randint(count, (keep,), generator=torch.Generator().manual_seed(0))
    return x[:, picked.to(x.device)].float()


def _cut(some: torch.Tensor, fraction: float) -> torch.Tensor:
    """(rows, 1): the value below which `fraction` of each row lies. torch.quantile refuses large inputs."""
    place = fraction * (some.shape[1] - 1)
    return some.sort(1).values[:, round(place), None]


def _loss(some: torch.Tensor, spec: Format, scale: torch.Tensor, power: float) -> torch.Tensor:
    return (spec.fake(some, ROW, scale=scale) - some).abs_().pow_(power).mean(1, keepdim=True)


def _least(some: torch.Tensor, spec: Format, tried: list[torch.Tensor], power: float) -> torch.Tensor:
    """Per row the scale of least loss; the first of equals."""
    losses = torch.cat([_loss(some, spec, scale, power) for scale in tried], 1)
    return torch.cat(tried, 1).gather(1, losses.argmin(1, keepdim=True))
