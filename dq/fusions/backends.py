"""Attention planned in int8 on GPUs: the fastest of diffusers' attention backends that a card and a call allow.

diffusers' processors carry the name of a backend, and `dispatch_attention_fn` calls what is registered under it. dq
registers an entry of its own there, which asks in every call: the libraries raise for masks, dtypes and heads that
they do not take, and models go from card to card. `set_attention_backend` would also set all other models of the
process. Only processors that name no backend are given the entry; whatever the user sets, before or after, stays.

Which library serves which card is what others measured: none of it was timed by dq on a card. Each is held next to
torch's attention once on a card before it serves there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dq import kernels

NATIVE = "native"
CUDNN, FLASH = "_native_cudnn", "_flash_3"
# what the cards run, fastest first, by int8 products (sage) or 16-bit ones on units of their own
_SAGE, _HOPPER, _BLACKWELL = ("sage", "sage_hub"), (FLASH, CUDNN, "_flash_3_hub"), (CUDNN,)
CARDS = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), _SAGE),
    **dict.fromkeys(("sm_100", "sm_103"), _BLACKWELL),
    "sm_90": _HOPPER,
}
LARGEST_HEAD = {"sage": 128, "sage_hub": 128, FLASH: 256, "_flash_3_hub": 256, CUDNN: 128}
OWN = {None: "dq", "auto": "dq_auto", "reference": "dq_reference"}  # by the backend set for a model alone
TOLERANCE = 0.1  # relative; int8 queries and keys leave 1 to 3 %
_served: dict[int, tuple[str, tuple[str, ...]]] = {}  # by index of the card


def attach(model: nn.Module) -> None:
    """Let the processors of a model that name no backend use `choose`'s, wherever they run. Undone by `detach`."""
    for processor in _processors(model):
        if processor._attention_backend is None:
            processor._attention_backend = entry(None)


def detach(model: nn.Module) -> None:
    """Take dq's entry away from processors that still have it."""
    for processor in _processors(model):
        if _is_own(processor):
            processor._attention_backend = None


def set_backend(model: nn.Module, name: str) -> None:
    """Tell processors with dq's entry the backend that was set for their model: under "reference" torch serves."""
    for processor in _processors(model):
        if _is_own(processor):
            processor._attention_backend = entry("reference" if name == "reference" else "auto")


def attached(module: nn.Module) -> bool:
    """Whether a module's processor has dq's entry."""
    return _is_own(getattr(module, "processor", None))


def choose(device: torch.device | str) -> tuple[str, tuple[str, ...]]:
    """(diffusers' name of the backend that serves a card, why none of the faster ones does)."""
    device = kernels.placed(device)
    if kernels.machine() is not None:
        return _choose(device)
    index = device.index or 0
    if index not in _served:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return NATIVE, ("nothing is tried while a graph is captured",)
        _served[index] = _choose(device)
    return _served[index]


def lines(model: nn.Module, places: set[str]) -> list[str]:
    """Lines for `dq.explain` of a model on such devices: what serves its attention, and why nothing faster does."""
    found: Counter[Any] = Counter(map(_name, _processors(model)))
    owned = {name: found.pop(name, 0) for name in OWN.values()}
    told = [
        f"attention runs on diffusers' {name!r} in {n} modules, as was set for them"
        for name, n in found.items()
        if name
    ]
    serving = owned["dq_auto"] + owned["dq"] * (kernels.selected() != "reference")
    if "cuda" not in places or not any(owned.values()):
        return told
    if not serving:
        return [*told, "attention is torch's: backend 'reference' was selected with dq.set_backend"]
    name, reasons = choose("cuda")
    if name != NATIVE:
        calls = "calls with masks, dropout, gradients or heads that it does not take stay torch's"
        told.append(f"attention runs on diffusers' {name!r} in {serving} modules, not measured here; {calls}")
    else:
        told.append(f"attention is torch's in {serving} modules")
    return told + [f"attention does not run on {reason}" for reason in reasons]


@cache
def entry(backend: str | None) -> Any:
    """dq's name among diffusers' attention backends, registered when first asked for.

    backend  the one that was set for the model alone: None, "auto" or "reference"
    """
    from diffusers.models import attention_dispatch as dispatch

    value = OWN[backend]
    made: Any = str.__new__(dispatch.AttentionBackendName, value)  # the Enum is closed, its registry is not
    made._name_, made._value_ = value.upper(), value
    made.__reduce_ex__ = lambda protocol: (entry, (backend,))  # registered where it is read from a pickle, too
    dispatch.AttentionBackendName._value2member_map_[value] = made
    dispatch._AttentionBackendRegistry.register(made, supports_context_parallel=True)(partial(_attend, backend))
    return made


