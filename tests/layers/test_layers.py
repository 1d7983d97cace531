"""Layers: a draft and what it packs into agree, gradients reach what is fitted, packed layers pass for plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dq
from dq import layers
from dq.errors import DQError
from dq.fit import drafts
from dq.kernels import reference
from dq.layers import PACKED, PackedStack, hadamard
from dq.layers import packed as packed_module
from dq.layers.clock import Clock
from dq.plan import LayerPlan, TensorPlan

WEIGHTS = ("int8/channel", "int4/group:16", "int4a/group:16", "fp8/channel", "nvfp4", "mxfp4")
WEIGHTS += ("int4/group:16+channel", "lut3/channel", "vq16x4/tensor")
ACTS = (None, "int8", "int8a", "int8/tensor/static", "int8/tensor/table")
KINDS = ("linear", "conv1d", "conv2d", "conv3d")


def source(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Linear(32, 12)
    space = int(kind[-2])
    return layers.CONV_KINDS[kind](8, 6, 3, padding=1, padding_mode="circular" if space == 2 else "zeros")


def batch(module, seed=1):
    shape = (3, 5, 32) if isinstance(module, nn.Linear) else (3, 8, *[5] * len(module.kernel_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plan_of(module, weight="int8/channel", act="int8", **more):
    kind = layers.kind_of(module)
    if act in ("int8", "int8a"):
        act = f"{act}/{'token' if kind == 'linear' else 'tensor'}"
    steps = 3 if act and act.endswith("table") else 1
    parsed = TensorPlan.parse(act) if act else None
    plan = LayerPlan(kind, tuple(module.weight.shape), TensorPlan.parse(weight), parsed, steps=steps, **more)
    plan.check("layer")
    return plan


def cut(weight):
    """Where the input is split: inside a group, but not inside a vector of a codebook."""
    return (4,) if weight.startswith("vq") else (3,)


def fitted(module, plan):
    """A draft whose every tensor has moved away from neutral, at step 1 of its table."""
    draft, make = drafts.draft(module, plan), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("smooth", "proj_down", "proj_up"):
            if (value := getattr(draft, name)) is not None:
                value.copy_(torch.rand(value.shape, generator=make) * 0.5 + (0.5 if name == "smooth" else -0.25))
        if draft.act_scale is not None:
            draft.act_scale.copy_(torch.rand(draft.act_scale.shape, generator=make) * 0.02 + 0.005)
    draft.clock = Clock((300.0, 600.0))
    draft.clock.set(450.0)
    return draft


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_draft_and_its_packed_layer_give_the_same_output(weight, act, kind):
    module = source(kind)
    draft = fitted(module, plan_of(module, weight, act, smooth=True, rank=2, splits=cut(weight)))
    packed, x = draft.pack(torch.float32), batch(module)
    dq.set_backend("reference")
    try:
        packed.bind("cpu")
        torch.testing.assert_close(packed(x), draft(x), rtol=1e-5, atol=1e-5)
    finally:
        dq.set_backend("auto")
    torch.testing.assert_close(packed(x), draft(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_packing_a_draft_keeps_its_rounded_weight_to_the_bit(weight, kind):
    module = source(kind)
    draft = fitted(module, plan_of(module, weight, splits=cut(weight)))
    assert torch.equal(draft.pack(torch.float32).dense_weight(), draft.rounded_weight())


def rotated(module, smoothed, **more):
    """A draft whose weight is smoothed and rotated so that it stands for `module`."""
    plan = plan_of(module, smooth=smoothed, rotate=8 if isinstance(module, nn.Linear) else 4, **more)
    draft, weight = drafts.draft(module, plan), module.weight.detach()
    if smoothed:
        vector = torch.rand(plan.shape[1], generator=torch.Generator().manual_seed(4)) + 0.5
        draft.smooth.data.copy_(vector)
        weight = hadamard.rotate(weight / vector.reshape(1, -1, *[1] * (weight.dim() - 2)), plan.rotate, 1)
        draft.weight.data.copy_(weight)
    return draft


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothed", [False, True])
def test_rotation_and_smoothing_change_nothing_when_nothing_is_rounded(smoothed, kind):
    module = source(kind)
    draft = rotated(module, smoothed, weight="int8/group:1", act=None)  # a scale for each weight: exact
    packed, x = draft.pack(torch.float32), batch(module)
    torch.testing.assert_close(draft(x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed(x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.dense_weight(), module.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(packed.dense()(x), module(x), rtol=1e-4, atol=1e-5)
    inner = reference.weight_decoder(packed.plan)(packed.tensors()).reshape(packed.plan.shape)
    assert (inner - module.weight).abs().max() > 0.05, "the weight that is stored is another one"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["int8", "int8/tensor/static"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_rotated_layer_keeps_given_scales_and_codes_to_the_bit(weight, act, kind):
    module = source(kind)
    draft = rotated(module, True, weight=weight, act=act, splits=(8,) if kind == "linear" else (4,))
    rows, spec = draft.weight.reshape(draft.plan.rows, -1), draft.plan.weight.spec
    fitted_scales = [spec.fit(rows[:, a:b], draft.plan.weight.grain) for a, b in draft.plan.parts]
    free = draft.rounded_weight()
    draft.scales = fitted_scales if spec.fixed else [s._replace(scale=s.scale * 0.8) for s in fitted_scales]
    if draft.act_scale is not None:
        draft.act_scale.fill_(0.02)
    packed, x = draft.pack(torch.float32), batch(module)
    kept = reference.weight_decoder(packed.plan)(packed.tensors()).reshape(packed.plan.shape)
    assert torch.equal(kept, draft.rounded_weight()) and torch.equal(kept, free) == spec.fixed
    dq.set_backend("reference")
    try:
        packed.bind("cpu")
        assert torch.equal(packed(x), draft(x))
    finally:
        dq.set_backend("auto")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_rotation_that_is_not_its_own_inverse_is_undone_the_right_way(kind):
    module = nn.Linear(24, 6) if kind == "linear" else nn.Conv2d(12, 6, 3)
    packed = layers.pack("layer", module, plan_of(module, "int8/group:1", None, rotate=12), torch.float32)
    x = torch.randn((3, 24) if isinstance(module, nn.Linear) else (2, 12, 5, 5))
    torch.testing.assert_close(packed.dense_weight(), module.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(packed(x), module(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_data_free_packing_rotates_the_weight(kind):
    module = source(kind)
    plan = plan_of(module, weight="int8/channel", act=None, rotate=4)
    packed, x = layers.pack("layer", module, plan, torch.float32), batch(module)
    assert torch.equal(packed.dense_weight(), drafts.draft(module, plan).pack(torch.float32).dense_weight())
    assert (packed(x) - module(x)).abs().max() < 0.02 * module(x).abs().max()


@pytest.mark.parametrize(("rotate", "splits"), [(5, ()), (3, ()), (8, (4,)), (64, ())])
def test_blocks_that_do_not_fit_the_input_are_refused(rotate, splits):
    with pytest.raises(DQError, match=rf"layer 'layer': rotate is {rotate}, expected a divisor of its 32 inputs"):
        plan_of(source("linear"), rotate=rotate, splits=splits)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("act", ["int8", "int8/tensor/table"])
def test_gradients_reach_everything_that_is_fitted(act, kind):
    module = source(kind)
    draft = fitted(module, plan_of(module, "int4/channel", act, smooth=True, rank=2, rotate=4))
    x = batch(module).requires_grad_()
    draft(x).square().mean().backward()
    found = {name: value.grad for name, value in draft.named_parameters()} | {"x": x.grad}
    assert {"weight", "bias", "smooth", "proj_down", "proj_up", "x"} <= set(found)
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in found.values()), found
    if act.endswith("table"):
        assert (draft.act_scale.grad[[0, 2]] == 0).all()  # only the running step's row


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_a_plain_layer_with_the_output_of_the_packed_one(kind, dtype):
    module = source(kind)
    packed = fitted(module, plan_of(module, act=None, smooth=True, rank=2)).pack(dtype)
    plain, x = packed.dense(), batch(module).to(dtype)
    assert type(plain) is type(module) and plain.weight.dtype == dtype and plain.extra_repr() == module.extra_repr()
    wide, ours = plain(x).float(), packed(x).float()
    assert (wide - ours).abs().max() <= 8 * torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_layer_is_its_parent_with_plain_frozen_parameters(kind):
    module = source(kind)
    packed = layers.pack("layer", module, plan_of(module), torch.bfloat16)
    assert isinstance(packed, packed_module.PLAIN[kind]) and isinstance(packed, PACKED[kind])
    assert not list(packed.buffers()) and not packed.training == module.eval().training
    values = dict(packed.named_parameters())
    assert all(isinstance(value, nn.Parameter) and not value.requires_grad for value in values.values())
    assert {name: value.dtype for name, value in packed.state_dict().items()} == {
        "weight": torch.int8,
        "scale": torch.float32,
        "bias": torch.bfloat16,
    }
    assert not any("lora" in name for name in values)


def test_casting_moves_but_never_converts():
    packed = layers.pack("layer", source("linear"), plan_of(source("linear")), torch.float32)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    packed.to(torch.bfloat16).half().double()
    assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    assert packed.scale.dtype == torch.float32 and packed.to("meta").weight.is_meta


@torch.no_grad()
def test_a_copied_layer_runs_and_follows_set_backend():
    module = source("linear")
    packed = copy.deepcopy(layers.pack("layer", module, plan_of(module), torch.float32))
    dq.set_backend("reference")
    try:
        assert packed.choice.backend == "reference"
    finally:
        dq.set_backend("auto")
    assert packed.choice.backend != "reference" and packed(batch(module)).shape == (3, 5, 12)


def test_weights_that_are_not_finite_are_refused_by_name():
    module = source("linear")
    module.weight.data[3, 4] = torch.inf
    with pytest.raises(DQError, match=r"layer 'blocks\.0\.to_q': weight: got 1 non-finite values of 384"):
        layers.pack("blocks.0.to_q", module, plan_of(module), torch.float32)


def test_stored_scales_need_calibration():
    module = source("linear")
    with pytest.raises(DQError, match=r"layer 'to_q': plan has stored activation scales.*calibration"):
        layers.pack("to_q", module, plan_of(module, act="int8/tensor/static"), torch.float32)


def test_only_layers_with_their_parents_arithmetic_are_taken():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.Linear):
        pass

    assert [layers.kind_of(m) for m in (Named(4, 4), Doubled(4, 4), nn.LayerNorm(4))] == ["linear", None, None]
    assert layers.kind_of(layers.pack("layer", source("conv2d"), plan_of(source("conv2d")), torch.float32)) is None


@torch.no_grad()
@pytest.mark.parametrize("weight", ["int8/channel", "int4/group:16", "int4/group:16+channel", "nvfp4", "vq16x4"])
def test_stacked_experts_decode_one_by_one_and_whole(weight):
    experts = torch.randn(4, 32, 6, generator=torch.Generator().manual_seed(3))
    plan = LayerPlan("stack", (4, 32, 6), TensorPlan.parse(weight))
    stack = layers.pack_stack("experts.up", experts, plan, torch.float32)
    assert isinstance(stack, PackedStack) and stack.shape == experts.shape and stack.dtype == torch.float32
    whole = stack.dense_weight()
    assert torch.equal(torch.stack([stack[i] for i in range(4)]), whole)
    x = torch.randn(4, 5, 32)
    assert torch.equal(torch.bmm(x, stack), torch.bmm(x, whole))
    for expert in range(4):  # each output channel of each expert is a row with scales of its own
        expected = plan.weight.spec.fake(experts[expert].t().contiguous(), plan.weight.grain)
        if weight not in ("nvfp4", "vq16x4"):  # whose second-level scale or codebook spans all experts
            assert torch.equal(stack[expert], expected.t())
