"""The kernels of `eval.gpu`, on tiny shapes in Triton's interpreter (see `tests.kernels.interpreted`)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.language")

import torch
import torch.nn.functional as F

from dq.kernels.triton import ops
from dq.kernels.triton.ops import Codes
from dq.layers import hadamard
from eval.gpu import block, launches
from eval.gpu.launches import Gate, Modulation, Norm
from eval.gpu.tiles import ulps
from tests.kernels.triton.operands import SMALL, codes, exact, near, positive, randn

pytestmark = pytest.mark.interpreted


# --- quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [None, positive(70) * 3], ids=["plain", "smooth"])
def test_gelu_and_shift_before_the_codes(smooth):
    x = randn(9, 70, spread=2.0, dtype=torch.bfloat16)
    rounded = x if smooth is None else x * smooth.bfloat16()
    truth = F.gelu(rounded.float(), approximate="tanh") + 0.17
    near(launches.gelu_quant(x, smooth=smooth, shift=0.17), truth)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_adaln_quant(rms, affine):
    batch, tokens, k = 3, 5, 72
    x = randn(batch * tokens, k, dtype=torch.bfloat16, spread=2.0) + 1
    scale, shift = randn(batch, 6 * k, seed=1, dtype=torch.bfloat16).chunk(6, 1)[:2]
    weight, bias = (randn(k, seed=2) + 1, randn(k, seed=3)) if affine else (None, None)
    smooth, copy = positive(k), torch.empty_like(x)
    norm = Norm(weight, bias, 1e-6, rms)
    found = launches.adaln_quant(x, norm, Modulation(scale, shift, tokens), smooth=smooth, copy=copy)
    wide = x.float()
    truth = F.rms_norm(wide, (k,), eps=1e-6) if rms else F.layer_norm(wide, (k,), eps=1e-6)
    truth = truth * weight + bias if affine else truth
    scale, shift = (part.float().repeat_interleave(tokens, 0) for part in (scale, shift))
    truth = (truth * (1 + scale) + shift) * smooth
    near(found, truth)
    assert (copy.float() - truth).abs().max() <= truth.abs().max() * 2**-8


def test_adaln_without_modulation_is_a_norm_in_fp8():
    x = randn(6, 48)
    q, s, *_ = launches.adaln_quant(x, Norm(eps=1e-5), Modulation(), fp8=True)
    truth = F.layer_norm(x, (48,))
    assert (q[:, :48].float() * s - truth).abs().max() < truth.abs().max() * 2**-4


@pytest.mark.parametrize("order", [16, 64])
def test_had_quant(order):
    x, smooth = randn(37, 2 * order), positive(2 * order)
    signs = (hadamard.hadamard(order) * order**0.5).round()
    near(launches.had_quant(x, signs, smooth=smooth), hadamard.rotate(x * smooth, order))


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gates_and_residuals_are_within_a_bf16_ulp(with_bias, tma):
    m, n, k, tokens = 50, 40, 64, 17
    x, w = (Codes(codes(size, k, size), positive(size, seed=size) * 0.01) for size in (m, n))
    bias, gate, residual = (randn(*s, seed=2, dtype=torch.bfloat16) for s in ((n,), (3, n), (m, n)))
    truth = exact(x.q, w.q).double() * x.scale[:, None] * w.scale + (bias.double() if with_bias else 0)
    truth = residual.double() + gate.double().repeat_interleave(tokens, 0)[:m] * truth
    y = launches.gated_gemm(x, w, bias if with_bias else None, Gate(gate, residual, tokens), tma, SMALL)
    assert ulps(y, truth) <= 1


def test_gates_of_fp8_products():
    x, w = (Codes(randn(size, 48, seed=size).to(ops.E4M3), positive(size)) for size in (20, 24))
    gate, residual = randn(1, 24, seed=1), randn(20, 24, seed=2)
    truth = residual + gate * ((x.q.double() @ w.q.double().t()) * x.scale[:, None] * w.scale)
    y = launches.gated_gemm(x, w, None, Gate(gate, residual, 20), False, SMALL)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("single, form, most", [(True, "int8", 0.03), (False, "fp8", 0.08)])
def test_the_fused_block_is_the_block(single, form, most):
    size = block.Size(heads=2, head=16, picture=30, text=9, device="cpu")
    torch.manual_seed(0)
    model = block.Block(size, single)
    for stream in model.streams:
        stream.modulation.mul_(10)  # what a block adds should stand out from the rounding of what it adds it to
    x = randn(size.tokens, size.width, dtype=torch.bfloat16)
    truth, ours = model.float()(x.float()) - x.float(), block.Fused(model.bfloat16(), form)(x).float()
    error = (ours - x.float() - truth).norm() / truth.norm()
    assert error < most
