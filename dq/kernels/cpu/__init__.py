"""dq's own CPU kernels: int8 and int4 weights on integer dot products, C++ behind a plain C interface.

    y[m, n] = sum_g sx[m, g] sw[n, g] sum_{k in g} (q[m, k] - z[m, g]) w[n, k] + low-rank branch + bias

Rounding of the activations, product, scales, branch and bias are one call. Weights are read from their stored rows and
laid out in cache while they are used (native/panel.h). Under autograd, and for dtypes other than fp32, bf16 and fp16,
a layer runs on `dense`. Integer linears and convolutions run from AVX2 on, the rest from AVX512 with VNNI and bf16 on
(library.py: levels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dq.formats.integer import Integer
from dq.kernels import Conv, Tensors, dense
from dq.kernels.cpu.library import UNITS, level, missing
from dq.plan import LayerPlan

RANK = 20
STATUS = "stable"
MOST_COLUMNS = 65_000  # sums of that many products of 255 x 127 fit 31 bits
THIN = 16  # rows up to which a weight-only linear is bound by reading its weight
NATIVE_BITS = (4, 8)  # other widths are unpacked by torch first


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when a kernel here runs the layer; else why not, in one line."""
    if device != "cpu":
        return f"dq's CPU kernels do not run on {device}"
    weight = plan.weight
    if not _integer(weight.spec):
        return f"dq's CPU kernels multiply symmetric integers, not {weight.format}"
    if plan.splits:
        return "an input split needs one product per part"
    if plan.columns > MOST_COLUMNS:
        return f"sums over {plan.columns} columns may overflow 32 bits"
    if weight.grain.kind == "group" and weight.grain.size % 4:
        return f"groups of {weight.grain.size} columns are no multiple of 4"
    reason = (_why_not_weight_only if plan.act is None else _why_not_integer)(op, plan, conv)
    return reason or missing(_least(op, plan))


def _least(op: str, plan: LayerPlan) -> str:
    """The lowest level that has the layer's kernel."""
    return "avx512" if plan.act is None else "avx2"


def _integer(spec) -> bool:
    return isinstance(spec, Integer) and not spec.affine


def _why_not_weight_only(op: str, plan: LayerPlan, conv: Conv | None) -> str | None:
    if op != "linear" or plan.weight.spec.bits not in NATIVE_BITS or plan.rank:
        return "weight-only: activations stay in floating point"
    return None


def _why_not_integer(op: str, plan: LayerPlan, conv: Conv | None) -> str | None:
    act, weight = plan.act, plan.weight
    assert act is not None
    if not isinstance(act.spec, Integer):
        return f"dq's CPU kernels round activations to integers, not to {act.format}"
    if act.scale != "dynamic" and act.spec.affine:
        return "stored activation scales come without zero points"
    if op == "conv" and act.granularity != "token":
        if weight.grain.kind == "group":
            return "dq's int8 convolution takes one weight scale per output channel, not per group"
        if conv is not None and conv.groups > 1:
            return "a grouped convolution is one small product per group"
        return "a convolution has no fixed activation shift here" if act.shift else None
    if act.grain.kind == "group":
        if act.grain.size % 4:
            return f"groups of {act.grain.size} columns are no multiple of 4"
        if weight.grain.kind == "group" and weight.grain.size != act.grain.size:
            return f"groups of weight ({weight.granularity}) and activations ({act.granularity}) differ"
    return None


