"""dq's native convolutions at every CPU level: exact sums, the reference's codes, 1 to 3 dimensions, any memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dq import kernels, layers
from dq.kernels import Conv, Tensors, reference
from dq.kernels.cpu import library, ops
from dq.plan import LayerPlan, TensorPlan
from tests.kernels.levels import each_level, generator, level, levels  # noqa: F401

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))
few = settings(max_examples=40, deadline=None, derandomize=True)
RAGGED = st.sampled_from((1, 3, 5, 16, 63, 65, 130, 150))
OUTPUTS = st.sampled_from((1, 2, 17, 63, 65, 90))
ROOM = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8 * 1.01, torch.float16: 2.0**-11 * 1.05}
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
PLAIN = Conv((1, 1), (0, 0), (1, 1), 1)


def plan(shape, weight="int8/channel", act="int8a/tensor"):
    return LayerPlan(f"conv{len(shape) - 2}d", tuple(shape), TensorPlan.parse(weight), TensorPlan.parse(act))


def tensors(p, bias=None, **more):
    packed = layers.encode(torch.randn(p.rows, p.columns, generator=generator(p.columns)), p)
    return Tensors(packed["weight"], packed["scale"], bias=bias, **more)


def run(x, p, conv, t):
    assert kernels.cpu.why_not("conv", p, "cpu", conv) is None
    return kernels.cpu.build("conv", p, conv)(x, t)


def in_memory(x, last):
    return x.contiguous(memory_format=MEMORY[x.dim()]) if last and x.dim() in MEMORY else x


def pixels(shape, dtype=torch.float32, last=False, seed=0):
    """Samples of very different sizes, all off centre."""
    x = torch.randn(*shape, generator=generator(seed)) + 0.3
    size = torch.tensor([1.0, 70.0, 1e-3])[: shape[0]].reshape(-1, *[1] * (len(shape) - 1))
    return in_memory((x * size).to(dtype), last)


def follows(ours, truth, dtype):
    """Every sample within the rounding of its own largest entry."""
    assert ours.dtype == dtype and ours.shape == truth.shape
    for mine, exact in zip(ours.float(), truth, strict=True):
        assert (mine - exact).abs().max() <= ROOM[dtype] * exact.abs().max() + 1e-6


# what a convolution may be, in one to three dimensions
SHAPES = {
    "channels": RAGGED,
    "outputs": OUTPUTS,
    "space": st.integers(1, 3),
    "kernel": st.integers(1, 4),
    "stride": st.integers(1, 3),
    "padding": st.integers(0, 2),
    "dilation": st.integers(1, 2),
    "width": st.integers(1, 19),
    "last": st.booleans(),
    "bits": st.sampled_from((8, 4, 5)),
}


def geometry(space, kernel, stride, padding, dilation, width):
    """-> sizes of the input, of the kernel (last one longer by one), Conv; an output of at least one pixel."""
    sizes, kernels_ = [7, 9, width][-space:], [kernel] * (space - 1) + [kernel + 1]
    conv = Conv((stride,) * space, (padding,) * space, (dilation,) * space, 1)
    assume(all(out > 0 for out in reference.out_sizes(sizes, kernels_, conv)))
    return sizes, kernels_, conv


@each_level
@few
@given(**SHAPES, seed=st.integers(0, 99))
def test_sums_are_exact(channels, outputs, last, bits, seed, **shape):
    """Samples whose largest entry is 127 have scale 1: the result is the integer convolution, to the bit."""
    sizes, kernel, conv = geometry(shape.pop("space"), **shape)
    p, make = plan((outputs, channels, *kernel), f"int{bits}/channel", "int8/tensor"), generator(seed)
    top = p.weight.spec.max_code
    codes = torch.randint(-top, top + 1, (outputs, p.columns), generator=make).to(torch.int8)
    x = torch.randint(-127, 128, (2, channels, *sizes), generator=make).float()
    x.flatten(1)[:, 0] = 127
    y = run(in_memory(x, last), p, conv, Tensors(p.weight.spec.pack(codes), torch.ones(outputs, 1)))
    exact = reference.CONVS[len(sizes)](x.double(), codes.double().reshape(p.shape), None, *conv[:3])
    assert torch.equal(y.double(), exact)


@each_level
@pytest.mark.parametrize(("bits", "byte", "code"), [(8, 127, 127), (4, 0x77, 7), (4, 0x88 - 256, -8)])
def test_sums_of_the_largest_codes_do_not_saturate(bits, byte, code):
    p = plan((70, 1280, 3, 3), f"int{bits}/channel", "int8/tensor")
    t = Tensors(torch.full((70, p.columns * bits // 8), byte, dtype=torch.int8), torch.ones(70, 1))
    for sign in (1.0, -1.0):
        y = run(torch.full((1, 1280, 3, 5), 127.0 * sign), p, PLAIN, t)
        assert torch.equal(y, torch.full((1, 70, 1, 3), sign * 127.0 * code * p.columns))


@each_level
@few
@given(
    **SHAPES,
    act=st.sampled_from(("int8a/tensor", "int8/tensor", "int6a/tensor")),
    dtype=st.sampled_from(list(ops.DTYPES)),
)
def test_layers_follow_the_reference(channels, outputs, last, bits, act, dtype, **shape):
    sizes, kernel, conv = geometry(shape.pop("space"), **shape)
    p = plan((outputs, channels, *kernel), f"int{bits}/channel", act)
    t, x = tensors(p, torch.randn(outputs).to(dtype)), pixels((2, channels, *sizes), dtype, last)
    ours = run(x, p, conv, t)
    follows(ours, reference.build("conv", p, conv)(x.float(), t), dtype)
    if outputs > 1 and channels > 1:  # callers take views of it
        theirs = reference.CONVS[len(sizes)](x.float(), torch.ones(p.shape), None, *conv[:3])
        assert ours.stride() == theirs.stride()


@pytest.mark.skipif(len(levels()) < 2, reason="one level runs here")
@few
@given(
    **SHAPES,
    act=st.sampled_from(("int8a/tensor", "int8/tensor")),
    dtype=st.sampled_from(list(ops.DTYPES)),
)
def test_every_level_gives_the_same_bits(channels, outputs, last, bits, act, dtype, **shape):
    sizes, kernel, conv = geometry(shape.pop("space"), **shape)
    p = plan((outputs, channels, *kernel), f"int{bits}/channel", act)
    t, x, results = tensors(p, torch.randn(outputs).to(dtype)), pixels((2, channels, *sizes), dtype, last), []
    for name in levels():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "level", lambda name=name: name)
            results.append(run(x, p, conv, t))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_level
@pytest.mark.parametrize("last", [False, True])
def test_a_kernel_larger_than_the_image_sees_padding(last):
    p, conv = plan((65, 5, 7, 7)), Conv((1, 1), (3, 3), (1, 1), 1)
    t, x = tensors(p, torch.randn(65)), pixels((3, 5, 2, 3), last=last)
    follows(run(x, p, conv, t), reference.build("conv", p, conv)(x, t), torch.float32)


@each_level
def test_more_taps_than_registers():
    """A kernel of 49 and one of 125 taps: the tables of the byte permutations end at 32."""
    for shape in ((9, 70, 7, 7), (9, 6, 5, 5, 5)):
        p, conv = plan(shape), Conv(*[(step,) * (len(shape) - 2) for step in (1, 2, 1)], 1)
        t, x = tensors(p), pixels((2, shape[1], *[6] * (len(shape) - 2)))
        follows(run(x, p, conv, t), reference.build("conv", p, conv)(x, t), torch.float32)


@each_level
@pytest.mark.parametrize("act", ["int8/tensor/static", "int8/token/static"])
def test_a_stored_scale_is_used(act):
    p = plan((9, 6, 1, 1), act=act)
    t, x = tensors(p, act_scale=torch.tensor([0.03])), pixels((2, 6, 5, 7))
    follows(run(x, p, PLAIN, t), reference.build("conv", p, PLAIN)(x, t), torch.float32)


# --- one scale a pixel -----------------------------------------------------------------------------------------------


@each_level
@few
@given(
    channels=RAGGED,
    outputs=OUTPUTS,
    size=st.tuples(st.integers(1, 12), st.integers(1, 19)),
    weight=st.sampled_from(("int8", "int4", "int6a")),
    act=st.sampled_from(("int8/token", "int8a/token")),
    dtype=st.sampled_from(list(ops.DTYPES)),
)
def test_a_pointwise_convolution_is_the_linear_of_its_pixels(channels, outputs, size, weight, act, dtype):
    """Channels apart are read as they are; the linear, which sees them side by side, gives the same bits."""
    p = plan((outputs, channels, 1, 1), f"{weight}/channel", act)
    t, x = tensors(p, torch.randn(outputs).to(dtype)), pixels((2, channels, *size), dtype)
    x[0] *= torch.linspace(0.1, 9, size[1]).to(dtype)
    rows = kernels.cpu._linear(p)(x.movedim(1, -1), t).movedim(-1, 1)
    assert torch.equal(run(x, p, PLAIN, t), rows)
    follows(rows, reference.build("conv", p, PLAIN)(x.float(), t), dtype)
    assert run(x, p, PLAIN, t).is_contiguous()


@each_level
@pytest.mark.parametrize("last", [False, True])
def test_the_op_takes_a_scale_a_pixel_in_any_memory(last):
    """Layers read neighbouring channels by the linear op; this one may be asked, too."""
    p = plan((9, 70, 1, 1), act="int8a/token")
    t, x = tensors(p), pixels((2, 70, 5, 7), last=last)
    ones = {"kernel_size": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    given = {"weight_bits": 8, "act_bits": 8, "act_affine": True, "per_pixel": True} | ones
    assert torch.equal(torch.ops.dq.cpu_conv(x, t.weight, t.scale, **given), run(x, p, PLAIN, t))
    with pytest.raises(ValueError, match="a scale a pixel"):
        torch.ops.dq.cpu_conv(x, t.weight, t.scale, **given | {"stride": [2, 2]})


# --- any values, any memory ------------------------------------------------------------------------------------------


@each_level
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(bad):
    p, conv = plan((8, 4, 3, 3)), Conv((1, 1), (1, 1), (1, 1), 1)
    x = torch.randn(3, 4, 9, 9, generator=generator(1))
    clean = run(x, p, conv, tensors(p))
    x[1, 0, 0, 0] = bad
    y = run(x, p, conv, tensors(p))
    assert not y[1].isfinite().any() and torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])
    assert bad == float("inf") or y[1].isnan().all()


@each_level
def test_nan_stays_in_its_pixel():
    p = plan((8, 40, 1, 1), act="int8a/token")
    x = torch.randn(2, 40, 9, 9, generator=generator(1))
    clean = run(x, p, PLAIN, tensors(p))
    x[1, 3, 4, 5] = x[1, 39, 8, 8] = float("nan")
    y, expected = run(x, p, PLAIN, tensors(p)), clean.clone()
    expected[1, :, 4, 5] = expected[1, :, 8, 8] = float("nan")
    assert torch.equal(y.nan_to_num(77), expected.nan_to_num(77))


@each_level
@pytest.mark.parametrize("spread", [1e-33, 1e33])
def test_tiny_and_huge_pixels_have_the_references_codes(spread):
    p = plan((20, 20, 1, 1), act="int8/token")
    t = Tensors(torch.eye(20, dtype=torch.int8), torch.ones(20, 1))
    x = torch.randn(1, 20, 3, 11, generator=generator(1))
    x[..., ::2] *= spread  # plain neighbours in the same vector
    assert torch.allclose(run(x, p, PLAIN, t), reference.input_rounder(p, 1)(x, None), rtol=3e-7, atol=0)


@each_level
def test_slices_and_turned_images():
    p, conv = plan((33, 6, 3, 3)), Conv((2, 1), (1, 0), (1, 1), 1)
    t, wide = tensors(p), torch.randn(2, 9, 20, 24, generator=generator(1))
    for x in (wide[:, 2:8], wide[:, :6, :, 3:], wide[:, :6].transpose(2, 3), wide[:, 1:7, ::2]):
        assert torch.equal(run(x, p, conv, t), run(x.clone(memory_format=torch.contiguous_format), p, conv, t))


@each_level
def test_no_samples_give_no_samples():
    p = plan((9, 6, 3, 3))
    assert run(torch.empty(0, 6, 5, 5), p, Conv((1, 1), (1, 1), (1, 1), 1), tensors(p)).shape == (0, 9, 5, 5)


@each_level
def test_a_branch_is_added():
    p = LayerPlan("conv2d", (9, 6, 1, 1), TensorPlan.parse("int8/channel"), TensorPlan.parse("int8a/token"), rank=2)
    down, up = torch.randn(2, 6, generator=generator(0)), torch.randn(9, 2, generator=generator(1))
    t, x = tensors(p, down=down, up=up), pixels((2, 6, 5, 7))
    without = run(x, p, PLAIN, t._replace(down=None, up=None))
    branch = F.conv2d(x, (up @ down)[:, :, None, None])
    assert torch.allclose(run(x, p, PLAIN, t), without + branch, rtol=1e-5, atol=1e-4)
