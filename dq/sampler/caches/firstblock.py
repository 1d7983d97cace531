"""First-block cache, diffusers' own: the first block always runs, and says whether the others have to.

    |r_s - r_prev|_1 / |r_prev|_1 <= threshold   =>   out = first block's output + what the others added last time

r: what the first block adds to its input, in the last step in which all ran. ParaAttention's FBCache.
"""

from __future__ import annotations

from diffusers import hooks
from diffusers.hooks import first_block_cache as theirs
from torch import nn

from dq.sampler.caches import parts

VALUE, LEAST, MOST, WHOLE = 0.08, 0.0, 1.0, False


def why_not(model: nn.Module) -> str | None:
    """None for a model whose blocks run one after another, in classes that diffusers' hooks know."""
    name, found = type(model).__name__, parts.lists(model)
    blocks = [block for each in found.values() for block in each]
    if len(blocks) < 2:
        return f"{name} has no list of transformer blocks one after another; `interval` needs none"
    if any("temporal" in each for each in found):
        return f"blocks of {name} run in turns, spatial and temporal, which diffusers' hook does not follow"
    if other := next((type(block).__name__ for block in blocks if not parts.known(block)), None):
        return f"diffusers' hook does not know blocks of class {other}; `interval` needs not to"
    return None


def apply(model: nn.Module, value: float) -> list[str]:
    """Put the hooks on; -> their names."""
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=value))
    return [theirs._FBC_LEADER_BLOCK_HOOK, theirs._FBC_BLOCK_HOOK]


def line(value: float) -> str:
    return f"blocks after the first are left out where it changes by at most {value:g} (diffusers' first-block cache)"
