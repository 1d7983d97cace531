"""The kernels of `eval.gpu`, on tiny shapes in Triton's interpreter (see `tests.kernels.interpreted`)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.language")

import torch
import torch.nn.functional as F

from dq.errors import DQError
from dq.kernels.triton import ops
from dq.kernels.triton.ops import Codes
from dq.layers import hadamard
from eval.gpu import block, launches
from eval.gpu.launches import Gate, Modulation, Norm, Rotation
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
@pytest.mark.parametrize("single, form, attention, most", [(True, "int8", "int8", 0.03), (False, "fp8", "fp8", 0.08)])
def test_the_fused_block_is_the_block(single, form, attention, most):
    size = block.Size(heads=2, head=16, picture=30, text=9, device="cpu")
    torch.manual_seed(0)
    model = block.Block(size, single)
    for stream in model.streams:
        stream.modulation.mul_(10)  # what a block adds should stand out from the rounding of what it adds it to
    x = randn(size.tokens, size.width, dtype=torch.bfloat16)
    truth, ours = model.float()(x.float()) - x.float(), block.Fused(model.bfloat16(), form, attention)(x).float()
    error = (ours - x.float() - truth).norm() / truth.norm()
    assert error < most


# --- attention -------------------------------------------------------------------------------------------------------


def rope(x, rotation):
    """x (B, L, H, D)."""
    cos, sin, half = rotation
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("size, half", [(16, False), (24, True)])
def test_heads_are_normed_rotated_and_rounded(size, half):
    batch, tokens, heads = 2, 37, 3
    qkv = randn(batch, tokens, 3 * heads * size, dtype=torch.bfloat16)
    x = qkv[..., heads * size : 2 * heads * size].unflatten(-1, (heads, size))
    weight, angle = randn(size, seed=1) + 1, randn(tokens, size, seed=2)
    how = {"weight": weight, "rotation": Rotation(angle.cos(), angle.sin(), half)}
    truth = rope(F.rms_norm(x.float(), (size,), weight, 1e-6), how["rotation"])
    mean = launches.k_mean(x, **how)
    torch.testing.assert_close(mean, truth.mean(1).reshape(-1, size), rtol=1e-4, atol=1e-5)
    q, s, *_ = launches.qk_norm_rope_quant(x, mean=mean, factor=0.5, **how)
    rows = (truth - mean.reshape(batch, 1, heads, size)).transpose(1, 2).reshape(-1, size)
    near(Codes(q.reshape(-1, size), 2 * s.reshape(-1, 1)), rows)


class Launched:
    """In place of a kernel: keeps its grids and last arguments."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: setattr(self, "args", args)


def test_more_heads_than_an_axis_of_a_grid_has(monkeypatch):
    """Temporal attention of a video: a batch entry a pixel. Axes but the first end at 65535."""
    batch, heads, tokens, size = 9000, 8, 3, 32
    x = torch.zeros(batch, tokens, heads, size, dtype=torch.bfloat16)
    codes = Codes(torch.zeros(batch * heads, tokens, size, dtype=torch.int8), torch.ones(batch * heads, tokens))
    calls = {
        "qk_norm_rope_quant": lambda: launches.qk_norm_rope_quant(x),
        "k_sums": lambda: launches.k_mean(x),
        "v_fp8": lambda: launches.v_fp8(x),
        "attn_i8": lambda: launches.attn_i8(codes, codes, codes.q.half(), heads, torch.bfloat16),
    }
    for name, call in calls.items():
        kernel = Launched()
        monkeypatch.setattr(launches.attention, name, kernel)
        call()
        assert [grid[1] for grid in kernel.grids] == [65528, 6472], name


def test_heads_of_several_launches_are_those_of_one(monkeypatch):
    monkeypatch.setattr(launches, "LONGEST_AXIS", 4)
    test_attention_is_near_torchs(5, 24, 40, 70, False)
    test_attention_is_near_torchs(5, 16, 40, 3, True)
    test_heads_are_normed_rotated_and_rounded(24, True)


def test_heads_narrower_than_a_product_are_padded_and_wide_ones_refused(monkeypatch):
    kernel = Launched()
    monkeypatch.setattr(launches.attention, "attn_i8", kernel)
    for size in (16, 24, 128):
        codes = Codes(torch.zeros(2, 3, size, dtype=torch.int8), torch.ones(2, 3))
        launches.attn_i8(codes, codes, codes.q.half(), 2, torch.bfloat16)
        numbers = [value for value in kernel.args if isinstance(value, int)]  # ..., D, BD, BM, BN, PV8
        assert numbers[-5:-3] == [size, max(size, 32)], "8-bit products sum at least 32 columns"
    codes = Codes(torch.zeros(2, 3, 256, dtype=torch.int8), torch.ones(2, 3))
    with pytest.raises(DQError, match="heads have 256 channels, at most 128 fit"):
        launches.attn_i8(codes, codes, codes.q.half(), 2, torch.bfloat16)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("batch, size, tokens, keys", [(1, 24, 140, 70), (2, 16, 1, 3)])
def test_attention_is_near_torchs(batch, size, tokens, keys, eight):
    heads = 2
    x = randn(batch, tokens, heads, size, dtype=torch.bfloat16)
    k, v = (randn(batch, keys, heads, size, seed=i, dtype=torch.bfloat16) + 0.5 for i in (1, 2))
    q8 = launches.qk_norm_rope_quant(x, factor=1.4426950408889634 * size**-0.5)
    k8 = launches.qk_norm_rope_quant(k, mean=launches.k_mean(k))
    values = launches.v_fp8(v) if eight else v.transpose(1, 2).reshape(-1, keys, size).half()
    o = launches.attn_i8(q8, k8, values, heads, torch.bfloat16)
    truth = F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (x, k, v))).transpose(1, 2)
    error = (o.float() - truth).norm() / truth.norm()
    assert o.shape == truth.shape and error < (0.04 if eight else 0.02)
