"""Which code runs a packed layer: backends found by listing this folder, chosen per layer with a reason for every no.

Among those that accept a layer the fastest right one runs it, by what was measured on this machine (`choice`); ranks
decide where nothing was. A backend is one module (or package) here that exports
    RANK                            smaller is preferred; `reference` is last and accepts everything
    STATUS                          "stable", or "experimental" for kernels that were never timed on what they are for
    why_not(op, plan, device, conv) None when it can run the layer on that device type, else the reason in one line
    label(op, plan)                 the name of the kernel, shown by `dq.explain`
    emulated(op, plan)              optional: whether activations are rounded as a kernel would and then multiplied in
                                    floating point; a backend without it never does that
    weight_only(op, plan)           optional: whether activations that the plan rounds are left in floating point
    rank(op, plan, device)          optional: RANK where it depends on them
    rerounded(op, plan)             optional: least rows of which the backend multiplies `reference.rerounded` weights,
                                    within a known bound of the layer's own; None where it never does
    build(op, plan, conv)           -> run(x, tensors) -> y; everything constant is resolved here, so that the returned
                                    callable is plain tensor code that `torch.compile` can trace
    build_gelu(plan)                optional: the same for a linear followed by a tanh GELU, None when it has none
    lay(tensors), restore(tensors)  optional: weight and scale in the order that its kernels read, told by more than
                                    two dimensions, no byte more; and back. `run` takes both; a layer that it serves
                                    keeps them so, in the same Parameters
Ops: "linear" x (..., in) -> (..., out); "conv" x (batch, in, *space) -> (batch, out, *space), batch always present.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from dq.errors import DQError, nearest
from dq.plan import LayerPlan


class Tensors(NamedTuple):
    """The tensors of one packed layer, as a kernel sees them.

    weight        int8 (rows, bytes), packed codes in the format's canonical layout
    scale         fp32 or int8 (rows | 1, scales), parts side by side; int8 multipliers under two-level granularities
    zero          as scale, affine integer formats only
    scale_global  fp32 (parts,) of nvfp4, (rows, parts) under two-level granularities
    bias          (out,) or None
    act_scale     fp32 (parts,): the stored activation scales of the running step, None when dynamic
    down, up      (rank, columns) and (out, rank): low-rank branch, None without one
    table         int8 (rows | 1, parts * table_width): what codes stand for, parts side by side; formats with tables
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    scale_global: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    act_scale: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    table: torch.Tensor | None = None


class Conv(NamedTuple):
    """Geometry of a convolution with zero padding; every field has one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


Refusals = tuple[tuple[str, str], ...]  # (backend, reason)


@dataclass(frozen=True)
class Choice:
    """The kernel of one layer.

    emulated     the arithmetic is not the format's own: no time of it says anything about the format
    weight_only  the plan rounds activations, this leaves them in floating point
    refusals     (backend, reason) of each preferred backend that said no, of wrong ones and of those that were slower
    gelu         as `build_gelu` gives it
    lays         whether it reads weights that lie in an order of its own
    ms           of the layer, None when it was not measured
    full_ms      of the full-precision layer in the same dtype, beside it
    unmeasured   why ranks decided, "" where measurements did or nobody asked for them
    """

    backend: str
    label: str
    emulated: bool
    run: Callable[[torch.Tensor, Tensors], torch.Tensor]
    refusals: Refusals
    gelu: Callable[[torch.Tensor, Tensors], torch.Tensor] | None = None
    ms: float | None = None
    full_ms: float | None = None
    unmeasured: str = ""
    weight_only: bool = False
    lays: bool = False

    @property
    def speedup(self) -> float | None:
        """Milliseconds of the full-precision layer over those of this one; None when not measured."""
        return None if self.ms is None or self.full_ms is None else self.full_ms / self.ms


@dataclass(frozen=True)
class Machine:
    """What backends ask of a machine before they accept a layer; everything that dq can use is installed on it.

    gpu    architecture of its GPU as `architecture` names it, "" without one
    cpu    why dq's CPU kernels do not run there, None where they do
    vnni   whether its processor has the instructions behind torch's int8 product
    level  of dq's CPU kernels, where they run: LEVELS of dq/kernels/cpu/library.py
    """

    gpu: str = ""
    cpu: str | None = None
    vnni: bool = True
    level: str = "avx512"


_imagined: ContextVar[Machine | None] = ContextVar("machine", default=None)


@contextmanager
def imagined(machine: Machine) -> Iterator[None]:
    """Let `chosen` and every `why_not` answer for a machine that is not there. Nothing can be run meanwhile."""
    token = _imagined.set(machine)
    try:
        yield
    finally:
        _imagined.reset(token)


def machine() -> Machine | None:
    """The machine that is asked about, None for the one at hand."""
    return _imagined.get()


def placed(device: torch.device | str) -> torch.device:
    """A device with its index: layers on two cards of one process are served each by what its own card has."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Inside, a card is the current one: backends that are asked, tiles, launches and times are about it."""
    if device.type == "cuda" and machine() is None and torch.cuda.is_available():
        with torch.cuda.device(device):
            yield
    else:
        yield


