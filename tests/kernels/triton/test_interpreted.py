"""Every Triton kernel that dq runs, on tiny shapes in Triton's interpreter (see `tests.kernels.interpreted`)."""

from __future__ import annotations

import gc

import pytest

pytest.importorskip("triton.language")

import torch
import torch.nn.functional as F

from dq import kernels, layers
from dq.errors import DQError
from dq.formats import get
from dq.kernels import blockscaled, proof, reference
from dq.kernels import triton as backend
from dq.kernels.triton import mxfp8, ops, stored
from dq.kernels.triton.ops import Blocks, Codes, Epilogue, RowFormat
from eval.gpu.tiles import split_order, ulps
from tests.kernels.test_kernels import plan, tensors, truth_and_torch, within_twice_torch
from tests.kernels.triton.operands import SMALL, codes, exact, positive, randn

pytestmark = pytest.mark.interpreted

INT8 = get("int8")


def quantize(x, given=None, sums=False, **rows):
    return ops.quant_rows(x, RowFormat(**rows), given=given, sums=sums)


# --- quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (37, 163)])
def test_codes_and_scales_are_those_of_the_format(shape, dtype):
    x = randn(*shape, dtype=dtype)
    x[0] = 0
    x[-1] *= 1e30
    expected = INT8.encode(x, "token")
    q, s, zero, sums = quantize(x, sums=True)
    k = shape[1]
    assert torch.equal(s, expected.scale) and torch.equal(q[:, :k], expected.codes)
    assert q.shape[1] % 16 == 0 and not q[:, k:].any()
    assert torch.equal(sums, expected.codes.sum(1, dtype=torch.int32)) and zero is None


@pytest.mark.parametrize("extra", [{}, {"affine": True}, {"given": torch.tensor([0.01])}, {"split": 128}], ids=str)
def test_long_rows_give_the_same_codes(monkeypatch, extra):
    x = randn(9, 200)
    whole = quantize(x, sums=True, **extra)
    monkeypatch.setattr(ops, "LONGEST", 64)
    in_parts = quantize(x, sums=True, **extra)
    assert all(a is b or torch.equal(a, b) for a, b in zip(whole, in_parts, strict=True))


def test_zero_points_are_those_of_the_format():
    x = randn(11, 50) + 0.8
    x[1], x[2] = 0, x[2].abs() + 3
    expected = get("int8a").encode(x, "token")
    q, s, zero, _ = quantize(x, affine=True)
    assert torch.equal(q[:, :50], expected.codes) and torch.equal(s, expected.scale)
    assert torch.equal(zero, expected.zero.reshape(-1).int()) and not q[:, 50:].any()


@pytest.mark.parametrize(("shift", "clip"), [(0.0, 1.0), (0.171875, 1.0), (0.171875, 0.8)])
@pytest.mark.parametrize("name", ["int4", "int4a"])
def test_groups_have_scales_of_their_own_and_columns_in_the_order_of_the_weights_bytes(name, shift, clip):
    spec, x = get(name), F.gelu(randn(6, 200, spread=3.0))
    expected = spec.encode(x + shift, "group:64", *spec.fit((x + shift) * clip, "group:64"))
    q, s, zero, _ = quantize(x, top=7, group=64, split=64, affine=spec.affine, shift=shift, clip=clip)
    centred = expected.codes - (0 if expected.zero is None else expected.zero.repeat_interleave(64, 1)[:, :200])
    stored = F.pad(centred, (0, 56))[:, split_order(256, 64)]
    assert torch.equal(s, expected.scale) and torch.equal(q, stored) and zero is None


def test_a_stored_scale_saturates_and_only_nan_spoils_a_row():
    x = randn(5, 40)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    q, s, _, _ = quantize(x, given=torch.tensor([0.02]))
    expected = INT8.encode(x, "tensor", scale=0.02)
    assert torch.equal(q[[0, 1, 3, 4], :40], expected.codes[[0, 1, 3, 4]])
    assert s[2].isnan() and (s[[0, 1, 3, 4]] == 0.02).all()


