"""dq's own CPU kernels for weights of 2 to 8 bits, symmetric and affine: C++ behind a plain C interface.

    y[m, n] = sum_g sx[m, g] sw[n, g] sum_{k in g} (q[m, k] - z[m, g]) (w[n, k] - zw[n, g]) + low-rank branch + bias

Rounding of the activations, integer product, scales, branch and bias are one call. Weights are read from their packed
rows, laid out in cache while they are used (native/panel.h). Weight-only linears are one call as well, their weights
decoded in cache (native/weightonly.h); weight-only convolutions decode theirs first. Under autograd, and for dtypes
other than fp32, bf16 and fp16, layers run on `dense`. All of it runs from AVX2 on (library.py: levels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from dq.formats.integer import Integer
from dq.formats.offset import Offset
from dq.kernels import Conv, Tensors, dense, reference
from dq.kernels.cpu.library import UNITS, level, missing
from dq.kernels.reference import CONVS
from dq.plan import LayerPlan, TensorPlan

RANK = 20
STATUS = "stable"
MOST_COLUMNS = 65_000  # sums of that many products of 255 x 127 fit 31 bits
# Rows up to which a weight-only linear is one fused product. Measured from 1 to 4096 rows, that is the quicker way on
# every level, except that nobody could try AMX: its tiles do eight times the bf16 products a cycle, so that from about
# this many rows on decoding the weight first, some 40 cycles for 64 of them, must cost less than not using the tiles.
FUSED_ROWS, FUSED_ROWS_AMX = math.inf, 64
CONV_BITS = (4, 8)  # other widths are unpacked by torch before an integer convolution
MULTIPLIER_STEP = 32  # columns that the kernel multiplies by one multiplier at least


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when a kernel here runs the layer; else why not, in one line."""
    if device != "cpu":
        return f"dq's CPU kernels do not run on {device}"
    weight = plan.weight
    if not isinstance(weight.spec, Integer | Offset):
        return f"dq's CPU kernels multiply integers, not {weight.format}"
    if weight.spec.offset and op != "linear":
        return f"{weight.format} has a product for linears alone"
    if plan.splits:
        return "an input split needs one product per part"
    if (weight.grain.size or 0) % 4 and (plan.act is None or not weight.grain.two_level):
        return f"groups of {weight.grain.size} columns are no multiple of 4"
    reason = None if plan.act is None else _why_not_integer(op, plan, conv)
    return reason or missing()


def _why_not_integer(op: str, plan: LayerPlan, conv: Conv | None) -> str | None:
    act, weight = plan.act, plan.weight
    assert act is not None
    if plan.columns > MOST_COLUMNS:
        return f"sums over {plan.columns} columns may overflow 32 bits"
    if not isinstance(act.spec, Integer):
        return f"dq's CPU kernels round activations to integers, not to {act.format}"
    if act.scale != "dynamic" and act.spec.affine:
        return "stored activation scales come without zero points"
    if op == "conv" and act.granularity != "token":
        if _group(weight.grain):
            return "dq's int8 convolution takes one weight scale per output channel, not per group"
        if weight.spec.affine:
            return "dq's int8 convolution takes symmetric weights"
        if conv is not None and conv.groups > 1:
            return "a grouped convolution is one small product per group"
        return "a convolution has no fixed activation shift here" if act.shift else None
    if act.grain.kind == "group":
        if act.grain.size % 4:
            return f"groups of {act.grain.size} columns are no multiple of 4"
        if weight.grain.kind == "group" and weight.grain.size != act.grain.size:  # of multipliers, too
            return f"groups of weight ({weight.granularity}) and activations ({act.granularity}) differ"
    return None