def architecture() -> str:
    """Of the current GPU (`current`): "sm_90", of AMD's "gfx942"; "" without a GPU."""
    asked = machine()
    if asked is not None:
        return asked.gpu
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def vnni() -> bool:
    """Whether the processor has the instructions behind torch's int8 product; hidden by DQ_CPU_LEVEL=none and avx2."""
    asked = machine()
    if asked is not None:
        return asked.vnni
    return torch.cpu._is_vnni_supported() and os.environ.get("DQ_CPU_LEVEL") not in ("none", "avx2")


def bf16() -> bool:
    """Whether the processor multiplies bf16; hidden by every DQ_CPU_LEVEL below avx512. Without, fp32 is faster."""
    if (os.environ.get("DQ_CPU_LEVEL") or "avx512") != "avx512":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # oneDNN calls it supported where AVX512 emulates it
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def backends() -> dict[str, ModuleType]:
    """Backend modules by name, preferred first."""
    modules = {
        item.name: importlib.import_module(f"{__name__}.{item.name}") for item in pkgutil.iter_modules(__path__)
    }
    found = {name: module for name, module in modules.items() if hasattr(module, "RANK")}
    return dict(sorted(found.items(), key=lambda item: item[1].RANK))


_selected = "auto"  # of layers whose model has no backend of its own


def select(name: str) -> None:
    """The default that `choose` keeps to ("auto": the best backend). Raises DQError for unknown names."""
    global _selected
    _selected = known(name)


def known(name: str) -> str:
    """The name itself, if it is "auto" or a backend's. Raises DQError for others."""
    names = ("auto", *backends())
    if name not in names:
        raise DQError(f"backend {name!r} is unknown, {nearest(name, names)}")
    return name


def selected() -> str:
    """The default backend, or "auto"."""
    return _selected


def asked(
    op: str, plan: LayerPlan, device: str, conv: Conv | None = None, backend: str | None = None
) -> dict[str, str | None]:
    """What every backend says of a layer, preferred first: None to run it, else why not. Arguments as of `choose`."""
    wanted = backend or _selected
    other = f"backend {wanted!r} was selected with dq.set_backend"
    return {
        name: module.why_not(op, plan, device, conv) if wanted in ("auto", name) or name == "reference" else other
        for name, module in sorted(backends().items(), key=lambda item: _rank(item[1], op, plan, device))
    }


def _rank(module: ModuleType, op: str, plan: LayerPlan, device: str) -> int:
    return module.rank(op, plan, device) if hasattr(module, "rank") else module.RANK


def chosen(
    op: str, plan: LayerPlan, device: str, conv: Conv | None = None, backend: str | None = None
) -> tuple[str, Refusals]:
    """The backend preferred by rank, and what each one preferred to it said. Arguments as of `choose`."""
    said = asked(op, plan, device, conv, backend)
    name = next(name for name, reason in said.items() if reason is None)  # reference accepts every layer
    return name, tuple((other, reason) for other, reason in said.items() if reason)[: list(said).index(name)]


def emulates(backend: str, op: str, plan: LayerPlan) -> bool:
    """Whether a backend rounds the layer's activations and multiplies in floating point all the same."""
    module = backends()[backend]
    return hasattr(module, "emulated") and module.emulated(op, plan)


def leaves_floating(backend: str, op: str, plan: LayerPlan) -> bool:
    """Whether a backend leaves activations in floating point that the plan rounds."""
    module = backends()[backend]
    return hasattr(module, "weight_only") and module.weight_only(op, plan)


def with_rounding(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str:
    """The backend preferred by rank among those that round the activations a plan rounds, natively or emulated."""
    said = asked(op, plan, device, conv, "auto")
    return next(name for name, reason in said.items() if reason is None and not leaves_floating(name, op, plan))


def choose(op: str, plan: LayerPlan, device: str, conv: Conv | None = None, backend: str | None = None) -> Choice:
    """The backend preferred by rank that accepts the layer on a device type ("cpu", "cuda", "meta").

    backend  the only one to take, "auto" for any; None: the process's default
    A wanted backend that refuses falls back to `reference`; the refusal stays visible in the choice.
    """
    return built(*chosen(op, plan, device, conv, backend), op, plan, conv)


def built(name: str, refusals: Refusals, op: str, plan: LayerPlan, conv: Conv | None) -> Choice:
    """The choice of a backend by name."""
    module = backends()[name]
    gelu = module.build_gelu(plan) if op == "linear" and hasattr(module, "build_gelu") else None
    run = module.build(op, plan, conv)
    lays = hasattr(module, "lay")
    found = Choice(name, module.label(op, plan), emulates(name, op, plan), run, refusals, gelu, lays=lays)
    return replace(found, weight_only=leaves_floating(name, op, plan))


def laid(name: str, tensors: Tensors) -> Tensors:
    """A layer's tensors in the order that a backend reads; as they are where it reads dq's own."""
    module = backends()[name]
    return module.lay(tensors) if hasattr(module, "lay") else tensors


def is_laid(tensors: Tensors) -> bool:
    """Whether a backend laid them: their shapes tell it, wherever they were copied or moved to."""
    return tensors.weight.dim() > 2 or tensors.scale.dim() > 2


def restored(tensors: Tensors) -> Tensors:
    """A layer's tensors in dq's own order, rows and columns."""
    for module in backends().values():
        if is_laid(tensors) and hasattr(module, "restore"):
            tensors = module.restore(tensors)
    return tensors
