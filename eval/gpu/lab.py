"""The kernels of this folder next to the truth; `eval.gpu.checks` runs them with those of dq."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.formats import get
from dq.kernels.triton import configs
from dq.kernels.triton.ops import E4M3, Codes
from dq.layers import hadamard
from eval.gpu import launches
from eval.gpu.tiles import Problem, far, poisoned, positive, real, shapes, whole


def checks() -> Iterator[tuple[str, str, Callable[..., str], object]]:
    """(what, matrix unit, check, its arguments but the device)."""
    yield "adaln_quant", "", check_adaln
    yield "had_quant", "", check_hadamard
    yield "gelu_quant", "", check_gelu
    for name in ("gemm_branch", "gemm_tma_branch"):
        for config in configs.candidates(name, configs.architecture()):
            for shape in shapes(name, config):
                for operands in ("int8", "fp8"):
                    p = (name, config, shape, operands)
                    yield f"gated {Problem(*p, '')}", operands, check_gate, p


def near(found: Codes, truth: Tensor) -> str:
    """Codes within one of those of the truth and equal in all but a few places, scales to fp32 accuracy."""
    expected = get("int8").encode(truth, "token")
    off = (found.q[:, : truth.shape[1]].int() - expected.codes.int()).abs()
    share = (off > 0).float().mean()
    if off.max() > 1 or share >= 0.01:
        return f"codes differ by up to {off.max()}, in {share:.2%}"
    scale = (found.scale / expected.scale - 1).abs().max()
    return "" if scale < 1e-4 else f"scales are off by {scale:.3g}"


def randn(device: str, *shape: int) -> Tensor:
    make = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, device=device, generator=make).bfloat16()


def check_adaln(device: str) -> str:
    x, (scale, shift) = randn(device, 70, 3072), randn(device, 2, 2, 3072)
    each = [part.float().repeat_interleave(35, 0) for part in (scale, shift)]
    truth = F.layer_norm(x.float(), (3072,), eps=1e-6) * (1 + each[0]) + each[1]
    with poisoned():
        return near(launches.adaln_quant(x, launches.Norm(), launches.Modulation(scale, shift, 35)), truth)


def check_hadamard(device: str) -> str:
    x, matrix = randn(device, 300, 1024), hadamard.hadamard(128).to(device)
    with poisoned():
        found = launches.had_quant(x, (matrix * 128**0.5).round())
    return near(found, hadamard.rotate(x.float(), 128, matrix=matrix))


def check_gelu(device: str) -> str:
    x = randn(device, 300, 1024)
    with poisoned():
        return near(launches.gelu_quant(x, shift=0.17), F.gelu(x.float(), approximate="tanh") + 0.17)


def check_gate(about: tuple, device: str) -> str:
    """Sums of whole numbers, gate and residual to a unit of the last place; see `eval.gpu.tiles`."""
    p = Problem(*about, device)
    (m, n, k), bound = p.shape, 3 if p.operands == "fp8" else 127
    q, w = whole(p, m, k, -bound, bound), whole(p, n, k, -bound, bound)
    sums, kind, tokens = q.double() @ w.double().t(), E4M3 if p.operands == "fp8" else torch.int8, -(-m // 3)
    x, y = Codes(q.to(kind), positive(p, m)), Codes(w.to(kind), positive(p, n) / sums.std().float())
    bias, gate, residual = (real(p, *shape).bfloat16() for shape in ((n,), (3, n), (m, n)))
    plain = sums * x.scale[:, None].double() * y.scale.double() + bias.double()
    truth = residual.double() + gate.double().repeat_interleave(tokens, 0)[:m] * plain
    end = launches.Gate(gate, residual, tokens)
    with poisoned():
        found = launches.gated_gemm(x, y, bias, end, "tma" in p.kernel, p.config)
    return far(found, truth, 1)
