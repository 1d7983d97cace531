"""fp8 through torch's scaled product: who is refused, what is handed over, the numbers where CPUs have it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dq import kernels
from dq.formats import get
from dq.kernels import reference, scaled
from tests.kernels.test_kernels import plan, tensors

FP8 = ("fp8/channel", "fp8/token")
GIVEN = plan("linear", (48, 64), *FP8)


@pytest.fixture
def handed(monkeypatch):
    """What `_scaled_mm` was called with; it still runs."""
    seen, real = {}, torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda q, w, **how: seen.update(how) or real(q, w, **how))
    return seen


@pytest.mark.parametrize(
    "arch", ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx1100", "gfx950"]
)
def test_it_is_taken_where_the_chip_has_this_e4m3(arch):
    """ROCm's chips before gfx950 and gfx12 have none or another one, whatever compute capability they report."""
    with kernels.imagined(kernels.Machine(gpu=arch)):
        reason = scaled.why_not("linear", GIVEN, "cuda")
    assert (reason is None) is (arch in ("sm_89", "sm_90", "sm_103", "sm_120", "gfx950")), reason


@pytest.mark.parametrize(
    "given, device, said",
    [
        (plan("linear", (24, 64), *FP8), "cuda", "multiples of 16"),
        (plan("linear", (48, 40), *FP8), "cuda", "multiples of 16"),
        (plan("linear", (48, 64), *FP8, splits=(32,)), "cuda", "one dynamic scale per row"),
        (plan("linear", (48, 64), "fp8/channel", "fp8/token/static"), "cuda", "one dynamic scale per row"),
        (plan("linear", (48, 64), "fp8/channel", "fp8/token/dynamic/0.17"), "cuda", "without a shift"),
        (plan("linear", (48, 64), "fp8/tensor", "fp8/token"), "cuda", "one weight scale per output channel"),
        (plan("linear", (48, 64), "fp8/channel", None), "cuda", "weight-only"),
        (plan("linear", (48, 64), "int8/channel", "int8/token"), "cuda", "no scaled product of int8 x int8"),
        (GIVEN, "cpu", "on CUDA"),
    ],
)
def test_refusals_say_why(given, device, said):
    with kernels.imagined(kernels.Machine(gpu="sm_90")):
        assert said in scaled.why_not("linear", given, device)


def test_it_stands_before_triton():
    order = list(kernels.backends())
    assert order.index("scaled") < order.index("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_layer_is_the_reference_to_two_roundings_of_its_output(dtype, bias, rank):
    """bf16 rounds the product to 2^-9 of it, and the output once more with bias or branch."""
    p = plan("linear", (48, 64), *FP8, rank=rank)
    t = tensors(p, dtype, bias)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, truth = scaled.build("linear", p, None)(x, t), reference.build("linear", p, None)(x.float(), t)
    assert y.dtype is dtype and y.shape == (2, 3, 48)
    room = truth.abs().max() * 3 * 2**-9
    assert (y.float() - truth.float()).abs().max() <= room


def test_sums_are_fp32_and_the_bias_of_a_bf16_layer_goes_in(handed):
    t, x = tensors(GIVEN, torch.bfloat16), torch.randn(3, 64)
    scaled.build("linear", GIVEN, None)(x.bfloat16(), t)
    assert handed["use_fast_accum"] is False and handed["out_dtype"] is torch.bfloat16
    assert torch.equal(handed["bias"], t.bias.bfloat16())
    scaled.build("linear", GIVEN, None)(x, t)
    assert handed["bias"] is None


def test_rows_are_rounded_as_the_format_does():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[1.0], [0.0], [1e4], [1e-6], [1]]
    )
    q, scale = scaled.rounded(x)
    e = get("fp8").encode(x, reference.PER_ROW)
    assert torch.equal(scale, e.scale) and torch.equal(q.view(torch.int8), e.codes.view(torch.int8))


def test_torchs_own_checks_for_cuda_accept_sizes_layouts_and_dtypes(monkeypatch):
    """The shape rules of `_scaled_mm` for CUDA, on tensors without data; weights that are not transposed fail them."""
    monkeypatch.setattr(scaled, "_in_one_kernel", lambda device: False)
    with FakeTensorMode():
        x = torch.empty(3, 64, dtype=torch.bfloat16, device="cuda")
        t = kernels.Tensors(
            torch.empty(48, 64, dtype=torch.int8, device="cuda"),
            torch.empty(48, 1, device="cuda"),
            bias=torch.empty(48, dtype=torch.bfloat16, device="cuda"),
        )
        y = scaled.build("linear", GIVEN, None)(x, t)
    assert y.shape == (3, 48) and y.dtype is torch.bfloat16


def test_gradients_reach_the_input():
    x = torch.randn(3, 64, requires_grad=True)
    scaled.build("linear", GIVEN, None)(x, tensors(GIVEN)).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
