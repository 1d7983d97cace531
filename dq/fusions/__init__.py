"""Run-time rewriting of a quantized model's modules onto fused kernels: found by structure, checked once, never saved.

gelu        the activation in the product's epilogue
attention   attention modules on dq's CPU kernels, or rounded in tiles
backends    attention of int8 plans on GPUs, by what diffusers has
"""

from __future__ import annotations

from torch import nn

from dq.attentionplan import INT8
from dq.fusions import attention, backends, gelu
from dq.layers import notes as written
from dq.plan import Plan


def attach(model: nn.Module, plan: Plan) -> None:
    """Fuse what can be fused; parameters, buffers and submodules stay as they are. Undone by `detach`."""
    detach(model)
    attention.attach(model, plan.attention)
    for module in model.modules():
        if written.read(module).attention == INT8:
            backends.attach(module)
    gelu.attach(model)


def detach(model: nn.Module) -> None:
    """Give every module its own forward back."""
    attention.detach(model)
    backends.detach(model)
    gelu.detach(model)


def set_backend(model: nn.Module, name: str) -> None:
    """Tell attached modules of a model the backend that was set for it alone."""
    for module in model.modules():
        if written.read(module).attention is not None:
            written.write(module, backend=name)
    backends.set_backend(model, name)


def notes(model: nn.Module) -> list[str]:
    """Lines for `dq.explain`: what is fused, and what is not."""
    lines, count = [], gelu.attached(model)
    if count:
        lines.append(f"GELU runs in the product before it in {count} modules")
    return lines + attention.lines(model) + backends.lines(model, attention.places(model))