@pytest.mark.parametrize("extra", [{}, {"affine": True}, {"top": ops.FP8_TOP}], ids=str)
def test_a_bad_value_gives_its_row_the_scale_nan(extra):
    x = randn(4, 40)
    x[0, 39], x[2, 0], x[3, 20] = torch.nan, torch.inf, -torch.inf
    assert quantize(x, **extra).scale.reshape(-1).isnan().tolist() == [True, False, True, True]


def test_fp8_codes_are_those_of_the_format():
    x = randn(13, 100, spread=5.0)
    x[3] = 0
    expected = get("fp8").encode(x, "token")
    q, s, _, _ = quantize(x, top=ops.FP8_TOP)
    assert torch.equal(s, expected.scale) and torch.equal(q[:, :100].view(torch.int8), expected.codes)


# --- products --------------------------------------------------------------------------------------------------------


def gemm(x, w, dtype=torch.float32, tma=False, config=SMALL, **epilogue):
    return ops.launch_gemm(x, w, Epilogue(dtype, **epilogue), tma, config)


def unscaled(q):
    """With scales of 1, so that sums come out as they are."""
    return Codes(q, torch.ones(len(q)))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("m, n, k", [(1, 1, 16), (70, 31, 208)])
def test_integer_sums_are_exact(m, n, k, tma):
    q, w = codes(m, k), codes(n, k, 1, low=-128)
    assert torch.equal(gemm(unscaled(q), unscaled(w), tma=tma), exact(q, w))


def test_ragged_inner_sizes_read_nothing_past_the_end():
    q, w = codes(9, 48), codes(5, 33, 1)
    sums = gemm(unscaled(q), unscaled(w))
    assert torch.equal(sums, exact(q[:, :33], w)), "codes are stored wider than the weight"


def test_sums_of_the_largest_codes_do_not_saturate():
    q, w = torch.full((3, 256), -127, dtype=torch.int8), torch.full((4, 256), 127, dtype=torch.int8)
    assert (gemm(unscaled(q), unscaled(w)) == -127 * 127 * 256).all()


@pytest.mark.parametrize("shape", [{"BM": 16, "BN": 256}, {"BM": 128, "BN": 256}], ids=str)
def test_wide_tiles_store_both_halves(shape):
    q, w = codes(20, 64), codes(300, 64, 1)
    sums = gemm(unscaled(q), unscaled(w), config=SMALL | shape)
    assert torch.equal(sums, exact(q, w))


