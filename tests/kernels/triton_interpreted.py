"""Every Triton kernel on tiny shapes in Triton's interpreter. `test_triton.py` runs this file in a process of its own,
because triton reads TRITON_INTERPRET when it is imported. pytest does not collect it otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dq import kernels, layers
from dq.formats import get
from dq.kernels import reference
from dq.kernels import triton as backend
from dq.kernels.triton import ops
from dq.layers import hadamard
from eval import gpu_block
from tests.kernels.test_kernels import generator, plan, tensors, truth_and_torch, within_twice_torch

INT8 = get("int8")
SMALL = {"BM": 32, "BN": 32, "BK": 64, "GROUP": 2, "warps": 4, "stages": 2}


def randn(*shape, seed=0, dtype=torch.float32, spread=1.0):
    return (torch.randn(*shape, generator=generator(seed)) * spread).to(dtype)


def codes(rows, k, seed=0, low=-127, high=127):
    return torch.randint(low, high + 1, (rows, k), generator=generator(seed)).to(torch.int8)


def quantize(x, **given):
    """ops.quant_rows with defaults."""
    plain = {"smooth": None, "given": None, "top": 127, "group": 0, "split": 0, "fp8": False, "affine": False}
    plain |= {"gelu": False, "shift": 0.0, "sums": False}
    return ops.quant_rows(x, **(plain | given))


def split_order(k, block):
    """Input column of each stored column, as the kernels define it."""
    order = torch.arange(k).reshape(-1, block // 2, 2).transpose(1, 2)
    return order.reshape(-1)


# --- quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (5, 33), (37, 160), (3, 7)])
def test_codes_and_scales_are_those_of_the_format(shape, dtype):
    x = randn(*shape, dtype=dtype)
    x[0] = 0
    x[-1] *= 1e30
    expected = INT8.encode(x, "token")
    q, s, _, sums = quantize(x, sums=True)
    k = shape[1]
    assert torch.equal(s, expected.scale) and torch.equal(q[:, :k], expected.codes)
    assert q.shape[1] % 16 == 0 and not q[:, k:].any()
    assert torch.equal(sums, expected.codes.sum(1, dtype=torch.int32))


def test_long_rows_give_the_same_codes(monkeypatch):
    x, smooth = randn(9, 200), torch.rand(200, generator=generator(3)) + 0.5
    for extra in ({}, {"affine": True}, {"given": torch.tensor([0.01])}, {"smooth": smooth}, {"split": 128}):
        whole = quantize(x, sums=True, **extra)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "LONGEST", 64)
            in_parts = quantize(x, sums=True, **extra)
        assert all(torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True)), extra


def test_zero_points_are_those_of_the_format():
    x = randn(11, 50) + 0.8
    x[1], x[2] = 0, x[2].abs() + 3
    expected = get("int8a").encode(x, "token")
    q, s, zero, _ = quantize(x, affine=True)
    assert torch.equal(q[:, :50], expected.codes) and torch.equal(s, expected.scale)
    assert torch.equal(zero, expected.zero.reshape(-1).int()) and not q[:, 50:].any()


@pytest.mark.parametrize("shift", [0.0, 0.171875])
@pytest.mark.parametrize("name", ["int4", "int4a"])
def test_groups_have_scales_of_their_own_and_columns_in_the_order_of_the_weights_bytes(name, shift):
    spec, x = get(name), F.gelu(randn(6, 200, spread=3.0))
    expected = spec.encode(x + shift, "group:64")
    q, s, zero, _ = quantize(x, top=7, group=64, split=64, affine=spec.affine, shift=shift)
    centred = expected.codes - (0 if expected.zero is None else expected.zero.repeat_interleave(64, 1)[:, :200])
    stored = F.pad(centred, (0, 56))[:, split_order(256, 64)]
    assert torch.equal(s, expected.scale) and torch.equal(q, stored) and len(zero) == 0


def test_a_stored_scale_saturates_and_only_nan_spoils_a_row():
    x = randn(5, 40)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    q, s, _, _ = quantize(x, given=torch.tensor([0.02]))
    expected = INT8.encode(x, "tensor", scale=0.02)
    assert torch.equal(q[[0, 1, 3, 4], :40], expected.codes[[0, 1, 3, 4]])
    assert s[2].isnan() and (s[[0, 1, 3, 4]] == 0.02).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("extra", [{}, {"affine": True}, {"top": 448, "fp8": True}])
def test_a_bad_value_gives_its_row_the_scale_nan(bad, extra):
    x = randn(4, 40)
    x[2, 39] = bad
    s = quantize(x, **extra)[1]
    assert s.reshape(-1).isnan().tolist() == [False, False, True, False]


def test_fp8_codes_are_those_of_the_format():
    x = randn(13, 100, spread=5.0)
    x[3] = 0
    expected = get("fp8").encode(x, "token")
    q, s, _, _ = quantize(x, top=448, fp8=True)
    assert torch.equal(s, expected.scale) and torch.equal(q[:, :100].view(torch.int8), expected.codes)


def test_smooth_is_rounded_as_an_unfused_layer_rounds_it():
    x, smooth = randn(7, 48, dtype=torch.bfloat16), torch.rand(48, generator=generator(1)) * 3
    expected = INT8.encode(x * smooth.to(x.dtype), "token")
    q, s, _, _ = quantize(x, smooth=smooth)
    assert torch.equal(q[:, :48], expected.codes) and torch.equal(s, expected.scale)


def near(q, s, truth):
    """Codes within one of those of the truth, and equal in all but a few places; scales to fp32 accuracy."""
    expected = INT8.encode(truth, "token")
    off = (q[:, : truth.shape[1]].int() - expected.codes.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01
    torch.testing.assert_close(s, expected.scale, rtol=1e-5, atol=0)


def test_gelu_and_shift_before_the_codes():
    x = randn(9, 70, spread=2.0)
    q, s, _, _ = quantize(x, gelu=True, shift=0.17)
    near(q, s, F.gelu(x, approximate="tanh") + 0.17)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_adaln_quant(rms, affine):
    batch, tokens, k = 3, 5, 72
    x = randn(batch * tokens, k, dtype=torch.bfloat16, spread=2.0) + 1
    modulation = randn(batch, 6 * k, seed=1, dtype=torch.bfloat16).chunk(6, 1)
    weight, bias = (randn(k, seed=2) + 1, randn(k, seed=3)) if affine else (None, None)
    smooth = torch.rand(k, generator=generator(4)) + 0.5
    q, s, y = ops.adaln_quant(x, weight, bias, modulation[0], modulation[1], smooth, tokens, 1e-6, rms, False, 0, True)
    wide = x.float()
    norm = F.rms_norm(wide, (k,), eps=1e-6) if rms else F.layer_norm(wide, (k,), eps=1e-6)
    norm = norm * weight + bias if affine else norm
    scale, shift = (part.float().repeat_interleave(tokens, 0) for part in modulation[:2])
    truth = (norm * (1 + scale) + shift) * smooth
    near(q, s, truth)
    assert y.dtype == x.dtype and (y.float() - truth).abs().max() <= truth.abs().max() * 2**-8


def test_adaln_without_modulation_is_a_norm_in_fp8():
    x = randn(6, 48)
    q, s, y = ops.adaln_quant(x, None, None, None, None, None, 1, 1e-5, False, True, 0, False)
    truth = F.layer_norm(x, (48,))
    assert len(y) == 0 and (q[:, :48].float() * s - truth).abs().max() < truth.abs().max() * 2**-4


@pytest.mark.parametrize("order", [16, 64])
def test_had_quant(order):
    x, smooth = randn(37, 2 * order), torch.rand(2 * order, generator=generator(5)) + 0.5
    signs = (hadamard.hadamard(order) * order**0.5).round()
    q, s = ops.had_quant(x, signs, smooth, False)
    near(q, s, hadamard.rotate(x * smooth, order))


# --- products --------------------------------------------------------------------------------------------------------


def gemm(q, w, sx=None, sw=None, dtype=torch.float32, **more):
    names = ("zx", "wsum", "zw", "qsum", "bias", "xd", "up", "gate", "residual")
    rest = [more.pop(name, None) for name in names]
    more = {"tokens": 1, "gelu": False, "config": SMALL, "tma": False} | more
    return ops.launch_gemm(q, w, sx, sw, *rest, more["tokens"], more["gelu"], dtype, more["tma"], more["config"])


def exact(q, w):
    return (q.double() @ w.double().t()).int()


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("m, n, k", [(1, 1, 16), (33, 40, 64), (70, 31, 208), (64, 96, 128)])
def test_integer_sums_are_exact(m, n, k, tma):
    q, w = codes(m, k), codes(n, k, 1, low=-128)
    assert torch.equal(gemm(q, w, tma=tma), exact(q, w))


def test_ragged_inner_sizes_read_nothing_past_the_end():
    q, w = codes(9, 48), codes(5, 33, 1)
    assert torch.equal(gemm(q, w), exact(q[:, :33], w)), "codes are stored wider than the weight"


def test_sums_of_the_largest_codes_do_not_saturate():
    q, w = torch.full((3, 256), -127, dtype=torch.int8), torch.full((4, 256), 127, dtype=torch.int8)
    assert (gemm(q, w) == -127 * 127 * 256).all()


@pytest.mark.parametrize("shape", [{"BM": 16, "BN": 256}, {"BM": 128, "BN": 256}])
def test_wide_tiles_store_both_halves(shape):
    q, w = codes(20, 64), codes(300, 64, 1)
    sums = gemm(q, w, config=SMALL | shape)
    assert torch.equal(sums, exact(q, w))


def test_fp8_products():
    q, w = (randn(size, 64, seed=size).to(ops.E4M3) for size in (20, 24))
    sx, sw = torch.rand(20, generator=generator(1)), torch.rand(24, generator=generator(2))
    truth = (q.double() @ w.double().t()) * sx[:, None] * sw
    for tma in (False, True):
        torch.testing.assert_close(gemm(q, w, sx, sw, tma=tma).double(), truth, rtol=1e-5, atol=1e-5)


def ulps(y, truth):
    """Distance of bf16 values from the rounded truth, in units of the last place of the truth."""
    near_zero = 2.0**-126
    unit = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=near_zero))) - 7)
    return ((y.double() - truth.bfloat16().double()).abs() / unit).max()


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("what", ["scales", "bias", "branch", "gelu", "gate", "everything"])
def test_epilogues_are_within_a_bf16_ulp(what, tma):
    m, n, k, rank, tokens = 50, 40, 64, 24, 17
    q, w = codes(m, k), codes(n, k, 1)
    sx, sw = (torch.rand(size, generator=generator(size)) * 0.01 + 0.001 for size in (m, n))
    bias, gate = randn(n, seed=2, dtype=torch.bfloat16), randn(3, n, seed=3, dtype=torch.bfloat16)
    residual, xd, up = (randn(*s, seed=4, dtype=torch.bfloat16) for s in ((m, n), (m, rank), (n, rank)))
    truth, more = exact(q, w).double() * sx[:, None] * sw, {}
    if what in ("branch", "everything"):
        truth, more = truth + xd.double() @ up.double().t(), more | {"xd": xd, "up": up}
    if what in ("bias", "gelu", "everything"):
        truth, more = truth + bias.double(), more | {"bias": bias}
    if what in ("gelu", "everything"):
        truth, more = F.gelu(truth, approximate="tanh"), more | {"gelu": True}
    if what in ("gate", "everything"):
        each = gate.double().repeat_interleave(tokens, 0)[:m]
        truth, more = residual.double() + each * truth, more | {"gate": gate, "residual": residual, "tokens": tokens}
    y = gemm(q, w, sx, sw, torch.bfloat16, tma=tma, **more)
    # a result that cancels is as exact as its terms are, so the last place is that of the largest value
    slack = truth.abs().max() * 2**-20
    close = (y.double() - truth.bfloat16().double()).abs() <= slack
    assert ulps(torch.where(close, truth.bfloat16(), y), truth) <= (2 if "gelu" in more else 1)


def test_zero_points_of_rows_and_of_columns():
    q, w = codes(20, 64, low=-128), codes(24, 64, 1, low=-128)
    zx, zw = codes(20, 1, 2).reshape(-1), codes(24, 1, 3).reshape(-1)
    ones = (torch.ones(20), torch.ones(24))
    y = gemm(q, w, *ones, zx=zx.int(), wsum=w.sum(1, dtype=torch.int32))
    assert torch.equal(y, ((q.double() - zx[:, None].double()) @ w.double().t()).float())
    y = gemm(q, w, *ones, zw=zw, qsum=q.sum(1, dtype=torch.int32))
    assert torch.equal(y, (q.double() @ (w.double() - zw[:, None].double()).t()).float())


# --- 4-bit weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("m, n, k", [(33, 20, 128), (5, 40, 200), (20, 17, 63), (1, 16, 16)])
def test_register_unpacking_is_exact(m, n, k, swap):
    x, w = codes(m, k), codes(n, k, 1, low=-8, high=7)
    q = F.pad(x, (0, -k % 128))[:, split_order(k + -k % 128, 128)].contiguous()
    config = {"BM": 32, "BN": 32, "GROUP": 2, "ASM": 1, "SWAP": swap, "warps": 4, "stages": 2}
    sums = ops.launch_w4a8(
        q, get("int4").pack(w), None, None, *[None] * 9, 0, 1, False, torch.float32, config=config
    )  # fmt: skip
    assert torch.equal(sums, exact(x, w))


@pytest.mark.parametrize("k", [64, 130, 255])
def test_unpacking_to_a_workspace(k):
    w = codes(21, k, low=-8, high=7)
    packed = get("int4").pack(w)
    assert torch.equal(ops.w4_to_s8(packed, k, None, None, 0), w)
    assert torch.equal(ops.weight_sums(packed, k, None, 4, 0), w.sum(1, dtype=torch.int32))
    assert torch.equal(ops.weight_sums(w, k, None, 8, 0), w.sum(1, dtype=torch.int32))
    scale = torch.rand(21, -(-k // 64), generator=generator(1)) + 0.1
    wide = w.float() * scale.repeat_interleave(64, 1)[:, :k]
    torch.testing.assert_close(ops.weight_sums(packed, k, scale, 4, 64), wide.sum(1), rtol=1e-4, atol=1e-4)
    whole = wide.abs().amax(1) / 127
    requantized = ops.w4_to_s8(packed, k, scale, whole, 64)
    assert torch.equal(requantized, (wide / whole[:, None]).round().to(torch.int8))


DECODED = ["int4/group:64", "int4/channel", "int4/tensor", "int4a/channel", "int4a/group:16", "nvfp4", "mxfp4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", DECODED)
def test_decoded_weights_are_those_of_the_format(weight, dtype):
    p = plan("linear", (19, 75), weight, None)
    t = tensors(p)
    name, size = p.weight.format.removesuffix("a"), p.weight.grain.size or 0
    w = ops.w4_to_float(t.weight, 75, t.scale, t.zero, t.scale_global, name, size, dtype)
    assert torch.equal(w, reference.weight_decoder(p)(t).to(dtype))


# --- nvfp4 -----------------------------------------------------------------------------------------------------------


def untile(tiles, rows, blocks):
    quads = -(-blocks // 4)
    order = tiles.reshape(-1, quads, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(-1, 4 * quads)
    return order[:rows, :blocks]


def test_nvfp4_activations_are_those_of_the_format():
    spec, x = get("nvfp4"), randn(130, 160, spread=3.0)
    x[3], x[5, :16], x[7] = 0, 0, x[7] * 1e-20
    expected = spec.encode(x, scale_global=spec.fit_global(x, per_row=True))
    q, scales, g = ops.nvfp4_quant(x)
    assert torch.equal(g, expected.scale_global.reshape(-1))
    assert torch.equal(untile(scales, 130, 10).view(torch.int8), expected.scale)
    mine, theirs = spec.unpack(q.view(torch.int8), 160), expected.codes
    nothing = (expected.scale == 0).repeat_interleave(16, 1)  # codes of a block of step 0 stand for 0
    assert torch.equal(mine[~nothing], theirs[~nothing]) and torch.equal(mine & 7, theirs & 7)


def test_stored_scales_in_tiles():
    scale = codes(150, 5)
    assert torch.equal(untile(ops.tile_scales(scale), 150, 5).view(torch.int8), scale)


def test_nvfp4_spoils_only_bad_rows():
    x = randn(5, 32)
    x[2, 3], x[4, 0] = torch.nan, torch.inf
    assert ops.nvfp4_quant(x)[2].isnan().tolist() == [False, False, True, False, True]


# --- layers ----------------------------------------------------------------------------------------------------------

LINEARS = [
    ("int8/channel", "int8/token"), ("int8/tensor", "int8/token"), ("int8/channel", "int8a/token"),
    ("int8a/channel", "int8/token"), ("int8/channel", "int4/token"), ("int8/channel", "int4a/token"),
    ("int8/channel", "int8/tensor/static"), ("int8a/channel", "int8/tensor/table/-0.3"),
    ("int4/channel", "int8/token"), ("int4a/channel", "int8/token"), ("int4/channel", "int8a/token/dynamic/0.171875"),
    ("int4/group:64", "int8/token"), ("int4/group:64", "int4/group:64"),
    ("int4/group:64", "int4a/group:64/dynamic/0.171875"), ("int4/group:128", "int8/tensor/static"),
    ("fp8/channel", "fp8/token"), ("nvfp4", "nvfp4"), ("int4/group:64", None), ("int4a/channel", None),
    ("nvfp4", None), ("mxfp4", None),
]  # fmt: skip


def inputs_of(weight):
    return 160 if weight == "nvfp4" else 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight, act", LINEARS, ids=str)
def test_linears_are_within_twice_torchs_rounding(weight, act, dtype):
    p = plan("linear", (40, inputs_of(weight)), weight, act, rank=3)
    assert backend.why_not("linear", p, "cpu") is None
    t, x = tensors(p, dtype), randn(37, inputs_of(weight), seed=2, dtype=dtype)
    ours = backend.build("linear", p, None)(x, t)
    assert ours.dtype == dtype and ours.shape == (37, 40)
    within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), dtype)


@pytest.mark.parametrize("rank", [16, 40, 70])
def test_low_rank_branches_of_any_rank_in_fp16(rank):
    p = plan("linear", (33, 64), rank=rank)
    t, x = tensors(p, torch.float16), randn(20, 64, seed=2, dtype=torch.float16)
    t = t._replace(down=t.down / 8)
    ours = backend.build("linear", p, None)(x, t)
    within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), torch.float16)


@pytest.mark.parametrize("weight, act", [pair for pair in LINEARS if pair[1]], ids=str)
def test_gelu_in_the_epilogue(weight, act):
    p = plan("linear", (12, inputs_of(weight)), weight, act)
    t, x = tensors(p), randn(5, inputs_of(weight))
    plain = backend.build("linear", p, None)(x, t)
    torch.testing.assert_close(backend.build_gelu(p)(x, t), F.gelu(plain, approximate="tanh"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight, act", LINEARS, ids=str)
def test_odd_inputs(weight, act):
    k = inputs_of(weight)
    p = plan("linear", (5, k), weight, act)
    run, t, x = backend.build("linear", p, None), tensors(p), randn(6, k, seed=4)
    assert run(x[:0], t).shape == (0, 5) and run(x[0], t).shape == (5,)
    y = run(x, t)
    assert torch.equal(run(x.reshape(2, 3, k), t), y.reshape(2, 3, 5))
    zeros = run(torch.zeros(2, k), t)
    torch.testing.assert_close(zeros, reference.build("linear", p, None)(torch.zeros(2, k), t))
    spoiled = x.clone()
    spoiled[2, 7] = torch.nan
    bad, others = run(spoiled, t), [0, 1, 3, 4, 5]
    assert bad[2].isnan().all() and torch.equal(bad[others], y[others])


def test_few_and_many_rows_of_4_bit_weights_agree(monkeypatch):
    from dq.kernels.triton import linear

    for weight, act in (("int4/channel", "int8/token"), ("int4a/channel", "int8/token")):
        p = plan("linear", (24, 150), weight, act)
        t, x = tensors(p), randn(9, 150)
        few = backend.build("linear", p, None)(x, t)
        monkeypatch.setattr(linear, "REGISTER_ROWS", 0)
        assert torch.equal(backend.build("linear", p, None)(x, t), few)
        monkeypatch.undo()


def test_gradients_reach_the_input():
    p = plan("linear", (7, 32), rank=2)
    t, x = tensors(p), randn(5, 32).requires_grad_()
    backend.build("linear", p, None)(x, t).square().sum().backward()
    wide = x.detach().clone().requires_grad_()
    reference.build("linear", p, None)(wide, t).square().sum().backward()
    torch.testing.assert_close(x.grad, wide.grad)


@pytest.fixture
def selected():
    kernels.select("triton")
    yield
    kernels.select("auto")


@torch.no_grad()
@pytest.mark.usefixtures("selected")
@pytest.mark.parametrize("weight, act", [("int8/channel", "int8/token"), ("int4/group:64", "int8/token")])
def test_a_packed_layer_compiles_into_one_graph(weight, act):
    p = plan("linear", (24, 64), weight, act, rank=2)
    layer = layers.pack("layer", torch.nn.Linear(64, 24), p, torch.float32)
    assert layer.choice.backend == "triton" and "Triton gemm" in layer.choice.label
    x = randn(2, 7, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_fakes_agree_with_the_operators():
    x, w, scale = randn(5, 64), codes(8, 64), torch.rand(8, generator=generator(1))
    checks = ("test_schema", "test_faketensor")
    args = (None, None, 127, 0, 0, False, True, False, 0.0, True)
    torch.library.opcheck(ops.quant_rows, (x, *args), test_utils=checks)
    q, sx, _, _ = quantize(x)
    none = [None] * 9
    gemm_args = (q, w, sx, scale, *none, 1, False, torch.bfloat16)
    torch.library.opcheck(ops.w8a8_gemm, gemm_args, test_utils=checks)
    packed = get("int4").pack(w >> 4)
    q = quantize(x, split=128)[0]
    torch.library.opcheck(ops.w4a8_gemm, (q, packed, sx, scale, *none, 0, 1, False, x.dtype), test_utils=checks)
    torch.library.opcheck(ops.w4_to_s8, (packed, 64, None, None, 0), test_utils=checks)
    args = (packed, 64, scale[:, None], None, None, "int4", 0, x.dtype)
    torch.library.opcheck(ops.w4_to_float, args, test_utils=checks)
    torch.library.opcheck(ops.weight_sums, (packed, 64, None, 4, 0), test_utils=checks)
    torch.library.opcheck(ops.nvfp4_quant, (x,), test_utils=checks)
    torch.library.opcheck(ops.tile_scales, (codes(8, 4),), test_utils=checks)
    norm = (None, None, None, None, None, 1, 1e-6, False, False, 0, True)
    torch.library.opcheck(ops.adaln_quant, (x, *norm), test_utils=checks)
    torch.library.opcheck(ops.had_quant, (x, torch.ones(16, 16), None, False), test_utils=checks)
    heads = randn(2, 9, 3, 16)
    torch.library.opcheck(ops.qk_norm_rope_quant, (heads, *[None] * 4, False, 1e-6, 1.0), test_utils=checks)
    torch.library.opcheck(ops.k_mean, (heads, None, None, None, False, 1e-6), test_utils=checks)
    torch.library.opcheck(ops.v_fp8, (heads,), test_utils=checks)


@pytest.mark.usefixtures("selected")
def test_the_backend_is_chosen_and_says_why_it_refuses():
    refused = {
        ("int8/channel", "int8/group:64"): "same groups",
        ("int4/group:16", "int8/token"): "groups of 64 or 128",
        ("int8/group:64", "int8/token"): "takes int4 weights",
        ("int4/group:64", "int4/group:128"): "differ from weight groups",
        ("int8a/channel", "int8a/token"): "both sides",
        ("fp8/channel", "int8/token"): "no Triton kernel multiplies",
        ("int8/channel", None): "torch decodes it as fast",
    }
    for (weight, act), reason in refused.items():
        assert reason in backend.why_not("linear", plan("linear", (8, 64), weight, act), "cpu")
    assert "split" in backend.why_not("linear", plan("linear", (8, 64), splits=(32,)), "cpu")
    assert "convolution" in backend.why_not("conv", plan("conv2d", (8, 4, 3, 3)), "cpu")
    assert kernels.choose("linear", plan("linear", (8, 64)), "cpu").backend == "triton"


@torch.no_grad()
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("form, attention, most", [("int8", "int8", 0.03), ("fp8", "fp8", 0.08)])
def test_the_fused_block_of_the_gpu_bench_is_the_block(single, form, attention, most):
    size = gpu_block.Size(heads=2, head=16, picture=30, text=9, device="cpu")
    torch.manual_seed(0)
    block = gpu_block.Block(size, single)
    for stream in block.streams:
        stream.modulation.mul_(10)  # what a block adds should stand out from the rounding of what it adds it to
    x = randn(size.tokens, size.width, dtype=torch.bfloat16)
    truth, ours = block.float()(x.float()) - x.float(), gpu_block.Fused(block.bfloat16(), form, attention)(x).float()
    error = (ours - x.float() - truth).norm() / truth.norm()
    assert error < most


# --- attention -------------------------------------------------------------------------------------------------------


def rope(x, cos, sin, half):
    """x (B, L, H, D), cos and sin (L, D)."""
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), -1).flatten(-2)
    return x * cos[:, None] + turned * sin[:, None]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [16, 24])
def test_heads_are_normed_rotated_and_rounded(size, half):
    batch, tokens, heads = 2, 37, 3
    qkv = randn(batch, tokens, 3 * heads * size, dtype=torch.bfloat16)
    x = qkv[..., heads * size : 2 * heads * size].unflatten(-1, (heads, size))
    weight, angle = randn(size, seed=1) + 1, randn(tokens, size, seed=2)
    cos, sin = angle.cos(), angle.sin()
    truth = rope(F.rms_norm(x.float(), (size,), weight, 1e-6), cos, sin, half)
    mean = ops.k_mean(x, weight, cos, sin, half, 1e-6)
    torch.testing.assert_close(mean, truth.mean(1).reshape(-1, size), rtol=1e-4, atol=1e-5)
    q, s = ops.qk_norm_rope_quant(x, weight, cos, sin, mean, half, 1e-6, 0.5)
    rows = (truth - mean.reshape(batch, 1, heads, size)).transpose(1, 2).reshape(-1, size)
    near(q.reshape(-1, size), 2 * s.reshape(-1, 1), rows)


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("size, tokens, keys", [(64, 70, 70), (72, 40, 150), (16, 1, 3)])
def test_attention_is_near_torchs(size, tokens, keys, eight):
    batch, heads = 2, 2
    x = randn(batch, tokens, heads, size, dtype=torch.bfloat16)
    k, v = (randn(batch, keys, heads, size, seed=i, dtype=torch.bfloat16) + 0.5 for i in (1, 2))
    plain = (None, None, None)
    mean = ops.k_mean(k, *plain, False, 1e-6)
    q8, sq = ops.qk_norm_rope_quant(x, *plain, None, False, 1e-6, 1.4426950408889634 * size**-0.5)
    k8, sk = ops.qk_norm_rope_quant(k, *plain, mean, False, 1e-6, 1.0)
    values, sv = ops.v_fp8(v) if eight else (v.transpose(1, 2).reshape(-1, keys, size).half(), None)
    o = ops.attn_i8(q8, k8, values, sq, sk, sv, heads, torch.bfloat16)
    truth = F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (x, k, v))).transpose(1, 2)
    error = (o.float() - truth).norm() / truth.norm()
    assert o.shape == truth.shape and error < (0.04 if eight else 0.02)