def _attend(
    backend: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """What `dispatch_attention_fn` calls. query (batch, rows, heads, channels), key and value alike; -> as query."""
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    given: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    given |= {"enable_gqa": enable_gqa, "return_lse": return_lse, "_parallel_config": _parallel_config}
    name = registry._active_backend  # of everything that names none: "native", unless the user set another one
    serves = (backend or kernels.selected()) != "reference" and query.device.type == "cuda"
    plain = attn_mask is None and not dropout_p and not return_lse and _parallel_config is None
    if name == NATIVE and serves and plain:
        wanted = _constant(query.device.index or 0)
        if takes(wanted, query, key, value):
            name = dispatch.AttentionBackendName(wanted)
    accepted = registry._supported_arg_names[name]
    return registry._backends[name](query, key, value, **{k: v for k, v in given.items() if k in accepted})


@torch.compiler.assume_constant_result
def _constant(index: int) -> str:
    """The name of what serves a card, settled outside of traced code."""
    return choose(torch.device("cuda", index))[0]


def takes(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a backend computes attention of such tensors, without a mask; of what each says about itself."""
    if name == NATIVE or query.dtype not in (torch.bfloat16, torch.float16):
        return name == NATIVE
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return False
    size = query.shape[-1]
    alike = key.dtype == value.dtype == query.dtype and key.shape == value.shape and key.shape[-1] == size
    fits = size <= LARGEST_HEAD[name] and size % 8 == 0 and key.shape[-2] == query.shape[-2]
    return alike and fits and query.shape[1] > 1 and key.shape[1] > 1  # cuDNN refuses one row


def _choose(device: torch.device) -> tuple[str, tuple[str, ...]]:
    with kernels.current(device):
        arch = kernels.architecture()
        if arch not in CARDS:
            return NATIVE, (f"any other backend: none is known to be faster on {arch or 'no GPU'}",)
        reasons: list[str] = []
        for name in CARDS[arch]:
            reason = why_not(name) or _wrong(name, device)
            if reason is None:
                return name, tuple(reasons)
            reasons.append(f"diffusers' {name!r}: {reason}")
        return NATIVE, tuple(reasons)


def why_not(name: str) -> str | None:
    """Why one of diffusers' backends is not there, in one line; None when it is. A kernel of the Hub is loaded."""
    from diffusers.models import attention_dispatch as dispatch

    member = dispatch.AttentionBackendName(name)
    if name == CUDNN and kernels.machine() is None:
        there = torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
        return None if there else "cuDNN is missing or disabled in torch"
    if member in dispatch._HUB_KERNELS_REGISTRY and not dispatch.DIFFUSERS_TRUST_REMOTE_KERNELS:
        return "it is code from the Hub; set DIFFUSERS_TRUST_REMOTE_KERNELS=true to allow it"
    try:
        dispatch._check_attention_backend_requirements(member)
        if kernels.machine() is None:
            dispatch._maybe_download_kernel_for_backend(member)
    except Exception as error:  # no package, no build for this torch, no network: torch's attention serves
        return " ".join(str(error).split())[:160]
    return None


def _wrong(name: str, device: torch.device) -> str | None:
    """Why a backend is not used on a card although it is there: it raises, or its result is not torch's."""
    if kernels.machine() is not None:
        return None
    from diffusers.models import attention_dispatch as dispatch

    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, 256, 2, 64, generator=draw).to(device, torch.bfloat16) for _ in range(3)]
    try:
        with torch.no_grad():
            run = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName(name)]
            query, key, value = (part.transpose(1, 2).float() for part in heads)
            right = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            error = ((run(*heads).float() - right).norm() / right.norm()).item()
    except Exception as error:  # a wheel for other cards, say
        return f"it raised {' '.join(str(error).split())[:120] or type(error).__name__}"
    return None if error <= TOLERANCE else f"its result is {error:.0%} away from torch's"


def _processors(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            yield processor


def _name(processor: Any) -> str | None:
    named = processor._attention_backend
    return None if named is None else str(getattr(named, "value", named))


def _is_own(processor: Any) -> bool:
    return hasattr(processor, "_attention_backend") and _name(processor) in OWN.values()
