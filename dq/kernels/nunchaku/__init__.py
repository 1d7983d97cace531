"""nunchaku's operators, which diffusers loads through `kernels`: int4 x int4 linears with a branch, on NVIDIA GPUs.

    y = sum_g s_xg s_wg (q_g . w_g) + bias + up (down x),   q = rne(x / s_x),  s_x = absmax of 64 neighbours / 7

They round activations and multiply by `down` in one call, and do all else in a second one (SVDQuant, 2411.05007).
They are for sm_75 to sm_89 and sm_120, symmetric int4 in groups of 64, sizes in multiples of 128 and ranks of 16; sums
over groups are kept in the dtype of x. They are code from the Hub, so the user has to allow them as for diffusers:
DIFFUSERS_TRUST_REMOTE_KERNELS=true. Weights and their scales are laid out in place (`layout`), told by their shapes.
Under autograd, and for inputs that are no bf16 or fp16 (on sm_75: no fp16), layers run on `dense`. Smoothing happens
before, in dq: the operators divide by ones. None of this ran on a card yet; `choice` proves it where it first does.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from dq import kernels
from dq.kernels import Conv, Tensors, dense
from dq.kernels.nunchaku import layout
from dq.plan import LayerPlan

RANK = 25
STATUS = "experimental"  # no GPU was at hand
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")  # that the operators are built for
ALLOWED = "DIFFUSERS_TRUST_REMOTE_KERNELS"
FORM = f"int4/group:{layout.GROUP}"
PADDED = 256  # rows that a block multiplies: what passes between the operators has that many more


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when the operators run the layer on `device`; else why not, in one line."""
    if device != "cuda":
        return f"nunchaku's operators run on NVIDIA GPUs, this is {device}"
    arch = kernels.architecture()
    if arch not in ARCHITECTURES:
        return f"nunchaku's operators are built for {', '.join(ARCHITECTURES)}, this is {arch or 'no GPU'}"
    return _why_not_plan(op, plan) or _missing()


def _why_not_plan(op: str, plan: LayerPlan) -> str | None:
    if op != "linear":
        return "nunchaku has no convolution"
    if str(plan.weight) != FORM or plan.act is None or str(plan.act) != FORM:
        return f"nunchaku's operators take {FORM} x {FORM}, not {plan.weight} x {plan.act or 'floating point'}"
    if plan.splits:
        return "an input split needs one product per part"
    if any(size % layout.BLOCK for size in plan.shape):
        return f"nunchaku's operators take sizes in multiples of {layout.BLOCK}, got {plan.shape}"
    if plan.rank == 0 or plan.rank % layout.TILE:
        return f"nunchaku's operators take branches of a multiple of {layout.TILE} columns, got {plan.rank}"
    return None


def _missing() -> str | None:
    if (os.environ.get(ALLOWED) or "").upper() not in ("1", "ON", "YES", "TRUE"):
        return f"nunchaku's operators are code from the Hub; set {ALLOWED}=true to allow it"
    if kernels.machine() is not None:
        return None
    if find_spec("kernels") is None:
        return "nunchaku's operators need the package kernels (pip install kernels)"
    found = _operators()
    return found if isinstance(found, str) else None


@cache
def _operators() -> Any:
    """The operators, as diffusers loads them; or why there are none. The first time they may be downloaded."""
    try:
        return importlib.import_module("diffusers.quantizers.nunchaku.utils").ops
    except Exception as error:  # no build for this torch, no network, no such diffusers: dq does without
        return f"nunchaku's operators do not load: {' '.join(str(error).split())[:120]}"


def label(op: str, plan: LayerPlan) -> str:
    return "nunchaku-lite int4 x int4, branch fused"


def lay(t: Tensors) -> Tensors:
    """The tensors with weight and scales in the operators' order; those that are in it stay."""
    weight = layout.weight(t.weight) if t.weight.dim() == 2 else t.weight
    return t._replace(weight=weight, scale=layout.scale(t.scale) if t.scale.dim() == 2 else t.scale)


def restore(t: Tensors) -> Tensors:
    """Inverse of `lay`, to the bit."""
    weight = t.weight if t.weight.dim() == 2 else layout.weight_back(t.weight)
    return t._replace(weight=weight, scale=t.scale if t.scale.dim() == 2 else layout.scale_back(t.scale))


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring of dq.kernels."""
    plain, ops = dense.build(op, plan, conv), _operators()
    outputs, inputs = plan.shape
    dtypes = (torch.float16,) if kernels.architecture() == "sm_75" else (torch.float16, torch.bfloat16)
    strengths = [1.0] * (plan.rank // layout.TILE)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if x.dtype not in dtypes or not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
            return plain(x, restore(t))
        t, rows = lay(t), x.reshape(-1, inputs).contiguous()
        assert t.down is not None and t.up is not None
        padded = -(-rows.shape[0] // PADDED) * PADDED
        q = rows.new_empty(padded, inputs // 2, dtype=torch.uint8)
        q_scale = rows.new_empty(inputs // layout.GROUP, padded)
        low = rows.new_empty(padded, plan.rank, dtype=torch.float32)
        down, ones = layout.down(t.down.to(x.dtype)), rows.new_ones(inputs)
        ops.quantize_w4a4_act_fuse_lora(rows, q, q_scale, down, low, ones, False, False)
        y = rows.new_empty(rows.shape[0], outputs)
        scale = t.scale.reshape(-1, outputs).to(x.dtype)
        bias = None if t.bias is None else layout.vector(t.bias.to(x.dtype))
        factors = low, layout.up(t.up.to(x.dtype))
        given = q, t.weight.reshape(outputs, -1), y, None, q_scale, scale, None, None, *factors
        ops.gemm_w4a4(*given, *_NONE[:5], bias, *_NONE[:3], False, strengths, False, False, *_NONE[:5], 0)
        return y.reshape(*x.shape[:-1], outputs)

    return run


_NONE = (None,) * 5  # arguments of other fusions: of the next layer's rounding, of norms, rotary embeddings, attention
