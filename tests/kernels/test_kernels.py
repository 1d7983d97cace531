"""Kernels: integer sums exact; every backend found in dq/kernels within twice torch's own rounding of the truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dq import kernels, layers
from dq.errors import DQError
from dq.formats import get
from dq.kernels import Tensors, reference, torchops
from dq.plan import LayerPlan, TensorPlan

BACKENDS = list(kernels.backends())
WEIGHTS = ("int8/channel", "int8/tensor", "int4/group:16", "int8a/channel", "fp8/channel", "nvfp4", "mxfp4")
WEIGHTS += ("int4/group:16+channel", "int3/group:16+channel", "lut4/channel", "lut3/group:16")
ACTS = (None, "int8/token", "int8a/token", "int4/token", "fp8/token", "nvfp4", "int8/token/static", "int8/token/table")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 70)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def plan(kind, shape, weight="int8/channel", act="int8/token", **more):
    return LayerPlan(kind, tuple(shape), TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, **more)


def tensors(p, dtype=torch.float32, bias=True, seed=0, spread=0.02):
    """Random packed tensors that fit the plan; activation scales `spread`, which lets some values saturate."""
    make = generator(seed)
    weight = torch.randn(p.rows, p.columns, generator=make)
    packed = layers.encode(weight, p)
    b = torch.randn(p.shape[0], generator=make).to(dtype) if bias else None
    act = torch.full((len(p.parts),), spread) if p.act is not None and p.act.scale != "dynamic" else None
    down, up = None, None
    if p.rank:
        down, up = (torch.randn(*size, generator=make).to(dtype) for size in ((p.rank, p.columns), (p.rows, p.rank)))
    extra = (packed.get("zero"), packed.get("scale_global"))
    return Tensors(packed["weight"], packed["scale"], *extra, b, act, down, up, packed.get("table"))


def to_device(t, device):
    return Tensors(*(None if value is None else value.to(device) for value in t))


def truth_and_torch(op, p, conv, x, t):
    """-> (fp32 reference, torch with the same rounded operands in x's dtype), both fp32."""
    truth = reference.build(op, p, conv)(x.float(), t)
    x_hat = reference.input_rounder(p, -1 if op == "linear" else 1)(x.float(), t.act_scale).to(x.dtype)
    weight = reference.weight_decoder(p)(t).reshape(p.shape).to(x.dtype)
    bias = None if t.bias is None else t.bias.to(x.dtype)
    run = F.linear if op == "linear" else reference.CONVS[len(p.shape) - 2]
    y = run(x_hat, weight, bias, *(conv or ()))
    if t.down is not None:
        y = y + kernels.dense.low_rank(x, t, p, conv)
    return truth, y.float()


def within_twice_torch(ours, truth, theirs, dtype):
    room = 2 * (theirs - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (ours.float() - truth).abs().max() <= room


# --- integer sums ----------------------------------------------------------------------------------------------------

# oneDNN's AVX2 product adds pairs in 16 bits, which saturate; `why_not` refuses it there
needs_vnni = pytest.mark.skipif(not kernels.vnni(), reason="torch._int_mm is refused without VNNI")


@needs_vnni
@few
@given(rows=st.integers(0, 40), k=st.integers(1, 90), n=sizes, seed=st.integers(0, 99))
def test_integer_product_is_exact(rows, k, n, seed):
    make = generator(seed)
    q, w = (torch.randint(-127, 128, (size, k), generator=make).to(torch.int8) for size in (rows, n))
    product = torchops._int_product(q, w)
    assert product.dtype == torch.int32
    assert torch.equal(product.double(), q.double() @ w.double().t())


@needs_vnni
@pytest.mark.parametrize("act", ["int8/token", "int8a/token"])
def test_integer_linear_is_exact_up_to_its_scales(act):
    p = plan("linear", (24, 500), act=act)
    t, x = tensors(p, bias=False), torch.rand(17, 500, generator=generator(1)) * 9 - 2
    q, scale, zero = torchops.quantize_rows(x, p.act.spec)
    codes = q.double() - (0 if zero is None else zero.double())
    expected = ((codes @ t.weight.double().t()).float() * scale) * t.scale.t()
    assert torch.equal(torchops.build("linear", p, None)(x, t), expected)


@needs_vnni
@pytest.mark.parametrize("space", [1, 2, 3])
def test_integer_convolution_does_not_saturate(space):
    """Every product at its largest: 64 inputs times the taps of 127 x 127 overflow 16 bits many times over."""
    p = plan(f"conv{space}d", (3, 64, *[3] * space), act="int8/tensor")
    t = Tensors(torch.full((3, p.columns), 127, dtype=torch.int8), torch.ones(3, 1))
    conv = kernels.Conv((1,) * space, (0,) * space, (1,) * space, 1)
    y = torchops.build("conv", p, conv)(torch.full((1, 64, *[3] * space), 127.0), t)
    assert torch.equal(y.flatten(), torch.full((3,), 127.0 * 127 * p.columns))


# --- every backend against the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), k=st.integers(2, 70), n=sizes, data=st.data())
def test_linear_is_within_twice_torchs_rounding(backend, device, act, weight, rows, k, n, data):
    rank, splits, bias = (data.draw(st.sampled_from(pick)) for pick in ((0, 3), ((), (k // 2,)), (True, False)))
    p = plan("linear", (n, k), weight, act, rank=rank, splits=splits)
    if (module := kernels.backends()[backend]).why_not("linear", p, device):
        return
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    t = to_device(tensors(p, dtype, bias), device)
    spread = data.draw(st.sampled_from((1e-6, 1.0, 1e6)))
    x = (torch.randn(rows, k, generator=generator(2)) * spread).to(device, dtype)
    ours = module.build("linear", p, None)(x, t)
    assert ours.dtype == dtype and ours.shape == (rows, n)
    within_twice_torch(ours, *truth_and_torch("linear", p, None, x, t), dtype)


torch.manual_seed(0)
CONVOLUTIONS = [
    nn.Conv1d(6, 5, 3, padding=1),
    nn.Conv1d(6, 4, 3, padding="same", dilation=2, bias=False),
    nn.Conv2d(6, 5, 3, padding=1),
    nn.Conv2d(6, 5, (1, 3), padding=(0, 1), stride=2),
    nn.Conv2d(6, 5, 3, padding=2, dilation=2),
    nn.Conv2d(6, 4, 3, padding=1, groups=2),
    nn.Conv2d(6, 6, 3, padding=1, groups=6),
    nn.Conv2d(6, 5, 4, padding="same"),
    nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(6, 5, 3, padding=2, padding_mode="reflect"),
    nn.Conv2d(6, 5, 3, padding=1, padding_mode="replicate", stride=2),
    nn.Conv2d(6, 5, 2, stride=2, bias=False),
    nn.Conv2d(6, 5, 1),
    nn.Conv3d(6, 5, 3, padding=1),
    nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0), stride=(2, 1, 1)),
    nn.Conv3d(6, 5, 1),
]


def packed_conv(module, weight, act, dtype):
    shape = tuple(module.weight.shape)
    p = plan(f"conv{len(shape) - 2}d", shape, weight, act)
    p.check("conv")
    return layers.pack("conv", module.to(dtype), p, dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [None, "int8/tensor", "int8a/tensor", "fp8/tensor", "int8a/token"])
@pytest.mark.parametrize("module", CONVOLUTIONS, ids=lambda module: module._get_name() + f"({module.extra_repr()})")
def test_convolution_equals_torchs_on_rounded_input_and_weight(module, act, dtype):
    if act and act.endswith("token") and set(module.kernel_size) != {1}:
        return
    layer = packed_conv(module, "int8/channel", act, dtype)
    x = torch.randn(2, 6, *[7] * len(module.kernel_size), generator=generator(3)).to(dtype)
    x[1] *= 40
    x_hat = rounded(x.float(), layer.plan.act)
    wide = module.float()
    wide.weight.data, bias = layer.dense_weight(), module.bias
    truth = wide(x_hat)
    theirs = module.to(dtype)(x_hat.to(dtype)).float()
    module.float()
    for backend in ("auto", "reference"):
        kernels.select(backend)
        layer.bind("cpu")
        kernels.select("auto")
        within_twice_torch(layer(x), truth, theirs, dtype)
    assert layer(x).dtype == dtype and (bias is None) == (layer.bias is None)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


def rounded(x, act):
    """x quantized and decoded independently of dq.kernels: a scale per sample, or per pixel for `token`."""
    if act is None:
        return x
    if act.granularity == "token":
        return act.spec.fake(x.movedim(1, -1), "token").movedim(-1, 1)
    return act.spec.fake(x.flatten(1), "token").reshape(x.shape)


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", [None, "int8/token", "int8a/token", "fp8/token"])
def test_odd_inputs_of_a_linear(backend, act):
    p = plan("linear", (5, 33), act=act)
    module = kernels.backends()[backend]
    if module.why_not("linear", p, "cpu"):
        return
    run, t = module.build("linear", p, None), tensors(p)
    x = torch.randn(6, 33, generator=generator(4))
    assert run(x[:0], t).shape == (0, 5)
    assert run(x[0], t).shape == (5,)
    assert run(x.reshape(2, 3, 33), t).shape == (2, 3, 5)
    assert torch.equal(run(torch.zeros(2, 33), t), t.bias.expand(2, 5))
    spoiled = x.clone()
    spoiled[2, 7] = torch.nan
    y = run(spoiled, t)
    others = [0, 1, 3, 4, 5]
    assert y[2].isnan().all() and torch.equal(y[others], run(x, t)[others])


@pytest.mark.parametrize("act", ["int8/token", "int8a/token"])
@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_extreme_inputs_stay_finite_or_vanish(act, size):
    p = plan("linear", (4, 16), act=act)
    t = tensors(p, bias=False)._replace(scale=torch.full((4, 1), 1e-4))
    y = torchops.build("linear", p, None)(torch.full((1, 16), size), t)
    if act == "int8/token" or size < 3e38:  # an affine range of 6e38 has no fp32 number
        assert not y.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("act", [None, "int8/tensor", "int8a/tensor"])
def test_a_nan_pixel_spoils_its_own_sample_only(act):
    layer = packed_conv(nn.Conv2d(6, 5, 3, padding=1), "int8/channel", act, torch.float32)
    x = torch.randn(3, 6, 8, 8, generator=generator(5))
    clean = layer(x)
    x[1, 2, 4, 4] = torch.nan
    y = layer(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1].isnan().any()
    assert act is None or y[1].isnan().all()


@few
@given(rows=st.integers(2, 9), seed=st.integers(0, 99))
def test_no_dynamic_scale_crosses_rows(rows, seed):
    p = plan("linear", (8, 32), act="int8a/token")
    run, t, x = torchops.build("linear", p, None), tensors(p), torch.randn(rows, 32, generator=generator(seed))
    noisy = x.clone()
    noisy[1:] *= 1e4
    assert torch.equal(run(x, t)[0], run(noisy, t)[0])


# --- choice ----------------------------------------------------------------------------------------------------------


INT8_HERE = ("linear", plan("linear", (8, 8)), "cpu")


def test_the_fast_kernel_is_chosen_and_every_refusal_has_a_reason():
    quick = kernels.choose("linear", plan("linear", (8, 8)), "cpu")
    able = [name for name in ("cpu", "torchops") if not kernels.backends()[name].why_not(*INT8_HERE)]
    assert quick.backend == [*able, "dense"][0] and quick.emulated == (not able)
    assert able == [] or "int8 x int8" in quick.label
    slow = kernels.choose("linear", plan("linear", (8, 8), "fp8/channel", act=None), "cpu")
    assert slow.backend == "dense" and ("torchops", "weight-only: activations stay in floating point") in slow.refusals


@pytest.mark.parametrize("act", ["int4/group:16", "int8/group:16"])
def test_activation_groups_are_left_to_kernels_that_have_them(act):
    """An integer product over all columns would silently take one scale a row."""
    p = plan("linear", (24, 64), "int8/channel", act)
    assert "per token, not per group" in torchops.why_not("linear", p, "cpu")
    choice = kernels.choose("linear", p, "cpu")
    x = torch.randn(17, 64, generator=generator(8)) * torch.logspace(0, 3, 4).repeat_interleave(16)
    t = tensors(p)
    truth = reference.build("linear", p, None)(x, t)
    assert choice.backend != "torchops" and torch.allclose(choice.run(x, t), truth, rtol=1e-4, atol=1e-2)
    coarse = reference.build("linear", plan("linear", (24, 64), act=act.replace("group:16", "token")), None)(x, t)
    assert (coarse - truth).abs().max() > 1, "groups make a difference on this input"


def test_a_selected_backend_says_why_the_others_were_passed_over():
    kernels.select("reference")
    try:
        choice = kernels.choose("linear", plan("linear", (8, 8)), "cpu")
    finally:
        kernels.select("auto")
    assert choice.backend == "reference"
    assert all("dq.set_backend" in reason for _, reason in choice.refusals) and choice.refusals


def test_an_unknown_backend_is_refused_with_the_nearest_name():
    with pytest.raises(DQError, match=r"backend 'torchop' is unknown.*Did you mean 'torchops'"):
        kernels.select("torchop")


def test_gradients_reach_the_input_of_an_integer_layer():
    p = plan("linear", (7, 20), rank=2)
    t = tensors(p)
    x = torch.randn(5, 20, generator=generator(6), requires_grad=True)
    torchops.build("linear", p, None)(x, t).square().sum().backward()
    wide = x.detach().clone().requires_grad_()
    reference.build("linear", p, None)(wide, t).square().sum().backward()
    torch.testing.assert_close(x.grad, wide.grad)


def test_per_row_scales_are_those_of_the_format():
    x = torch.randn(9, 31, generator=generator(7))
    q, scale, zero = torchops.quantize_rows(x, get("int8"))
    expected = get("int8").encode(x, "token")
    assert zero is None and torch.equal(q, expected.codes) and torch.equal(scale, expected.scale)
