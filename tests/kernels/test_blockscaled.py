"""nvfp4 and mxfp8 through torch's product under block scales: who is refused, what is handed over, the numbers.

No CPU has the product: `multiply` stands in for it, with places of scales, pairs of e2m1 and powers of two written
down here a second time. What the real one accepts is asked of torch's own checks, on tensors without data.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dq import kernels
from dq.kernels import blockscaled, reference
from tests.kernels.test_kernels import plan, tensors

FORMS = ("nvfp4", "mxfp8")
NEW = ("sm_100", "sm_103", "sm_120")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
each_form = pytest.mark.parametrize("form", FORMS)


def ours(form, shape=(144, 96), **more):
    return plan("linear", shape, form, form, **more)


def place(row, block, blocks):
    """Byte of a scale: 512 for 128 rows x 4 blocks, tiles along a row first; 16 for a row and those 32, 64, 96 on."""
    tile, inside = (row // 128) * ((blocks + 3) // 4) + block // 4, row % 128
    return 512 * tile + 16 * (inside % 32) + 4 * (inside // 32) + block % 4


def in_rows(tiled, count, blocks):
    """Scales (bytes,) of any dtype as (rows, blocks)."""
    found = [[place(row, block, blocks) for block in range(blocks)] for row in range(count)]
    return tiled[torch.tensor(found)]


def decoded(q, scale):
    """An operand (rows, columns or pairs) and its tiled scales -> fp64 (rows, columns)."""
    if q.dtype is torch.float4_e2m1fn_x2:
        codes = q.view(torch.uint8).long()
        codes = torch.stack([codes % 16, codes // 16], -1).reshape(q.shape[0], -1)
        values, width = E2M1[codes % 8] * (1 - 2 * (codes // 8)), 16
        factor = in_rows(scale.view(torch.float8_e4m3fn).float(), len(q), values.shape[1] // width).double()
    else:
        values, width = q.float(), 32
        exponent = in_rows(scale.view(torch.uint8), len(q), values.shape[1] // width).double() - 127
        factor = torch.where(exponent == 128, torch.nan, 2.0**exponent)
    return (values.double().reshape(len(q), -1, width) * factor[..., None]).reshape(len(q), -1)


def multiply(x, w, *, scale_a, scale_b, bias, out_dtype):
    """`torch._scaled_mm` of two operands with scales of blocks."""
    y = decoded(x, scale_a) @ decoded(w.t(), scale_b).t()
    return (y if bias is None else y + bias.double()).to(out_dtype)


@pytest.fixture
def handed(monkeypatch):
    """What the product was called with."""
    seen = {}
    monkeypatch.setattr(torch, "_scaled_mm", lambda x, w, **how: seen.update(how, x=x, w=w) or multiply(x, w, **how))
    return seen


@each_form
@pytest.mark.parametrize("arch", ["", "sm_80", "sm_89", "sm_90", *NEW, "gfx942", "gfx950"])
def test_it_is_taken_where_units_multiply_under_block_scales(form, arch):
    with kernels.imagined(kernels.Machine(gpu=arch)):
        reason = blockscaled.why_not("linear", ours(form), "cuda")
    assert (reason is None) is (arch in NEW), reason
    assert reason is None or arch in reason


@pytest.mark.parametrize(
    "given, device, said",
    [
        (ours("nvfp4", (40, 64)), "cuda", "outputs in multiples of 16"),
        (ours("nvfp4", (48, 80)), "cuda", "inputs of 32"),
        (ours("mxfp8", (48, 48)), "cuda", "inputs of 32"),
        (ours("mxfp8", (48, 64), splits=(32,)), "cuda", "input split"),
        (plan("linear", (48, 64), "nvfp4", "nvfp4/group:16/static"), "cuda", "dynamic activation scales"),
        (plan("linear", (48, 64), "mxfp8", "mxfp8/group:32/dynamic/0.2"), "cuda", "without a shift"),
        (plan("linear", (48, 64), "mxfp8", None), "cuda", "weight-only"),
        (plan("linear", (48, 64), "nvfp4", "mxfp8"), "cuda", "no block-scaled product of nvfp4 x mxfp8"),
        (plan("linear", (48, 64), "mxfp4", "mxfp4"), "cuda", "no block-scaled product of mxfp4 x mxfp4"),
        (ours("mxfp8"), "cpu", "on CUDA"),
    ],
)
def test_refusals_say_why(given, device, said):
    with kernels.imagined(kernels.Machine(gpu="sm_120")):
        assert said in blockscaled.why_not("linear", given, device)


@each_form
@pytest.mark.parametrize("arch", NEW)
def test_it_stands_before_triton(form, arch):
    with kernels.imagined(kernels.Machine(gpu=arch)):
        assert kernels.chosen("linear", ours(form), "cuda", backend="auto")[0] == "blockscaled"
    order = list(kernels.backends())
    assert order.index("blockscaled") < order.index("triton")


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 6), (300, 9)])
def test_a_scale_lies_where_the_units_look_for_it(shape):
    scale = torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    found = blockscaled.tiles(scale)
    assert torch.equal(in_rows(found, *shape), scale)
    assert found.numel() == 128 * -(-shape[0] // 128) * 4 * -(-shape[1] // 4)
    assert int((found != 0).sum()) == scale.numel()  # the rest is padding


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_layer_is_the_reference_to_its_roundings(form, dtype, bias, rank, handed):
    """Half a unit each of numbers up to the largest: the product, global scales, bias, output, three of a branch."""
    p = ours(form, rank=rank)
    t = tensors(p, dtype, bias)
    x = (torch.randn(2, 70, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 70)[:, None]).to(
        dtype
    )
    y, truth = blockscaled.build("linear", p, None)(x, t), reference.build("linear", p, None)(x.float(), t)
    assert y.dtype is dtype and y.shape == (2, 70, 144)
    room = truth.abs().amax(-1, keepdim=True) * (7 if rank else 4) * torch.finfo(dtype).eps / 2
    room = room + 2**-20 * truth.abs().amax(-1, keepdim=True)  # fp32 sums in another order
    assert ((y.float() - truth.float()).abs() <= room).all()
    assert handed["x"].dtype is handed["w"].dtype is blockscaled.ELEMENTS[form]


def test_a_bias_goes_in_where_nothing_follows_the_product(handed):
    p = ours("mxfp8")
    t, x = tensors(p, torch.bfloat16), torch.randn(3, 96)
    blockscaled.build("linear", p, None)(x.bfloat16(), t)
    assert torch.equal(handed["bias"], t.bias.bfloat16()) and handed["out_dtype"] is torch.bfloat16
    blockscaled.build("linear", p, None)(x, t)
    assert handed["bias"] is None and handed["out_dtype"] is torch.float32
    p = ours("nvfp4")
    blockscaled.build("linear", p, None)(x.bfloat16(), tensors(p, torch.bfloat16))
    assert handed["bias"] is None and handed["out_dtype"] is torch.bfloat16


@each_form
def test_rows_are_rounded_as_the_format_does_and_none_by_another(form):
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-8, 4, 5)[:, None]
    x[1] = 0
    found = blockscaled._mxfp8(x) if form == "mxfp8" else blockscaled._nvfp4(x)
    value = decoded(found.q, found.scale) * (1 if found.whole is None else found.whole.double())
    expected = reference.input_rounder(ours(form), -1)(x, None)
    torch.testing.assert_close(value.float(), expected, rtol=2**-22, atol=0)  # formats round s g to fp32


@each_form
def test_a_row_with_nan_is_nan_and_no_other_row(form, handed):
    p = ours(form)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    x[2, 40] = float("nan")
    y = blockscaled.build("linear", p, None)(x, tensors(p))
    assert y.isnan().all(1).tolist() == [False, False, True, False, False] and y[[0, 1, 3, 4]].isfinite().all()


@each_form
@pytest.mark.parametrize("count", [1, 130, 0])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torchs_own_checks_for_cuda_accept_sizes_layouts_and_dtypes(form, count, kernel, dtype, monkeypatch):
    """Rounded rows come as the Triton operator says it gives them, or from aten."""
    pytest.importorskip("triton.language")
    p = ours(form)
    if not kernel:  # what aten does for nvfp4 indexes tensors, which asks a fake one for its driver
        monkeypatch.setattr(blockscaled.triton, "why_not", lambda *given: "no")
        monkeypatch.setattr(blockscaled, "_nvfp4", blockscaled._nvfp4_in_one_kernel)
    with kernels.imagined(kernels.Machine(gpu="sm_100")):
        run = blockscaled.build("linear", p, None)
    with FakeTensorMode():
        pairs = 2 if form == "nvfp4" else 1
        t = kernels.Tensors(
            torch.empty(144, 96 // pairs, dtype=torch.int8, device="cuda"),
            torch.empty(144, 96 // (32 // pairs), dtype=torch.int8, device="cuda"),
            scale_global=torch.empty(1, device="cuda") if form == "nvfp4" else None,
            bias=torch.empty(144, dtype=dtype, device="cuda"),
        )
        y = run(torch.empty(count, 96, dtype=dtype, device="cuda"), t)
    assert y.shape == (count, 144) and y.dtype is dtype and y.device.type == "cuda"


@each_form
def test_gradients_reach_the_input(form):
    x = torch.randn(3, 96, requires_grad=True)
    p = ours(form)
    blockscaled.build("linear", p, None)(x, tensors(p)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
