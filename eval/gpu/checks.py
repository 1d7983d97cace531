"""Whether the Triton kernels of a GPU are right: each next to the reference, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

PAIRS = (
    ("int8/channel", "int8/token"), ("int8/channel", "int8a/token"), ("int8a/channel", "int8/token"),
    ("int8/channel", "int8/tensor/static"), ("int4/channel", "int8/token"), ("int4a/channel", "int8/token"),
    ("int4/group:64", "int8/token"), ("int4/group:64", "int4/group:64"), ("int4/group:64", "int4a/group:64"),
    ("fp8/channel", "fp8/token"), ("nvfp4", "nvfp4"), ("int4/group:64", None), ("nvfp4", None), ("mxfp4", None),
)  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def layer(weight: str, act: str | None, m: int, n: int, k: int, rank: int = 0):
    """-> (plan, tensors, x) of a random linear on the GPU."""
    from dq import layers
    from dq.kernels import Tensors
    from dq.plan import LayerPlan, TensorPlan

    plan = LayerPlan("linear", (n, k), TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, rank=rank)
    packed = layers.encode(torch.randn(n, k, device="cuda"), plan)
    down, up = (randn(rank, k) / k**0.5, randn(n, rank)) if rank else (None, None)
    stored = torch.full((1,), 0.02, device="cuda") if act and "static" in act else None
    extra = (packed.get("zero"), packed.get("scale_global"), randn(n), stored, down, up)
    return plan, Tensors(packed["weight"], packed["scale"], *extra), randn(m, k)


def check_all() -> Iterator[tuple[str, str | None]]:
    """(what, None or what is wrong) of every kernel."""
    for weight, act in PAIRS:
        for m, n, k in ((257, 200, 288), (33, 1152, 1024), (1024, 384, 320)):
            yield f"linear {weight} x {act}, {m}x{n}x{k}", told(check_linear, weight, act, m, n, k)
    for tma in (False, True):
        yield f"int8 sums, {'descriptors' if tma else 'pointers'}", told(check_sums, tma)
    yield "adaln_quant", told(check_adaln)
    yield "had_quant", told(check_hadamard)
    yield "gelu_quant", told(check_gelu)
    yield "gated_gemm", told(check_gate)
    for heads in ((2, 3, 200, 64), (1, 2, 333, 72), (1, 2, 256, 128)):
        for eight in (False, True):
            yield f"attention {heads}{', fp8 values' if eight else ''}", told(check_attention, heads, eight)


def told(check: Callable[..., str | None], *args) -> str | None:
    try:
        return check(*args)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def check_linear(weight: str, act: str | None, m: int, n: int, k: int) -> str | None:
    """Within twice the rounding of torch in bf16 on the same rounded operands."""
    from dq.kernels import reference, triton

    plan, t, x = layer(weight, act, m, n, k, rank=16)
    if triton.why_not("linear", plan, "cuda"):
        return None
    truth = reference.build("linear", plan, None)(x.float(), t)
    rounded = reference.input_rounder(plan, -1)(x.float(), t.act_scale).to(x.dtype)
    theirs = F.linear(rounded, reference.weight_decoder(plan)(t).to(x.dtype), t.bias) + F.linear(
        F.linear(x, t.down), t.up
    )
    ours = triton.build("linear", plan, None)(x, t)
    room = 2 * (theirs.float() - truth).abs().max() + 4 * torch.finfo(x.dtype).eps * truth.abs().max()
    error = (ours.float() - truth).abs().max()
    return None if error <= room else f"off by {error:.3g}, at most {room:.3g} expected"


def check_sums(tma: bool) -> str | None:
    """Scales of 1 leave the sums, which fp32 holds exactly up to 2^24."""
    from dq.kernels.triton import configs
    from dq.kernels.triton.ops import Codes, Epilogue, launch_gemm

    if tma and not configs.candidates("gemm_tma", configs.architecture()):
        return None
    q, w = (torch.randint(-127, 128, (size, 512), device="cuda").to(torch.int8) for size in (300, 200))
    sx, sw = (torch.ones(size, device="cuda") for size in (300, 200))
    sums = launch_gemm(Codes(q, sx), Codes(w, sw), Epilogue(torch.float32), tma)
    return None if torch.equal(sums.double(), q.double() @ w.double().t()) else "integer sums differ"


def near(codes, truth: torch.Tensor) -> str | None:
    from dq.formats import get

    expected = get("int8").encode(truth, "token")
    off = (codes.q[:, : truth.shape[1]].int() - expected.codes.int()).abs()
    share = (off > 0).float().mean()
    return None if off.max() <= 1 and share < 0.01 else f"codes differ by up to {off.max()}, in {share:.2%}"


def check_adaln() -> str | None:
    from eval.gpu.launches import Modulation, Norm, adaln_quant

    x, scale, shift = randn(512, 3072), randn(2, 3072), randn(2, 3072)
    each = [part.float().repeat_interleave(256, 0) for part in (scale, shift)]
    truth = F.layer_norm(x.float(), (3072,), eps=1e-6) * (1 + each[0]) + each[1]
    return near(adaln_quant(x, Norm(), Modulation(scale, shift, 256)), truth)


def check_hadamard() -> str | None:
    from dq.layers import hadamard
    from eval.gpu.launches import had_quant

    x, matrix = randn(300, 1024), hadamard.hadamard(128).cuda()
    return near(had_quant(x, (matrix * 128**0.5).round()), hadamard.rotate(x.float(), 128, matrix=matrix))


def check_gelu() -> str | None:
    from eval.gpu.launches import gelu_quant

    x = randn(300, 1024)
    return near(gelu_quant(x, shift=0.17), F.gelu(x.float(), approximate="tanh") + 0.17)


def check_gate() -> str | None:
    """Within twice the last place of bf16 of the largest value."""
    from dq.kernels.triton.ops import Codes
    from eval.gpu.launches import Gate, gated_gemm

    q, w = (torch.randint(-127, 128, (size, 512), device="cuda").to(torch.int8) for size in (300, 200))
    sx, sw = (torch.rand(size, device="cuda") * 1e-3 for size in (300, 200))
    bias, gate, residual = randn(200), randn(3, 200), randn(300, 200)
    plain = (q.double() @ w.double().t()) * sx[:, None] * sw + bias.double()
    truth = residual.double() + gate.double().repeat_interleave(100, 0) * plain
    error = (gated_gemm(Codes(q, sx), Codes(w, sw), bias, Gate(gate, residual, 100)).double() - truth).abs().max()
    room = 2 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    return None if error <= room else f"off by {error:.3g}, at most {room:.3g} expected"


def quantized_heads(q, k, v, eight: bool):
    """-> queries, keys and values as `attn_i8` takes them. q, k, v (B, L, H, D)."""
    from eval.gpu import launches

    size = q.shape[-1]
    q8 = launches.qk_norm_rope_quant(q, factor=1.4426950408889634 * size**-0.5)
    k8 = launches.qk_norm_rope_quant(k, mean=launches.k_mean(k))
    return q8, k8, launches.v_fp8(v) if eight else v.transpose(1, 2).reshape(-1, v.shape[1], size).half()


def check_attention(heads: tuple[int, int, int, int], eight: bool) -> str | None:
    from eval.gpu import launches

    if eight and torch.cuda.get_device_capability() < (8, 9):
        return None
    batch, count, length, size = heads
    q, k, v = (randn(batch, length, count, size) for _ in range(3))
    ours = launches.attn_i8(*quantized_heads(q, k, v, eight), count, torch.bfloat16)
    truth = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    error = ((ours.float() - truth).norm() / truth.norm()).item()
    return None if error < (0.05 if eight else 0.03) else f"relative error {error:.3f}"