@pytest.mark.parametrize("tma", [False, True])
def test_fp8_products(tma):
    x, w = (Codes(randn(size, 64, seed=size).to(ops.E4M3), positive(size, seed=size)) for size in (20, 24))
    truth = (x.q.double() @ w.q.double().t()) * x.scale[:, None] * w.scale
    torch.testing.assert_close(gemm(x, w, tma=tma).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("what", ["scales", "bias", "branch", "gelu", "everything"])
def test_epilogues_are_within_a_bf16_ulp(what, tma):
    m, n, k, rank = 50, 40, 64, 24
    x, w = (Codes(codes(size, k, size), positive(size, seed=size) * 0.01) for size in (m, n))
    bias, down_x, up = (randn(*shape, seed=2, dtype=torch.bfloat16) for shape in ((n,), (m, rank), (n, rank)))
    truth, epilogue = exact(x.q, w.q).double() * x.scale[:, None] * w.scale, {}
    if what in ("branch", "everything"):
        truth, epilogue = truth + down_x.double() @ up.double().t(), epilogue | {"down_x": down_x, "up": up}
    if what in ("bias", "everything"):
        truth, epilogue = truth + bias.double(), epilogue | {"bias": bias}
    if what in ("gelu", "everything"):
        truth, epilogue = F.gelu(truth, approximate="tanh"), epilogue | {"gelu": True}
    assert ulps(gemm(x, w, torch.bfloat16, tma, **epilogue), truth) <= (2 if "gelu" in epilogue else 1)


@pytest.mark.parametrize("tma", [False, True])
def test_operands_that_are_not_contiguous_are_read_as_they_are(tma):
    """Pointers take K as the pitch of a weight's rows, descriptors its stride."""
    q, w = codes(64, 20).t(), codes(64, 24, 1).t()
    wide = codes(24, 96, 1)
    apart = Codes(q, torch.ones(20, 3)[:, 0]), Codes(w, torch.arange(48.0)[::2])
    assert torch.equal(gemm(*apart, tma=tma), exact(q, w) * torch.arange(24.0) * 2)
    assert torch.equal(gemm(unscaled(q), unscaled(wide[:, :64]), tma=tma), exact(q, wide[:, :64]))


def test_4_bit_weights_that_are_not_contiguous_are_read_as_they_are():
    w = codes(21, 64, low=-8, high=7)
    bytes_ = F.pad(get("int4").pack(w), (0, 5))[:, :32]
    assert torch.equal(ops.w4_to_s8(bytes_, k=64), w)
    assert torch.equal(ops.weight_sums(bytes_, k=64, bits=4), w.sum(1, dtype=torch.int32))
    x = codes(5, 128)
    config = {"BM": 32, "BN": 32, "GROUP": 2, "ASM": 1, "SWAP": 0, "warps": 4, "stages": 2}
    stored = F.pad(x[:, :64], (0, 64))[:, split_order(128, 128)]
    sums = ops.launch_w4a8(unscaled(stored), unscaled(bytes_), Epilogue(torch.float32), config=config)
    assert torch.equal(sums, exact(x[:, :64], w))


class Launched:
    """In place of a kernel: keeps the arguments of a launch."""

    def __getitem__(self, grid):
        return lambda *args, **options: setattr(self, "args", args)


@pytest.mark.parametrize("arch, short", [("sm_89", None), ("sm_90", ops.PROMOTED), ("sm_100", None)])
def test_exact_sums_of_fp8_are_asked_of_the_chip_that_has_others(monkeypatch, arch, short):
    monkeypatch.setattr(ops.configs, "architecture", lambda: arch)
    x, w = (Codes(randn(size, 256, seed=size).to(ops.E4M3), positive(size)) for size in (4096, 4096))
    for exact_sums in (False, True):
        kernel = Launched()
        monkeypatch.setattr(ops.gemm, "gemm", kernel)
        ops.w8a8_gemm(x, w, Epilogue(torch.float32), exact_sums)
        flag, found = kernel.args[-5:-3]  # before GELU and chunks
        assert flag is True and found == (short if exact_sums else None)
        bm, bn = kernel.args[-10:-8]
        assert bm * bn <= ops.PROMOTED_TILE or not found, "two accumulators would spill"


def test_exact_sums_are_the_same_product():
    x, w = (Codes(randn(size, 160, seed=size).to(ops.E4M3), positive(size)) for size in (20, 24))
    truth = (x.q.double() @ w.q.double().t()) * x.scale[:, None] * w.scale
    y = ops.launch_gemm(x, w, Epilogue(torch.float32), False, SMALL, exact=True)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["exact", "fast", None])
def test_a_layer_takes_exact_sums_from_the_environment(monkeypatch, wanted):
    seen, product = [], ops.w8a8_gemm
    monkeypatch.setattr(ops, "w8a8_gemm", lambda *args: seen.append(args[3]) or product(*args))
    if wanted:
        monkeypatch.setenv("DQ_FP8_SUMS", wanted)
    p = plan("linear", (8, 64), "fp8/channel", "fp8/token")
    backend.build("linear", p, None)(randn(3, 64), tensors(p))
    assert seen == [wanted == "exact"]
    monkeypatch.setenv("DQ_FP8_SUMS", "precise")
    with pytest.raises(DQError, match="got 'precise', expected 'fast' or 'exact'"):
        backend.build("linear", p, None)


