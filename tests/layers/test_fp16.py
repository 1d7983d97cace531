"""fp16 ends at 65504: a layer whose output is far below that gives it, whatever the sums inside would have been."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

import dq
from dq import kernels, layers
from dq.fit import drafts
from dq.kernels import Tensors, dense
from dq.plan import LayerPlan, TensorPlan
from tests.models import same_state

HALF = torch.float16
WEIGHTS = ("int8/channel", "int8/group:64", "int4/channel", "int4/group:64", "int4a/group:64", "fp8/channel", "nvfp4")
WEIGHTS += ("int4/group:64+channel", "lut4/channel", "vq256x4")
BACKENDS = [name for name in kernels.backends() if name != "triton"]


def relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.double() - truth.double()).norm() / truth.double().norm())


def plan_of(module, weight, act=None, **more):
    form = None if act is None else TensorPlan.parse(act)
    return LayerPlan(layers.kind_of(module), tuple(module.weight.shape), TensorPlan.parse(weight), form, **more)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind, rows", [("linear", 4), ("linear", 64), ("conv2d", 1)])
def test_sums_of_codes_may_be_beyond_fp16_where_the_output_is_not(kind, rows, weight, backend):
    torch.manual_seed(0)
    module = nn.Linear(4096, 24) if kind == "linear" else nn.Conv2d(1024, 24, 2)
    x = (20 * torch.randn((rows, 4096) if kind == "linear" else (2, 1024, 4, 4))).half()
    packed = layers.pack("layer", module, plan_of(module, weight), HALF)
    packed.backend = backend
    truth = (
        nn.functional.linear(x.double(), packed.dense_weight().double(), packed.bias.double())
        if kind == "linear"
        else nn.functional.conv2d(x.double(), packed.dense_weight().double(), packed.bias.double())
    )
    y = packed(x)
    assert y.dtype is HALF and relative(y, truth) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 8])
def test_the_middle_of_a_branch_stays_within_the_range_of_its_input(rank):
    """Rank 1 of a wide layer: the input's part along one direction is its whole norm."""
    torch.manual_seed(0)
    module, x = nn.Linear(4096, 4096, bias=False), torch.randn(3, 4096)
    down = torch.randn(rank, 4096)
    x = (1500 * (x + 20 * down[0])).clamp(-30000, 30000).half()
    up = 2e-4 * torch.randn(4096, rank)
    assert (x.float() @ down.t()).abs().max() > 1e7  # many times beyond the range
    tensors = Tensors(module.weight, module.weight, down=down.half(), up=up.half())
    y = dense.low_rank(x, tensors, plan_of(module, "int8", rank=rank), None)
    truth = x.double() @ down.half().double().t() @ up.half().double().t()
    inside = truth.abs() < 60000
    assert inside.any() and relative(y[inside], truth[inside]) < 3e-3


def test_factors_of_a_branch_stay_as_they_are_in_other_dtypes():
    tensors = Tensors(torch.ones(1), torch.ones(1), down=torch.randn(4, 64) * 100, up=torch.randn(32, 4))
    for dtype in (torch.bfloat16, torch.float32):
        down, up = dense.factors(tensors, dtype)
        assert torch.equal(down, tensors.down.to(dtype)) and torch.equal(up, tensors.up.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("act", ["int8/token", "int4/group:64", None])
def test_a_rotated_or_smoothed_input_may_be_beyond_fp16_where_the_output_is_not(act):
    torch.manual_seed(0)
    module = nn.Linear(256, 64)
    draft = drafts.draft(module, plan_of(module, "int8/channel", act, rotate=64, smooth=True, rank=4))
    draft.smooth.data.uniform_(1, 8)
    draft.weight.data.copy_(draft.unrounded())
    packed = draft.pack(HALF)
    x = (20000 * torch.ones(5, 256) + 500 * torch.randn(5, 256)).half()  # of one sign: the first of 64 grows eightfold
    assert 8 * x.max() > 65504
    full, truth = module(x.float()), packed(x.float())
    y = packed(x)
    assert (
        y.dtype is HALF and relative(y, truth) < 1e-3 and relative(y, full) < (0.05 if act != "int4/group:64" else 1)
    )


# --- layers that a host keeps in fp32 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A T5 on disk whose feed-forward outputs are beyond fp16, which is why transformers keeps `wo` in fp32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 512, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    for block in model.encoder.block:
        for name, factor in (("wi_0", 20), ("wi_1", 20), ("wo", 1000)):
            block.layer[1].DenseReluDense.get_submodule(name).weight.data *= factor
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def encode(model):
    return model(torch.arange(10).reshape(1, 10)).last_hidden_state.float()


def load(folder, dtype=HALF, **options):
    return T5EncoderModel.from_pretrained(folder, dtype=dtype, **options).eval()


@pytest.mark.parametrize("recipe", ["int8-weight", "int8", "int4-weight"])
def test_t5_in_fp16_is_as_near_to_full_precision_as_in_fp32(encoder, recipe, tmp_path):
    wide, model = load(encoder, torch.float32), load(encoder)
    full = encode(wide)
    assert relative(encode(model), full) < 1e-2  # transformers' own
    dq.quantize(wide, recipe, progress=False)
    dq.quantize(model, recipe, progress=False)
    y = encode(model)
    assert relative(y, full) < 1.1 * relative(encode(wide), full) + 1e-3
    arriving = load(encoder, quantization_config=dq.DQConfig(recipe))
    assert same_state(arriving, model) and torch.equal(encode(arriving), y)
    model.save_pretrained(tmp_path)
    assert torch.equal(encode(T5EncoderModel.from_pretrained(tmp_path).eval()), y)


def test_dequantized_layers_are_fp32_again_where_the_host_keeps_them_so(encoder):
    model = load(encoder)
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    assert torch.float32 in kinds.values() and HALF in kinds.values()
    dq.quantize(model, "int8-weight", progress=False)
    y = encode(model)
    dq.dequantize(model)
    assert {name: value.dtype for name, value in model.named_parameters()} == kinds
    assert relative(encode(model), y) < 5e-3
