"""fp8 linears through `torch._scaled_mm` with one scale a row of either operand.

    y[m, n] = (sum_k q[m, k] w[n, k]) * sx[m] * sw[n] + bias[n] + (x down^T) up^T        q, w e4m3, sums in fp32

In eager mode one Triton kernel rounds the rows where Triton runs, else a few of torch's; under `torch.compile` in
aten, which is fused into what comes before. `use_fast_accum`, with which Hopper keeps 14 bits, stays off.
The product leaves in bf16, the dtype that every library behind `_scaled_mm` has for scales by rows; a bias goes in
with a bf16 layer and is added afterwards in the others. Under autograd a layer whose input needs gradients runs
`dense`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from dq import kernels
from dq.kernels import Conv, Tensors, dense, rows, triton
from dq.plan import LayerPlan, TensorPlan

RANK = 25
STATUS = "experimental"  # no GPU was at hand
FP8_SINCE = 89  # compute capability of the first NVIDIA GPUs with fp8 units
FP8_AMD = ("gfx950", "gfx1200", "gfx1201")  # whose e4m3 is NVIDIA's; gfx942 has one of its own
ROWS = LayerPlan("linear", (16, 16), TensorPlan("fp8", "channel"), TensorPlan("fp8", "token"))
E4M3 = torch.float8_e4m3fn


def why_not(op: str, plan: LayerPlan, device: str, conv: Conv | None = None) -> str | None:
    """None when the product here runs the layer on `device`; else why not, in one line."""
    if plan.act is None:
        return "weight-only: activations stay in floating point"
    if not plan.act.format == plan.weight.format == "fp8":
        return f"torch has no scaled product of {plan.weight.format} x {plan.act.format}"
    if op != "linear" or device != "cuda":
        return f"torch's fp8 matrix product is for linears on CUDA, this is a {op} on {device}"
    arch = kernels.architecture()
    if arch.startswith("sm_") and int(arch[3:]) < FP8_SINCE:
        return "fp8 tensor cores need compute capability 8.9"
    if arch.startswith("gfx") and arch not in FP8_AMD:
        return f"{arch} has no units for this fp8 (e4m3fn)"
    if plan.shape[0] % 16 or plan.shape[1] % 16 or plan.splits or plan.act.scale != "dynamic":
        return f"_scaled_mm needs both sizes in multiples of 16 and one dynamic scale per row, got {plan.shape}"
    if plan.act.shift:
        return "_scaled_mm takes activations without a shift"
    return None if plan.weight.granularity == "channel" else "_scaled_mm needs one weight scale per output channel"


def label(op: str, plan: LayerPlan) -> str:
    return "torch._scaled_mm fp8 x fp8"


def build(op: str, plan: LayerPlan, conv: Conv | None) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    """See `dq.kernels`."""
    outputs, columns = plan.shape
    differentiable = dense.build(op, plan, conv)

    def run(x: torch.Tensor, t: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return differentiable(x, t)
        q, scale = rounded(x.reshape(-1, columns))
        y = product(q, scale, t, x.dtype).reshape(*x.shape[:-1], outputs)
        return y if t.down is None else y + dense.low_rank(x, t, plan, conv)

    return run


def product(q: torch.Tensor, scale: torch.Tensor, t: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """q (rows, K) e4m3, scale (rows, 1) fp32 -> y (rows, N) in `dtype`, bias added."""
    weight, sides = t.weight.view(E4M3).t(), {"scale_a": scale, "scale_b": t.scale.reshape(1, -1)}
    inside = t.bias is not None and dtype is torch.bfloat16
    bias = t.bias.to(dtype) if inside else None  # pyright: ignore[reportOptionalMemberAccess]
    y = torch._scaled_mm(q, weight, **sides, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False).to(dtype)
    return y if inside or t.bias is None else y + t.bias.to(dtype)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, K) -> e4m3 codes (rows, K), fp32 scales (rows, 1): max(absmax / 448, SCALE_FLOOR)."""
    if not torch.compiler.is_compiling() and _in_one_kernel(x.device):
        from dq.kernels.triton import ops

        codes = ops.quant_rows(x, ops.RowFormat(top=ops.FP8_TOP))
        return codes.q, codes.scale.reshape(-1, 1)
    return rows.e4m3(x)


@cache
def _in_one_kernel(device: torch.device) -> bool:
    """Whether Triton rounds rows on a device; its product need not run there."""
    with kernels.current(device):
        return triton.why_not("linear", ROWS, device.type) is None