def test_zero_points_of_rows_and_of_columns():
    q, w = codes(20, 64, low=-128), codes(24, 64, 1, low=-128)
    zx, zw = codes(20, 1, 2).reshape(-1), codes(24, 1, 3).reshape(-1)
    x, plain = unscaled(q), unscaled(w)
    y = gemm(x._replace(zero=zx.int()), plain._replace(sums=w.sum(1, dtype=torch.int32)))
    assert torch.equal(y, exact(q.double() - zx[:, None].double(), w))
    y = gemm(x._replace(sums=q.sum(1, dtype=torch.int32)), plain._replace(zero=zw))
    assert torch.equal(y, exact(q, w.double() - zw[:, None].double()))


# --- 4-bit weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("m, n, k", [(5, 40, 200), (20, 17, 63), (1, 16, 16)])
def test_register_unpacking_is_exact(m, n, k, swap):
    x, w = codes(m, k), codes(n, k, 1, low=-8, high=7)
    q = F.pad(x, (0, -k % 128))[:, split_order(k + -k % 128, 128)].contiguous()
    config = {"BM": 32, "BN": 32, "GROUP": 2, "ASM": 1, "SWAP": swap, "warps": 4, "stages": 2}
    packed = unscaled(get("int4").pack(w))
    sums = ops.launch_w4a8(unscaled(q), packed, Epilogue(torch.float32), config=config)
    assert torch.equal(sums, exact(x, w))


