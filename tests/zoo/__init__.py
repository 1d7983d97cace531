"""Small random-weight versions of every denoiser class in the installed diffusers, with inputs that fit them.

`ENTRIES` maps class names to configurations and inputs, `build` makes the module, `call` runs it. Weights come from
a seed alone, so two builds agree bit for bit, and no output is zero by way of zero-initialised layers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools

import torch
from accelerate import init_empty_weights
from torch import nn

from .catalog import ENTRIES, FULL_CONFIGS, denoiser_class, denoiser_classes
from .construct import cast, complete, moved, randomise, tensors_in, unset_is_nan
from .entry import Entry

__all__ = ["ENTRIES", "FULL_CONFIGS", "Entry", "build", "call", "default_model", "denoiser_class", "denoiser_classes"]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, init: str = "unit", **changes) -> nn.Module:
    """The class `name` in its small configuration, with `changes` to it, with seeded weights, in eval mode.

    `init` is "unit" (every weight gets unit gain, nothing is zero: small errors grow the most) or "own" (what the
    class itself draws, with noise only where it leaves zeros or nothing).
    """
    with unset_is_nan(seed):
        model = denoiser_class(name)(**copy.deepcopy(ENTRIES[name].config | changes))
    if init == "own":
        complete(model, seed, ENTRIES[name].gains)
    else:
        randomise(model, seed, ENTRIES[name].gains)
    cast(model, dtype)
    return model.eval()


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The floating dtype that holds most of the model's parameters."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=counts.get, default=torch.float32)


@torch.no_grad()
def call(model: nn.Module, entry: Entry, seed: int = 0, dtype: torch.dtype | None = None, **changes) -> torch.Tensor:
    """Runs `model` on the entry's inputs and gives all its output values as one flat float32 tensor.

    `dtype` is the inputs' dtype (the parameters' by default; name it for a model with packed weights), `changes`
    replace single inputs.
    """
    inputs = entry.inputs(torch.Generator().manual_seed(seed), dtype or compute_dtype(model))
    stored = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in stored), torch.device("cpu"))
    stance = torch.compiler.set_stance("force_eager") if entry.eager else contextlib.nullcontext()
    with stance, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**moved({**inputs, **changes}, device))
    return torch.cat([tensor.float().flatten() for tensor in tensors_in(output)])


def default_model(name: str) -> nn.Module:
    """The class with its default configuration (or that in `FULL_CONFIGS`) on the meta device."""
    with init_empty_weights(), torch.device("meta"):
        return denoiser_class(name)(**FULL_CONFIGS.get(name, {}))
