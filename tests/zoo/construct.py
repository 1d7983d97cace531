"""Seeded construction of small denoisers: every parameter gets a value of its own, none stays zero or unset."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

SMALL, TABLE = 0.02, 0.2
ABSURD = 1e4  # unset memory that happens to be finite


@contextlib.contextmanager
def unset_is_nan(seed: int) -> Iterator[None]:
    """Seeds the global generator; memory from `torch.empty` holds NaN inside, so unset parameters are seen."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def fresh(name: str, old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """New values for one parameter, same shape as `old`.

    Weights of two or more dimensions get unit gain, so do bare (..., in, out) projections; tables and tokens are
    normal with std 0.2; biases normal with std 0.02; norm weights 1 plus that; single numbers keep a nonzero value.
    Weights that their module scales itself (Wan-Animate's motion encoder) are standard normal.
    """
    last = name.rpartition(".")[2]
    noise = torch.randn(old.shape, generator=generator)
    if old.ndim >= 2 and "motion_encoder" in name:
        return noise
    if old.ndim >= 2 and last.endswith("weight"):
        return noise * old[0].numel() ** -0.5
    if old.ndim >= 2 and "proj" in last:
        return noise * old.shape[-2] ** -0.5
    if old.ndim >= 2:
        return noise * TABLE
    if last == "bias":
        return noise * SMALL
    if last == "weight" or bool((old == 1).all()):
        return 1 + noise * SMALL
    kept = bool(torch.isfinite(old).all()) and bool((old != 0).any())
    if kept:
        return old + noise * SMALL
    return noise * TABLE if old.numel() > 1 else torch.full_like(old, TABLE)


@torch.no_grad()
def randomise(model: nn.Module, seed: int, gains: dict[str, float]) -> None:
    """Sets every parameter from one generator, in the order of `named_parameters`; `gains` are factors by prefix."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(fresh(name, parameter.detach().float(), generator))
        for prefix, gain in gains.items():
            if name.startswith(prefix):
                parameter.mul_(gain)


@torch.no_grad()
def complete(model: nn.Module, seed: int, gains: dict[str, float]) -> None:
    """Keeps the class's own initialisation, times `gains`; all-zero or unset parameters get noise of std 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * SMALL
        wide = parameter.detach().float()
        if not bool(wide.isfinite().all()) or not bool(wide.any()) or wide.abs().max() > ABSURD:
            parameter.copy_(noise)
        parameter.mul_(math.prod(gain for prefix, gain in gains.items() if name.startswith(prefix)))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the stored floating tensors as loading with `torch_dtype=dtype` does: the class may keep some float32."""
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    stored = set(model.state_dict())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        kept = any(part in name.split(".") for part in keep)
        if name in stored and tensor.is_floating_point() and not kept:
            tensor.data = tensor.data.to(dtype)


def tensors_in(output) -> list[torch.Tensor]:
    """All floating tensors in a nested output (tuple, list, dict or model output), in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors_in(part)]
    return []


def moved(value, device: torch.device):
    """The same nested value with its tensors (also inside diffusers' caches) on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    if type(value).__module__.startswith("diffusers."):
        vars(value).update(moved(vars(value), device))
    return value