def label(op: str, plan: LayerPlan) -> str:
    lower = "" if level() in ("avx512", "none") else f" on {UNITS[level()]}"
    if plan.act is None:
        what = "weight-only" + ("" if op == "linear" else f" decoded + F.conv{len(plan.shape) - 2}d")
        return f"dq cpu {plan.weight.format} {what}{lower}"
    return f"dq cpu {plan.weight.format} x {plan.act.format}{' conv' if op == 'conv' else ''}{lower}"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See the package docstring of dq.kernels."""
    from dq.kernels.cpu import ops, weightonly  # noqa: F401  defines the ops

    plain = dense.build(op, plan, conv)
    if plan.weight.spec.offset:
        fast = _offset(plan)
    elif plan.act is None:
        fast = _weight_only(plan) if op == "linear" else _decoded(plan, conv)
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
    if plan.weight.spec.offset:
        return None
    if plan.act is None:
        return _weight_only(plan, gelu=True)
    if plan.rank % 2:
        return None
    fast, plain = _linear(plan, gelu=True), _linear(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if t.down is not None and x.dtype is not torch.bfloat16:
            return F.gelu(plain(x, t), approximate="tanh")
        return fast(x, t)

    return run


def _multiplier_group(plan: LayerPlan) -> int:
    """Columns that share a multiplier of two-level scales which the kernel of linears reads, 0 where it reads none."""
    grain = plan.weight.grain
    size = grain.size if grain.two_level else 0
    return size if size and size % MULTIPLIER_STEP == 0 else 0


def _codes(plan: LayerPlan, native: bool) -> tuple[Callable[[Tensors], torch.Tensor], int]:
    """-> codes(tensors) -> the weight the kernel reads, and its bits; bytes, multiplied, where it is not `native`."""
    return (lambda t: t.weight, plan.weight.spec.bits) if native else (reference.row_codes(plan), 8)


def _group(grain) -> int:
    """Columns that share a scale in floating point, 0 for all of a row."""
    return grain.size if grain.kind == "group" and not grain.two_level else 0


def _matching(value: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """In the dtype of x: fp32 models may carry a 16-bit bias, and the other way round."""
    return value if value is None or value.dtype is x.dtype else value.to(x.dtype)


def _act(plan: LayerPlan) -> dict[str, int | bool]:
    """The codes that activations are rounded to, as the ops take them."""
    assert plan.act is not None
    return {"act_bits": plan.act.spec.bits, "act_affine": plan.act.spec.affine}


def _linear(plan: LayerPlan, gelu: bool = False) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    assert plan.act is not None
    multiplied, scale = _multiplier_group(plan), reference.row_scale(plan)
    codes, bits = _codes(plan, native=bool(multiplied) == plan.weight.grain.two_level)
    groups = {"weight_group": _group(plan.weight.grain), "act_group": _group(plan.act.grain)}
    groups["multiplier_group"] = multiplied
    fixed = {"weight_bits": bits, "shift": plan.act.shift, "clip": plan.act.clip, "gelu": gelu} | groups | _act(plan)
    columns, outputs = plan.columns, plan.shape[0]

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        rows, low, up = x.reshape(-1, columns), None, None
        fused = t.down is not None and t.up is not None and x.dtype is torch.bfloat16 and t.up.shape[1] % 2 == 0
        if fused:
            low, up = F.linear(rows, _matching(t.down, x)), _matching(t.up, x)
        given = {"act_scale": t.act_scale, "zero": t.zero, "bias": _matching(t.bias, x), "low": low, "up": up}
        given["multiplier"] = t.scale if multiplied else None
        y = torch.ops.dq.cpu_linear(rows, codes(t), scale(t), **given, **fixed)
        y = y.reshape(*x.shape[:-1], outputs)
        return y if t.down is None or fused else y + dense.low_rank(x, t, plan, None)

    return run


def _offset(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """Integers above a smallest value: the product of the codes, and what a block is worth beyond them.

    y = x (s c)^T + (sums of x over each block) (m + 2^(b-1) s)^T
    """
    form, size = plan.weight.spec, plan.weight.grain.size or plan.columns
    assert isinstance(form, Offset)
    alike = replace(plan, weight=TensorPlan(f"int{form.bits}", plan.weight.granularity))
    product = _weight_only(alike) if plan.act is None else _linear(alike)
    rounded, short = reference.input_rounder(plan, -1), -plan.columns % size

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        y = product(x, t._replace(zero=None))
        given = F.pad(rounded(x.float(), t.act_scale), (0, short))
        sums = given.reshape(*given.shape[:-1], given.shape[-1] // size, size).sum(-1)
        worth = torch.add(t.zero, t.scale, alpha=form.half).expand(plan.rows, -1)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return (y.float() + F.linear(sums, worth)).to(x.dtype)

    return run


def _pixelwise(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """A pointwise convolution is a linear over channels, with one activation scale per pixel.

    Channels that lie apart in memory are read as they are, where one scale serves a row of the weight.
    """
    linear = _linear(plan)
    assert plan.act is not None
    whole = not (_group(plan.weight.grain) or plan.weight.spec.affine or plan.act.shift)
    apart = _convolution(plan, conv) if whole else None

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if apart is not None and x.is_contiguous():
            return apart(x, t)
        y = linear(x.movedim(1, -1), t).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y  # callers take views of it

    return run


def _convolution(plan: LayerPlan, conv: Conv) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    codes, bits = _codes(plan, native=plan.weight.spec.bits in CONV_BITS and not plan.weight.grain.two_level)
    scale = reference.row_scale(plan)
    fixed = {"weight_bits": bits, "kernel_size": list(plan.shape[2:])} | _act(plan)
    fixed["per_pixel"] = plan.act is not None and plan.act.granularity == "token"
    fixed |= {"stride": list(conv.stride), "padding": list(conv.padding), "dilation": list(conv.dilation)}

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        bias = _matching(t.bias, x)
        y = torch.ops.dq.cpu_conv(x, codes(t), scale(t), act_scale=t.act_scale, bias=bias, **fixed)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return run


def _stored(plan: LayerPlan) -> tuple[dict[str, int], Callable[[Tensors], torch.Tensor]]:
    """-> how a weight is packed, as the ops that decode take it, and scale(tensors), an element for a group."""
    spec, size = plan.weight.spec, plan.weight.grain.size or 0
    return {"weight_bits": spec.bits, "weight_group": size}, lambda t: spec.step(t.scale, t.scale_global)


def _weight_only(plan: LayerPlan, gelu: bool = False) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    (fixed, scale), columns, outputs = _stored(plan), plan.columns, plan.shape[0]
    most = FUSED_ROWS_AMX if torch.cpu._is_amx_tile_supported() else FUSED_ROWS
    decoded = _weight(plan)

    def fused(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        rows, low, up = x.reshape(-1, columns), None, None
        if t.down is not None:
            down, up = dense.factors(t, x.dtype)
            low = F.linear(rows, down)
        given = {"zero": t.zero, "bias": _matching(t.bias, x), "low": low, "up": up, "gelu": gelu}
        y = torch.ops.dq.cpu_weight_only(rows, t.weight, scale(t), **given, **fixed)
        return y.reshape(*x.shape[:-1], outputs)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if x.dtype is not torch.bfloat16 or x.numel() <= most * columns:
            return fused(x, t)
        y = F.linear(x, decoded(x, t), _matching(t.bias, x))
        y = y if t.down is None else y + dense.low_rank(x, t, plan, None)
        return F.gelu(y, approximate="tanh") if gelu else y

    return run


def _weight(plan: LayerPlan) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """-> decoded(x, tensors) -> the weight (outputs, columns) in the dtype of x."""
    fixed, scale = _stored(plan)
    columns = plan.columns

    def decoded(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        return torch.ops.dq.cpu_decode(t.weight, scale(t), zero=t.zero, columns=columns, dtype=x.dtype, **fixed)

    return decoded


def _decoded(plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    assert conv is not None
    convolve, decoded = CONVS[len(plan.shape) - 2], _weight(plan)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        y = convolve(x, decoded(x, t).reshape(plan.shape), _matching(t.bias, x), *conv)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return run
