"""Attention modules of a model on dq's kernels, or rounded as a plan says: found by structure, switched at run time.

Every model reaches `F.scaled_dot_product_attention` its own way: through processors, through diffusers' dispatch, or
from its forward. While an attached module runs, a `TorchFunctionMode` stands in for that one function; everything else
passes through. `torch.compile` traces the mode like other code. Nothing is added to parameters, buffers or submodules,
so state dicts, saving, copies and hooks are as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dq import kernels
from dq.attentionplan import INT8, AttentionPlan
from dq.fusions import backends, tiles
from dq.kernels.cpu import attention as cpu
from dq.kernels.cpu import library
from dq.layers import attending, notes, takeover

ROLE = "attention"
PLAIN = AttentionPlan()
SIGNATURE = (  # one op, so that torch.compile need not trace tiles and formats
    "rounded_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale, bool gqa, "
    "str q, str k, str p, str v, str smooth, bool start) -> Tensor"
)


class Instead(TorchFunctionMode):
    """Calls of torch's attention go to `call`, which takes what that takes."""

    def __init__(self, call: Callable):
        super().__init__()
        self.call = call

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.call(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # it calls super(), which torch.compile follows from a method call only
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


def _attend(module: nn.Module, inner: Callable, *args, **kwargs):
    """The role of an attached module (see `takeover`)."""
    own = notes.read(module)
    plan, backend = own.attention or PLAIN, own.backend or kernels.selected()
    if emulated(plan, backend):
        with Instead(partial(_rounded, plan)):
            return inner(*args, **kwargs)
    given = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
    if given is not None and given.device.type != "cpu":  # moved there since: no mode around its calls
        return inner(*args, **kwargs)
    if backend not in ("auto", "cpu"):
        return inner(*args, **kwargs)
    with Instead(partial(cpu.sdpa, int8=plan == INT8)):
        return inner(*args, **kwargs)


def emulated(plan: AttentionPlan, backend: str) -> bool:
    """Whether a plan is computed in tiles of torch: there are kernels for INT8 alone."""
    return plan.rounds and (plan != INT8 or backend == "reference")


def _rounded(
    plan: AttentionPlan,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> torch.Tensor:
    """As the plan says; torch's attention where there is dropout, or a gradient, which rounding has not."""
    given = (query, key, value, attn_mask)
    if dropout_p or (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)):
        return F.scaled_dot_product_attention(*given, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    fields = (plan.q, plan.k, plan.p, plan.v, plan.smooth, plan.start)
    return torch.ops.dq.rounded_attention(*given, is_causal, scale, enable_gqa, *fields)


def _in_tiles(query, key, value, mask, causal: bool, scale: float | None, gqa: bool, *fields) -> torch.Tensor:
    return tiles.attention(AttentionPlan(*fields), query, key, value, mask, 0.0, causal, scale, gqa)


def attach(model: nn.Module, plans: Mapping[str, AttentionPlan] | None = None) -> list[str]:
    """Run the attention of a model as planned, by name of the module; -> names of the modules that can.

    INT8, and floats where nothing is planned, run on dq's CPU kernels; floats are as exact there as torch's attention
    in the dtype of the inputs. Calls that the kernel cannot take, or where torch is faster, are torch's. All other
    plans are emulated, on any device.
    """
    detach(model)
    names = []
    for name, module in attending.modules(model):
        plan, can = (plans or {}).get(name, PLAIN), why_not(module, model) is None
        if plan.rounds or plan.reason or can:
            notes.write(module, attention=plan)
            takeover.take(module, ROLE, _attend)
        if emulated(plan, "auto") or can:
            names.append(name)
    return names


def detach(model: nn.Module) -> None:
    """Undo `attach`; a model that is not attached stays as it is."""
    for module in model.modules():
        takeover.give_back(module, ROLE)
        if notes.read(module).attention is not None:
            notes.write(module, attention=None)


def attached(model: nn.Module) -> dict[str, AttentionPlan]:
    """What every attached module's attention is rounded to, by name; nothing, for that of floats on dq's kernels."""
    kinds = ((name, notes.read(module).attention) for name, module in model.named_modules())
    return {name: kind for name, kind in kinds if kind is not None}


def why_not(*modules: nn.Module) -> str | None:
    """Why attention cannot run on dq's kernels, in one line; None when it can.

    modules  a module, then what it is part of: the first with parameters says where they run; without any, here
    """
    found = next(filter(None, map(places, modules)), {"cpu"})
    return cpu.missing() if "cpu" in found else f"its weights are on {', '.join(sorted(found))}"


def lines(model: nn.Module) -> list[str]:
    """Lines for `dq.explain`: which kernels attention runs on now, why not on dq's, and what is not rounded."""
    kinds, reasons, on_gpu = Counter(), Counter(), "cuda" in places(model)
    rounded, kept = Counter(), []
    for name, module in attending.modules(model):
        own = notes.read(module)
        plan, reason = own.attention, why_not(module, model)
        if plan is not None and plan.reason and not plan.rounds:
            kept.append(f"{name} ({plan.reason})")
        if plan is not None and emulated(plan, own.backend or kernels.selected()):
            rounded[str(plan)] += 1
        elif on_gpu and backends.attached(module):
            continue  # `backends` has lines for these
        elif plan is not None and not reason:
            kinds[plan == INT8] += 1
        else:
            reasons[reason or "dq's was not attached where the model was when it was quantized or loaded"] += 1
    words, on = {False: "as exact as torch's", True: "in int8"}, library.UNITS.get(library.level())
    found = [f"attention is emulated in {count} modules: {said}" for said, count in rounded.items()]
    found += [
        f"attention runs on dq's kernels on {on}: {count} modules {words[int8]}" for int8, count in kinds.items()
    ]
    found += ["attention stays torch's in calls so small that it is faster there"] * bool(kinds)
    found += [f"attention is torch's in {count} modules: {reason}" for reason, count in reasons.items()]
    return found + [f"attention is not rounded in {len(kept)} modules: {', '.join(kept)}"] * bool(kept)


def places(module: nn.Module) -> set[str]:
    """Types of the devices where a module's parameters are, or where accelerate brings them for a call."""
    found = set()
    for part in module.modules():
        brought = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if brought is not None and part._parameters:
            found.add("cuda" if isinstance(brought, int) else torch.device(brought).type)
        else:
            found |= {parameter.device.type for parameter in part.parameters(recurse=False)}
    return found


_ops = torch.library.Library("dq", "FRAGMENT")
_ops.define(SIGNATURE)
_ops.impl("rounded_attention", _in_tiles, "CompositeExplicitAutograd")
torch.library.register_fake(
    "dq::rounded_attention", lambda q, k, v, *rest: q.new_empty((*q.shape[:-1], v.shape[-1])), lib=_ops
)