def label(op: str, plan: LayerPlan) -> str:
    if plan.act is None:
        return f"dq cpu {plan.weight.format} weight-only up to {THIN} rows, else {dense.label(op, plan)}"
    lower = "" if level() in ("avx512", "none") else f" on {UNITS[level()]}"
    return f"dq cpu {plan.weight.format} x {plan.act.format}{' conv' if op == 'conv' else ''}{lower}"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring of dq.kernels."""
    from dq.kernels.cpu import ops

    plain = dense.build(op, plan, conv)
    if plan.act is None:
        fast = _thin(plan, plain)
    elif op == "linear":
        fast = _linear(plan)
    else:
        assert conv is not None
        fast = _pixelwise(plan, conv) if plan.act.granularity == "token" else _convolution(plan, conv)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if x.dtype not in ops.DTYPES or (torch.is_grad_enabled() and x.requires_grad):
            return plain(x, t)
        return fast(x, t)

    return run


def build_gelu(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor] | None:
    """See the package docstring of dq.kernels; the branch, where it is not fused, would come after the GELU."""
    if plan.act is None or plan.rank % 2:
        return None
    fast, plain = _linear(plan, gelu=True), _linear(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if t.down is not None and x.dtype is not torch.bfloat16:
            return F.gelu(plain(x, t), approximate="tanh")
        return fast(x, t)

    return run


def _codes(plan: LayerPlan) -> tuple[Callable[[Tensors], torch.Tensor], int]:
    """-> codes(tensors) -> the weight the kernel reads, and its bits."""
    spec, columns = plan.weight.spec, plan.columns
    if spec.bits in NATIVE_BITS:
        return lambda t: t.weight, spec.bits
    return lambda t: spec.unpack(t.weight, columns), 8


def _group(grain) -> int:
    return grain.size if grain.kind == "group" else 0


def _matching(value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """In the dtype of x: fp32 models may carry a 16-bit bias, and the other way round."""
    return value if value is None or value.dtype is x.dtype else value.to(x.dtype)


def _act(plan: LayerPlan) -> dict[str, int | bool]:
    """The codes that activations are rounded to, as the ops take them."""
    assert plan.act is not None
    return {"act_bits": plan.act.spec.bits, "act_affine": plan.act.spec.affine}


def _linear(plan: LayerPlan, gelu: bool = False) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    assert plan.act is not None
    codes, bits = _codes(plan)
    groups = {"weight_group": _group(plan.weight.grain), "act_group": _group(plan.act.grain)}
    fixed = {"weight_bits": bits, "shift": plan.act.shift, "gelu": gelu} | groups | _act(plan)
    columns, outputs = plan.columns, plan.shape[0]

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        rows, low, up = x.reshape(-1, columns), None, None
        fused = t.down is not None and t.up is not None and x.dtype is torch.bfloat16 and t.up.shape[1] % 2 == 0
        if fused:
            low, up = F.linear(rows, _matching(t.down, x)), _matching(t.up, x)
        bias = _matching(t.bias, x)
        y = torch.ops.dq.cpu_linear(rows, codes(t), t.scale, act_scale=t.act_scale, bias=bias, low=low, up=up, **fixed)
        y = y.reshape(*x.shape[:-1], outputs)
        return y if t.down is None or fused else y + dense.low_rank(x, t, plan, None)

    return run


def _pixelwise(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """A pointwise convolution is a linear over channels, with one activation scale per pixel.

    Channels that lie apart in memory are read as they are, where one scale serves a row of the weight.
    """
    linear = _linear(plan)
    assert plan.act is not None
    apart = None if _group(plan.weight.grain) or plan.act.shift else _convolution(plan, conv)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if apart is not None and x.is_contiguous():
            return apart(x, t)
        y = linear(x.movedim(1, -1), t).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y  # callers take views of it

    return run


def _convolution(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    codes, bits = _codes(plan)
    fixed = {"weight_bits": bits, "kernel_size": list(plan.shape[2:])} | _act(plan)
    fixed["per_pixel"] = plan.act is not None and plan.act.granularity == "token"
    fixed |= {"stride": list(conv.stride), "padding": list(conv.padding), "dilation": list(conv.dilation)}

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        bias = _matching(t.bias, x)
        y = torch.ops.dq.cpu_conv(x, codes(t), t.scale, act_scale=t.act_scale, bias=bias, **fixed)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return run


def _thin(plan: LayerPlan, plain: Callable) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    fixed = {"weight_bits": plan.weight.spec.bits, "weight_group": _group(plan.weight.grain)}
    columns, outputs = plan.columns, plan.shape[0]

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if x.numel() > THIN * columns:
            return plain(x, t)
        rows, bias = x.reshape(-1, columns), _matching(t.bias, x)
        y = torch.ops.dq.cpu_thin(rows, t.weight, t.scale, bias=bias, **fixed)
        return y.reshape(*x.shape[:-1], outputs)

    return run
