"""Blocks of a model on fused kernels: norm and modulation before the linears, gate and residual after them.

    q, k, v = Q(norm(x) * (1 + scale) + shift) W_q^T, W_k^T, W_v^T     one rounding
    y = x + gate * (a W_o^T + b)                                       one call

A block is an entry of a module list with a norm and packed linears of dq's CPU kernels in it. Its own forward runs:
the norms in it return tensors that wait (`dq.kernels.cpu.deferred`), so that any order of operations which ends in a
kernel is found, whatever the class. The first call compares each place with the unfused computation. A block runs
unfused under torch.compile, whose own fusion does the same work, with gradients, in training, on another backend, with
small inputs, and while a module inside of it has hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dq import kernels, takeover
from dq.kernels.cpu import deferred
from dq.layers import PackedLinear

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
PROBE_ROWS = 3
LEAST = 2**17  # elements of a sample in the largest input of a block; with fewer, waiting costs more than it saves
BLOCK, NORM = "block", "norm"


@dataclass
class Norm:
    """A norm that may wait. kind: "layer" | "rms"."""

    kind: str
    eps: float
    site: deferred.Site


@dataclass
class Counts:
    """What the last fused call of a block saved (see `deferred.Run`); zeros before the first."""

    calls: int = 0
    norms: int = 0
    endings: int = 0
    shared: int = 0


def attach(model: nn.Module) -> None:
    """Fuse the blocks of a model from their next call on. Undone by `detach`."""
    detach(model)
    norms = {module: kind for module in model.modules() if (kind := norm_of(module)) is not None}
    for block in _blocks(model, norms):
        for module in block.modules():
            if module in norms:
                vars(module)["_dq_norm"] = Norm(*norms[module], deferred.Site())
                takeover.take(module, NORM, _normalize)
        vars(block)["_dq_counts"] = Counts()
        takeover.take(block, BLOCK, _run)


def detach(model: nn.Module) -> None:
    """Give blocks and norms their own forward back."""
    for module in model.modules():
        takeover.give_back(module, BLOCK)
        takeover.give_back(module, NORM)
        vars(module).pop("_dq_norm", None)
        vars(module).pop("_dq_counts", None)


def counts(model: nn.Module) -> dict[str, Counts]:
    """What fusing saves in each attached block, by name."""
    found = ((name, vars(module).get("_dq_counts")) for name, module in model.named_modules())
    return {name: count for name, count in found if count is not None}


def notes(model: nn.Module) -> list[str]:
    """Lines for `dq.explain`."""
    found = counts(model)
    called = {name: count for name, count in found.items() if count.calls}
    fused = {name: each for name, each in called.items() if each.norms or each.endings or each.shared}
    total = {key: sum(getattr(each, key) for each in fused.values()) for key in ("norms", "endings", "shared")}
    lines = []
    if len(called) < len(found):
        lines.append(
            f"{len(found) - len(called)} blocks wait for a call with {LEAST} elements per sample to be tried on fused "
            "kernels"
        )
    if fused:
        lines.append(
            f"fused in {len(fused)} blocks, not under torch.compile or with gradients: norm and modulation into "
            f"{total['norms']} linears (bf16 and fp16), gate and residual or GELU into {total['endings']}; "
            f"{total['shared']} take the codes of the linear before"
        )
    if unfused := [name for name in called if name not in fused]:
        lines.append(
            f"{len(unfused)} blocks run unfused, nothing in them agreed with a fused kernel: {unfused[0]}, ..."
        )
    return lines


def _blocks(model: nn.Module, norms: Collection[nn.Module]) -> list[nn.Module]:
    """Innermost entries of module lists with a norm and a linear on the CPU kernels in them."""
    entries = [entry for module in model.modules() if isinstance(module, CONTAINERS) for entry in module.children()]
    found = {}
    for entry in entries:
        parts = set(entry.modules())
        if not parts.isdisjoint(norms) and any(_is_fusible(part) for part in parts):
            found[entry] = parts - {entry}
    return [entry for entry, parts in found.items() if parts.isdisjoint(found)]


def _is_fusible(module: nn.Module) -> bool:
    return (
        isinstance(module, PackedLinear)
        and module.plan.act is not None
        and not module.plan.start
        and getattr(module.choice, "backend", "") == "cpu"
    )


@torch.no_grad()
def norm_of(module: nn.Module) -> tuple[str, float] | None:
    """("layer" | "rms", eps) of a norm over the last dimension, which a probe shows; None for other modules."""
    own, names, parameters = vars(module), ("weight", "bias"), module._parameters
    eps, shape = own.get("eps"), own.get("normalized_shape", own.get("dim"))
    if not isinstance(eps, float) or not isinstance(shape, tuple) or len(shape) != 1 or set(parameters) - set(names):
        return None
    if module._modules or module._buffers or takeover.is_replaced(module):
        return None
    dice = torch.Generator().manual_seed(0)
    x, *drawn = (torch.randn(*size, generator=dice) for size in ((PROBE_ROWS, *shape), shape, shape))
    given = {
        name: value if parameters.get(name) is not None else None for name, value in zip(names, drawn, strict=True)
    }
    try:
        y = type(module).forward(_twin(module, {name: given[name] for name in parameters}), x)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # another signature or shape: another kind of module
        return None
    for kind, norm in (("layer", F.layer_norm(x, shape, eps=eps)), ("rms", F.rms_norm(x, shape, eps=eps))):
        scaled = norm if given["weight"] is None else norm * given["weight"]
        if torch.allclose(y, scaled if given["bias"] is None else scaled + given["bias"], rtol=1e-4, atol=1e-5):
            return kind, eps
    return None


def _normalize(module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of a norm: deferred while its block runs."""
    block = None if torch.compiler.is_compiling() else deferred.running()
    if block is None or kwargs or len(args) != 1:
        return inner(*args, **kwargs)
    norm, kept = module._dq_norm, {}
    for name, value in module._parameters.items():  # offloading may take them back
        kept[name] = None if value is None else value.detach()
    scale, shift = (None if kept.get(name) is None else kept[name].reshape(1, -1) for name in ("weight", "bias"))
    again = lambda x: type(module).forward(_twin(module, kept), x)  # noqa: E731
    waiting = block.norm(norm.site, again, args[0], deferred.Beginning(norm.kind, norm.eps, scale, shift))
    return inner(*args) if waiting is None else waiting


def _twin(module: nn.Module, parameters: dict[str, torch.Tensor | None]) -> nn.Module:
    """The module with these parameters, without a copy of anything."""
    twin = copy.copy(module)
    vars(twin)["_parameters"] = parameters
    return twin


def _run(module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of a block."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
        return inner(*args, **kwargs)
    if _largest(*args, *kwargs.values()) < LEAST or kernels.selected() not in ("auto", "cpu") or _is_watched(module):
        return inner(*args, **kwargs)
    with deferred.run() as run:
        output = deferred.plain(inner(*args, **kwargs))
    count = module._dq_counts
    count.calls, count.norms, count.endings, count.shared = count.calls + 1, run.norms, run.endings, run.shared
    return output


def _largest(*given) -> int:
    """Elements of a sample in the largest tensor: the same for any batch, so that no picture depends on the others."""
    return max((each.shape[1:].numel() for each in given if isinstance(each, torch.Tensor) and each.dim()), default=0)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks on parts of the block would see tensors that wait."""
    return _has_any_global_hook() or any(
        part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module
    )