@pytest.mark.parametrize("k", [64, 255])
def test_unpacking_to_a_workspace(k):
    w = codes(21, k, low=-8, high=7)
    packed = get("int4").pack(w)
    assert torch.equal(ops.w4_to_s8(packed, k=k), w)
    assert torch.equal(ops.weight_sums(packed, k=k, bits=4), w.sum(1, dtype=torch.int32))
    assert torch.equal(ops.weight_sums(w, k=k, bits=8), w.sum(1, dtype=torch.int32))
    scale = positive(21, -(-k // 64))
    truth = (w.float() * scale.repeat_interleave(64, 1)[:, :k]).sum(1)
    sums = ops.weight_sums(packed, k=k, bits=4, scale=scale, group=64)
    torch.testing.assert_close(sums, truth, rtol=1e-4, atol=1e-4)


DECODED = [
    "int4/group:64",
    "int4/group:16+channel",
    "int4/channel",
    "int4/tensor",
    "int4a/channel",
    "int4a/group:16",
    "nvfp4",
    "mxfp4",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", DECODED)
def test_decoded_weights_are_those_of_the_format(weight, dtype):
    p = plan("linear", (19, 75), weight, None)
    t = tensors(p)
    steps = t._replace(scale=p.weight.spec.step(t.scale, t.scale_global), scale_global=None)
    packed = steps if p.weight.grain.two_level else t
    w = ops.w4_to_float(packed, 75, p.weight.format.removesuffix("a"), p.weight.grain.size or 0, dtype)
    assert torch.equal(w, reference.weight_decoder(p)(t).to(dtype))


# --- nvfp4 -----------------------------------------------------------------------------------------------------------


def untile(tiles, rows, blocks):
    quads = -(-blocks // 4)
    order = tiles.reshape(-1, quads, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(-1, 4 * quads)
    return order[:rows, :blocks].view(torch.int8)


def test_nvfp4_activations_are_those_of_the_format():
    spec, x = get("nvfp4"), randn(130, 160, spread=3.0)
    x[3], x[5, :16], x[7] = 0, 0, x[7] * 1e-20
    expected = spec.encode(x, scale_global=spec.fit_global(x, per_row=True))
    q, scales, g = ops.nvfp4_quant(x)
    assert torch.equal(g, expected.scale_global.reshape(-1))
    assert torch.equal(untile(scales, 130, 10), expected.scale)
    mine, theirs = spec.unpack(q.view(torch.int8), 160), expected.codes
    nothing = (expected.scale == 0).repeat_interleave(16, 1)  # codes of a block of step 0 stand for 0
    assert torch.equal(mine[~nothing], theirs[~nothing]) and torch.equal(mine & 7, theirs & 7)


def test_stored_scales_in_tiles():
    scale = codes(150, 5)
    assert torch.equal(untile(ops.tile_scales(scale), 150, 5), scale)
    assert torch.equal(ops.tile_scales(scale).view(torch.int8), blockscaled.tiles(scale))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_block_scaled_product_gets_from_a_kernel_what_aten_rounds(form, dtype):
    x = (randn(130, 160, spread=3.0) * torch.logspace(-30, 30, 130)[:, None]).to(dtype)
    x[3], x[5, :32], x[7] = 0, 0, 2.0**-130 if dtype is torch.float32 else 0  # the interpreter drops bf16's smallest
    mine, aten = (getattr(blockscaled, f"_{form}{how}")(x) for how in ("_in_one_kernel", ""))
    assert (mine.whole is None) is (form == "mxfp8") and (mine.whole is None or torch.equal(mine.whole, aten.whole))
    for ours, theirs in ((mine.q, aten.q), (mine.scale, aten.scale)):
        assert ours.dtype is theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_mxfp8_spoils_only_bad_blocks():
    x = randn(5, 64)
    x[2, 3], x[4, 40] = torch.nan, torch.inf
    scale = untile(mxfp8.mxfp8_quant(x)[1], 5, 2)
    assert (scale == -1).nonzero().tolist() == [[2, 0], [4, 1]]


def test_nvfp4_spoils_only_bad_rows():
    x = randn(5, 32)
    x[2, 3], x[4, 0] = torch.nan, torch.inf
    assert ops.nvfp4_quant(x).whole.isnan().tolist() == [False, False, True, False, True]


# --- layers ----------------------------------------------------------------------------------------------------------

LINEARS = [
    ("int8/channel", "int8/token"), ("int8/tensor", "int8/token"), ("int8/channel", "int8a/token"),
    ("int8a/channel", "int8/token"), ("int8/channel", "int4/token"), ("int8/channel", "int4a/token"),
    ("int8/channel", "int8/tensor/static"), ("int8a/channel", "int8/tensor/table/-0.3"),
    ("int4/channel", "int8/token"), ("int4a/channel", "int8/token"), ("int4/channel", "int8a/token/dynamic/0.171875"),
    ("int4/group:64", "int8/token"), ("int4/group:64", "int4/group:64"),
    ("int4/group:64", "int4a/group:64/dynamic/0.171875"), ("int4/group:128", "int8/tensor/static"),
    ("fp8/channel", "fp8/token"), ("nvfp4", "nvfp4"), ("int4/group:64", None), ("int4a/channel", None),
    ("nvfp4", None), ("mxfp4", None), ("int4/group:64+channel", "int8/token"), ("int4/group:64+channel", None),
    ("int4/group:16+channel", "int8a/token/dynamic/0.171875"), ("int4/group:64+channel", "int8/tensor/static"),
]  # fmt: skip


def inputs_of(weight):
    return 160 if weight == "nvfp4" else 150


ONE_A_ROUTE = [LINEARS[i] for i in (0, 8, 11, 15, 16, 17, 21)]  # w8, w4, groups, fp8, nvfp4, decode, two-level


@pytest.mark.parametrize(
    "weight, act, dtype",
    [(*pair, torch.bfloat16) for pair in LINEARS] + [(*pair, torch.float32) for pair in ONE_A_ROUTE],
    ids=str,
)
def test_linears_are_within_twice_torchs_rounding(weight, act, dtype):
    p = plan("linear", (40, inputs_of(weight)), weight, act, rank=3)
    assert backend.why_not("linear", p, "cpu") is None
    t, x = tensors(p, dtype), randn(37, inputs_of(weight), seed=2, dtype=dtype)
    ours = backend.build("linear", p, None)(x, t)
    assert ours.dtype == dtype and ours.shape == (37, 40)
    within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), dtype)


def test_the_tests_see_every_route():
    routes = {backend.routes.route(plan("linear", (40, 160), *pair)).kind for pair in ONE_A_ROUTE}
    assert routes == {"w8", "w4", "groups", "fp8", "nvfp4", "decode", "two-level"} and len(ONE_A_ROUTE) == 7


@pytest.mark.parametrize("rank", [16, 40, 70])
def test_low_rank_branches_of_any_rank_in_fp16(rank):
    p = plan("linear", (33, 64), rank=rank)
    t, x = tensors(p, torch.float16), randn(20, 64, seed=2, dtype=torch.float16)
    t = t._replace(down=t.down / 8)
    ours = backend.build("linear", p, None)(x, t)
    within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), torch.float16)


@pytest.mark.parametrize("weight, act", [pair for pair in ONE_A_ROUTE if pair[1]], ids=str)
def test_gelu_in_the_epilogue(weight, act):
    p = plan("linear", (12, inputs_of(weight)), weight, act)
    t, x = tensors(p), randn(5, inputs_of(weight))
    plain = backend.build("linear", p, None)(x, t)
    torch.testing.assert_close(backend.build_gelu(p)(x, t), F.gelu(plain, approximate="tanh"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight, act", LINEARS, ids=str)
def test_nan_spoils_its_row_only_and_zeros_give_what_the_reference_gives(weight, act):
    k = inputs_of(weight)
    p = plan("linear", (5, k), weight, act)
    run, t, x = backend.build("linear", p, None), tensors(p), randn(6, k, seed=4)
    x[1] = 0
    y, others = run(x, t), [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[1], reference.build("linear", p, None)(x[1], t))
    x[2, 7] = torch.nan
    bad = run(x, t)
    assert bad[2].isnan().all() and torch.equal(bad[others], y[others])


@pytest.mark.parametrize("weight, act", ONE_A_ROUTE, ids=str)
def test_inputs_of_any_shape(weight, act):
    k = inputs_of(weight)
    p = plan("linear", (5, k), weight, act)
    run, t, x = backend.build("linear", p, None), tensors(p), randn(6, k, seed=4)
    assert run(x[:0], t).shape == (0, 5) and run(x[0], t).shape == (5,)
    assert torch.equal(run(x.reshape(2, 3, k), t), run(x, t).reshape(2, 3, 5))


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


def operands(name):
    """Arguments of `torch.ops.dq.triton_<name>`."""
    x, w, scale = randn(5, 64), codes(8, 64), positive(8)
    plain, split = quantize(x, sums=True), quantize(x, split=128)
    half, whole, epilogue = get("int4").pack(w >> 4), torch.ones(1), {"dtype": torch.bfloat16, "bias": positive(8)}
    blocks = Blocks(half.view(torch.uint8), torch.zeros(512, dtype=torch.uint8), whole)
    made = {
        "quant_rows": ((x,), {"affine": True, "sums": True}),
        "w8a8_gemm": ((plain.q, w, plain.scale, scale), {"zw": w[:, 0], "qsum": plain.sums, **epilogue}),
        "w4a8_gemm": ((split.q, half, split.scale, scale), {"down_x": x[:, :3], "up": randn(8, 3), **epilogue}),
        "w4a8_groups_gemm": ((split.q, half, split.scale, scale[:, None]), {"group": 64, "gelu": True, **epilogue}),
        "w4_to_s8": ((half,), {"k": 64, "times": w[:, :4].abs() % 16 + 1, "group": 16}),
        "w4_to_float": ((half, scale[:, None]), {"k": 64, "form": "int4", "dtype": torch.bfloat16}),
        "weight_sums": ((half,), {"k": 64, "bits": 4}),
        "few_rows": ((x, half, scale[:, None]), {"bits": 4, "group": 64, "bias": scale}),
        "nvfp4_quant": ((x,), {}),
        "mxfp8_quant": ((x,), {}),
        "tile_scales": ((w[:, :4],), {}),
        "nvfp4_gemm": ((ops.nvfp4_quant(x).q, blocks.q, *[blocks.scale] * 2, positive(5), blocks.whole), epilogue),
    }
    return made[name]


OPERATORS = sorted(name.removeprefix("triton_") for name in dir(torch.ops.dq) if name.startswith("triton_"))


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_agree_with_the_operators(name):
    args, kwargs = operands(name)
    operator = getattr(torch.ops.dq, f"triton_{name}").default
    torch.library.opcheck(operator, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("selected")
def test_the_backend_is_chosen_and_says_why_it_refuses():
    refused = {
        ("int8/channel", "int8/group:64"): "same groups",
        ("int4/group:16", "int8/token"): "groups of 64 or 128",
        ("int8/group:64", "int8/token"): "takes int4 weights",
        ("int4/group:64", "int4/group:128"): "differ from weight groups",
        ("int3/group:64+channel", "int8/token"): "no Triton kernel multiplies",
        ("int4/group:64+channel", "int4/group:64"): "same groups",
        ("int8a/channel", "int8a/token"): "both sides",
        ("fp8/channel", "int8/token"): "no Triton kernel multiplies",
        ("int8/group:64", None): "torch decodes it as fast",
    }
    for (weight, act), reason in refused.items():
        assert reason in backend.why_not("linear", plan("linear", (8, 64), weight, act), "cpu")
    assert "split" in backend.why_not("linear", plan("linear", (8, 64), splits=(32,)), "cpu")
    assert "convolution" in backend.why_not("conv", plan("conv2d", (8, 4, 3, 3)), "cpu")
    assert kernels.choose("linear", plan("linear", (8, 64)), "cpu").backend == "triton"


# --- weights as they are stored --------------------------------------------------------------------------------------

FEW = [
    ("int8/channel", 0),
    ("int4/channel", 0),
    ("int4/group:64", 2),
    ("int4a/channel", 0),
    ("int4/group:64+channel", 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight, rank", FEW)
def test_few_rows_of_weight_only_layers_take_one_kernel(monkeypatch, weight, rank, dtype):
    p, called = plan("linear", (40, 150), weight, None, rank=rank), []
    right = ops.packed.few_rows
    monkeypatch.setattr(ops.packed, "few_rows", Counted(right, called))
    t = tensors(p, dtype)
    for rows in (1, 16, 17):
        x = randn(rows, 150, seed=rows, dtype=dtype)
        ours = backend.build("linear", p, None)(x, t)
        within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), dtype)
    assert len(called) == 2, "16 rows at most"


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, called):
        self.kernel, self.called = kernel, called

    def __getitem__(self, grid):
        self.called.append(grid)
        return self.kernel[grid]


def test_more_rows_than_a_tile_are_refused_by_the_kernel_for_few():
    with pytest.raises(DQError, match="got 17 rows, expected at most 16"):
        stored.few_rows(randn(17, 32), codes(4, 32), positive(4, 1), bits=8)


def test_rounding_again_costs_half_a_step_of_the_row_at_most():
    w, scale = codes(9, 150, low=-8, high=7), positive(9, 3) * torch.tensor([1.0, 0.01, 0.0])
    scale[4] = 0
    found = stored.rerounded(get("int4").pack(w), scale, 150, 64)
    exactly = w.double() * scale.double().repeat_interleave(64, 1)[:, :150]
    step = scale.amax(1, keepdim=True).double() * 8 / 127
    off = (found.q.double() * found.scale[:, None] - exactly).abs()
    assert (off <= step * (0.5 + 1e-5)).all() and off.max() > 0
    assert int(found.q.abs().max()) == 127 and not found.q[4].any()


def test_many_rows_of_groups_are_a_product_of_rows_rounded_again(monkeypatch):
    """Near to the layer's own rounding, far below that of four bits; grouped activations keep theirs."""
    from dq.kernels.triton import linear

    p = plan("linear", (40, 150), "int4/group:64", "int8/token")
    t, x = tensors(p), randn(37, 150, seed=2)
    exactly = backend.build("linear", p, None)(x, t)
    monkeypatch.setattr(linear, "REGISTER_ROWS", 36)
    many = backend.build("linear", p, None)(x, t)
    eight, again = reference.rerounded(p, t)
    assert all(torch.equal(a, b) for a, b in zip(linear.rounded_again(p, t)[:2], again[:2], strict=True))
    torch.testing.assert_close(many, reference.build("linear", eight, None)(x, again), rtol=1e-5, atol=1e-4)
    rounded = reference.input_rounder(p, -1)(x, None).double()
    most = rounded.abs().sum(1, keepdim=True) * (t.scale.amax(1) * 4 / 127).double()
    assert not torch.equal(many, exactly) and ((many - exactly).double().abs() <= most + 1e-4).all()


@pytest.mark.parametrize(
    "weight, act, rows",
    [
        ("int4/group:64", "int8/token", 513),
        ("int4/group:64", "int4/group:64", None),
        ("int4/group:64+channel", "int8/token", None),  # exact as it is
        ("int8/channel", "int8/token", None),
    ],
)
def test_the_backend_says_when_it_rounds_again(weight, act, rows):
    assert backend.rerounded("linear", plan("linear", (40, 192), weight, act)) == rows


@pytest.mark.parametrize("fault", [False, True])
def test_many_rows_of_groups_prove_themselves_too(monkeypatch, fault):
    """Beside the weights that were rounded again: right to fp32, and a scale that is 1 % off is found."""
    right = stored.rerounded
    if fault:
        monkeypatch.setattr(stored, "rerounded", lambda *args: right(*args)._replace(scale=right(*args).scale * 1.01))
    p = plan("linear", (80, 192), "int4/group:64", "int8/token")
    wrong = proof.why_wrong("triton", "linear", p, None, torch.empty(0))
    assert (wrong is not None) is fault and (not fault or "wrong on a small problem" in wrong)


def test_sums_of_a_weight_are_taken_once_until_it_changes(monkeypatch):
    taken, right = [], ops.weight_sums
    monkeypatch.setattr(ops, "weight_sums", lambda *args, **more: taken.append(1) or right(*args, **more))
    w = codes(9, 64)
    first = stored.sums(w, k=64, bits=8)
    assert stored.sums(w, k=64, bits=8) is first and len(taken) == 1
    w[2, 3] += 1 if w[2, 3] < 0 else -1
    assert torch.equal(stored.sums(w, k=64, bits=8), w.sum(1, dtype=torch.int32)) and len(taken) == 2
    w.data = codes(9, 64, seed=5)
    assert torch.equal(stored.sums(w, k=64, bits=8), w.sum(1, dtype=torch.int32)) and len(taken) == 3
    half, scale = get("int4").pack(w >> 4), positive(9, 1)
    before = stored.sums(half, k=64, bits=4, scale=scale, group=64)
    scale *= 2
    assert torch.allclose(stored.sums(half, k=64, bits=4, scale=scale, group=64), 2 * before) and len(taken) == 5
    with torch.inference_mode():
        stored.sums(w, k=64, bits=8)
    assert len(taken) == 6, "tensors there do not say that they change"


def test_sums_go_with_their_weight():
    kept = len(stored._kept)
    w = codes(9, 64)
    stored.sums(w, k=64, bits=8)
    assert len(stored._kept) == kept + 1
    del w
    gc.collect()
    assert len(stored._kept) == kept


def test_two_programs_share_a_multiprocessor_where_the_tile_says_so(monkeypatch):
    kernel, grids = Launched(), []
    monkeypatch.setattr(ops.gemm, "gemm_tma", kernel)
    monkeypatch.setattr(Launched, "__getitem__", lambda self, grid: grids.append(grid) or (lambda *args, **more: None))
    x, w = (unscaled(codes(256, 64, seed)) for seed in (0, 1))
    for resident in ({}, {"resident": 2}):
        gemm(x, w, tma=True, config=SMALL | resident)
    assert grids == [(4,), (8,)]  # 64 tiles on the interpreter's four multiprocessors


@pytest.mark.parametrize(
    "pair", [("int8/channel", "int8/token"), ("int8/channel", "int8a/token"), ("fp8", "fp8")], ids=str
)
def test_traced_layers_take_codes_that_aten_rounded(monkeypatch, pair):
    """So that a compiler fuses the rounding with what comes before; only the product stays a kernel."""
    p = plan("linear", (48, 64), *pair)
    t, x = tensors(p), randn(5, 64)
    eager = backend.build("linear", p, None)(x, t)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(ops, "quant_rows", None)
    torch.testing.assert_close(backend.build("linear", p, None)(x, t), eager, atol=1e-5, rtol=1e-5)
