"""TaylorSeer, diffusers' own: between full steps, attention and feed-forward outputs follow their last slope.

    y(s + d) = y(s) + d (y(s) - y(s - n)) / n      s, s - n: the last two full steps. Order 1 of arXiv 2503.06923

The value is the number of steps from one full step to the next; the first WARM steps are full ones.
"""

from __future__ import annotations

import re

import torch
from diffusers import hooks
from diffusers.hooks import taylorseer_cache as theirs
from torch import nn

from dq.sampler.caches import interval, parts

VALUE, LEAST, MOST, WHOLE = 3, 2, 100, True
WARM = 3

why_not = interval.why_not


def apply(model: nn.Module, value: float) -> list[str]:
    """Put the hooks on; -> their names."""
    first = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=int(value),
        disable_cache_before_step=WARM,
        taylor_factors_dtype=torch.float32 if first is torch.float32 else torch.bfloat16,
        cache_identifiers=[re.escape(name) for name in parts.inner(model)],
    )
    hooks.apply_taylorseer_cache(model, config)
    return [theirs._TAYLORSEER_CACHE_HOOK]


def line(value: float) -> str:
    return f"attention and feed-forward run in every {int(value)}th step, and are extrapolated between (TaylorSeer)"
