"""Blocks on fused kernels: which places are found, the same numbers, and everything that must undo or leave it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dq
from dq import blocks, layers, takeover
from dq.kernels.cpu import deferred, library
from dq.layers import PackedLinear
from dq.plan import LayerPlan, TensorPlan
from tests import zoo

pytestmark = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))
WIDTH, TOKENS = 64, 12
NEAR = 0.02  # bf16 over two blocks: unfused is as far from fp32
PIXART, FLUX, UNET = "PixArtTransformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    """The models here are small."""
    monkeypatch.setattr(blocks, "LEAST", 0)


class OwnNorm(nn.Module):
    """An RMSNorm of nobody's library."""

    def __init__(self, width):
        super().__init__()
        self.dim, self.eps, self.weight = torch.Size((width,)), 1e-5, nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "affine": lambda: nn.LayerNorm(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "own": lambda: OwnNorm(WIDTH),
}


class Block(nn.Module):
    """A modulated transformer block of nobody's library."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second = NORMS[norm](), NORMS[norm]()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(1, 6, WIDTH) / 2)

    def between(self, x):
        return x

    def forward(self, x, time):
        shift, scale, gate, shift_up, scale_up, gate_up = (self.table + time).chunk(6, 1)
        h = self.first(x) * (1 + scale) + shift
        weights = (self.q(h) @ self.k(h).transpose(1, 2) / 8).softmax(-1)
        x = x + gate * self.out(weights @ self.v(h))
        h = self.second(x)
        x = self.between(x)
        h = h * (1 + scale_up) + shift_up
        return self.down(F.gelu(self.up(h), approximate="tanh")) * gate_up + x


class Stack(nn.Module):
    def __init__(self, kind=Block, norm="layer"):
        super().__init__()
        self.blocks = nn.ModuleList([kind(norm), kind(norm)])

    def forward(self, x, time):
        for block in self.blocks:
            x = block(x, time)
        return x


def packed(dtype=torch.bfloat16, kind=Block, norm="layer", act="int8/token"):
    torch.manual_seed(0)
    model = Stack(kind, norm).to(dtype).eval().requires_grad_(False)
    for block in model.blocks:
        for name in ("q", "k", "v", "out", "up", "down"):
            old = getattr(block, name)
            plan = LayerPlan("linear", tuple(old.weight.shape), TensorPlan.parse("int8"), TensorPlan.parse(act))
            setattr(block, name, layers.pack(name, old, plan, dtype))
    blocks.attach(model)
    return model


def inputs(dtype=torch.bfloat16):
    make = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, WIDTH, generator=make).to(dtype), torch.randn(2, 6, WIDTH, generator=make).to(dtype)


def unfused(model):
    """A copy that runs as torch would."""
    twin = copy.deepcopy(model)
    blocks.detach(twin)
    return twin


def found(model):
    return [(each.norms, each.endings, each.shared) for each in blocks.counts(model).values()]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- what is found ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("norm", list(NORMS))
def test_norm_modulation_gate_residual_and_gelu_run_in_the_linears(norm, dtype):
    model, given = packed(dtype, norm=norm), inputs(dtype)
    plain = unfused(model)(*given)
    first, second = model(*given), model(*given)
    assert torch.equal(first, second) and type(first) is torch.Tensor
    if dtype is torch.float32:
        assert found(model) == [(0, 2, 2)] * 2 and torch.equal(first, plain)
    else:
        assert found(model) == [(4, 3, 2)] * 2 and 0 < relative(first, plain) < NEAR


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize(("name", "norms", "endings"), [(PIXART, 8, 6), (FLUX, 24, 10), (UNET, 40, 24)])
def test_blocks_of_the_libraries_are_found(name, norms, endings, dtype):
    model = zoo.build(name, dtype=dtype)
    dq.quantize(model, "int8", progress=False)
    assert any("wait for a call" in line for line in dq.explain(model).notes)
    call = lambda model: zoo.call(model, zoo.ENTRIES[name], dtype=dtype)  # noqa: E731
    first, second, plain = call(model), call(model), call(unfused(model))
    total = [sum(column) for column in zip(*found(model), strict=True)]
    assert total[1] >= endings and total[2] > 0 and torch.equal(first, second)
    assert total[0] == (0 if dtype is torch.float32 else norms)
    assert torch.equal(first, plain) if dtype is torch.float32 else relative(first, plain) < 0.06
    assert any(f"into {total[0]} linears" in line for line in dq.explain(model).notes)


@torch.no_grad()
def test_fused_bf16_is_as_near_to_fp32_as_unfused():
    model, given = packed(), inputs()
    wide = unfused(model)
    nn.Module.float(wide)
    truth = wide(*(value.float() for value in given))
    assert relative(model(*given), truth) <= 1.05 * relative(unfused(model)(*given), truth)


@torch.no_grad()
def test_four_bit_codes_have_the_room_they_need():
    model = packed(act="int4/token")
    assert relative(model(*inputs()), unfused(model)(*inputs())) < 0.2
    assert found(model) == [(4, 3, 2)] * 2


def test_norms_are_found_by_what_they_compute():
    class Other(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 2

    kinds = [blocks.norm_of(make()) for make in NORMS.values()]
    assert [kind for kind, _ in kinds] == ["layer", "layer", "rms", "rms"]
    for module in (Other(8), nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.LayerNorm((4, 8)), nn.RMSNorm(8)):
        assert blocks.norm_of(module) is None


# --- what undoes it --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hooks_inside_a_block_see_what_torch_computes():
    model, given = packed(), inputs()
    fused, plain, seen = model(*given), unfused(model)(*given), []
    handle = model.blocks[1].first.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    mixed = model(*given)
    handle.remove()
    assert seen == [torch.Tensor] and not torch.equal(mixed, fused) and not torch.equal(mixed, plain)
    assert torch.equal(model(*given), fused)


def test_gradients_training_and_other_backends_run_unfused():
    model, given = packed(), inputs()
    with torch.no_grad():
        plain, fused = unfused(model)(*given), model(*given)
        assert not torch.equal(plain, fused)
        assert torch.equal(model.train()(*given), plain)
        dq.set_backend("reference")
        try:
            assert torch.equal(model.eval()(*given), unfused(model)(*given))
        finally:
            dq.set_backend("auto")
    assert torch.equal(model(*given), plain)
    with torch.no_grad():
        assert torch.equal(model(*given), fused)


@torch.no_grad()
def test_torch_compile_traces_the_unfused_block_into_one_graph():
    model, given = packed(), inputs()
    plain, fused, graphs = unfused(model)(*given), model(*given), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(*given)
    torch._dynamo.reset()
    assert len(graphs) == 1 and torch.equal(compiled, plain) and torch.equal(model(*given), fused)


@torch.no_grad()
def test_small_inputs_run_unfused_whatever_the_batch(monkeypatch):
    model, (x, time) = packed(), inputs()
    monkeypatch.setattr(blocks, "LEAST", 2 * TOKENS * WIDTH)
    assert torch.equal(model(x, time), unfused(model)(x, time)) and found(model) == [(0, 0, 0)] * 2
    many = x.repeat(2, 1, 1), time.repeat(2, 1, 1)
    assert torch.equal(model(*many), unfused(model)(*many))
    wide = torch.cat([x, x], 1)
    assert not torch.equal(model(wide, time), unfused(model)(wide, time))


class Adapted(nn.Module):
    """What an adapter puts in place of a linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(WIDTH, 4, dtype=torch.bfloat16), nn.Linear(4, WIDTH, dtype=torch.bfloat16)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["q", "out", "down"])
def test_an_adapter_adds_its_term_to_a_fused_linear(name):
    model, given = packed(), inputs()
    if name != "down":
        setattr(model.blocks[0], name, Adapted(getattr(model.blocks[0], name)))
    else:
        model.blocks[0].up = Adapted(model.blocks[0].up)
        model.blocks[0].up.up = nn.Linear(4, 2 * WIDTH, dtype=torch.bfloat16)
    expected = unfused(model)(*given)
    assert relative(model(*given), expected) < NEAR and torch.equal(model(*given), model(*given))


@torch.no_grad()
def test_weights_may_leave_when_their_layer_is_done():
    """Offloading swaps the memory of parameters around each layer's forward."""
    model, given = packed(norm="affine"), inputs()
    model.blocks[0].q = Adapted(model.blocks[0].q)  # asks for the norm's output when the norm is done
    expected = model(*given)
    for module in model.modules():
        if isinstance(module, PackedLinear | nn.LayerNorm):
            own, kept = module.forward, {name: value.data for name, value in module.named_parameters()}

            def moving(*args, own=own, kept=kept, module=module):
                for name, value in module.named_parameters():
                    value.data = kept[name]
                result = own(*args)
                for value in module.parameters():
                    value.data = torch.zeros_like(value)
                return result

            module.forward = moving
    assert torch.equal(model(*given), expected) and torch.equal(model(*given), expected)


@torch.no_grad()
def test_copies_are_fused_and_detaching_gives_every_forward_back():
    model, given = packed(), inputs()
    fused, twin = model(*given), copy.deepcopy(model)
    blocks.detach(model)
    assert not any("forward" in vars(module) or "_dq_norm" in vars(module) for module in model.modules())
    assert not blocks.counts(model) and torch.equal(twin(*given), fused) and not torch.equal(model(*given), fused)
    assert twin.state_dict().keys() == model.state_dict().keys()


# --- what must not be fused ------------------------------------------------------------------------------------------


class InPlace(Block):
    def between(self, x):
        return x.mul_(2)  # the norm has still to be read


@torch.no_grad()
def test_a_tensor_changed_in_between_is_noticed_and_the_place_stays_unfused():
    model = packed(kind=InPlace)
    expected = unfused(model)(*inputs())
    for _ in range(2):
        assert relative(model(*inputs()), expected) < 0.01
    assert [norms for norms, *_ in found(model)] == [3, 3]  # of the first norm only


@torch.no_grad()
def test_a_place_where_the_kernel_differs_stays_unfused(monkeypatch):
    model, given = packed(), inputs()
    right = deferred.Normed.taken
    wrong = lambda self: (right(self)[0], right(self)[1]._replace(shift=right(self)[1].shift + 1))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(deferred.Normed, "taken", wrong)
        first = model(*given)
    assert [norms for norms, *_ in found(model)] == [0, 0] and torch.equal(model(*given), first)
    assert relative(first, unfused(model)(*given)) < 0.01


@torch.no_grad()
def test_a_first_call_with_nan_decides_nothing():
    model, (x, time) = packed(), inputs()
    assert model(x * float("nan"), time).isnan().all()
    model(x, time)
    assert found(model) == [(4, 3, 2)] * 2


class Unmatched(Block):
    def forward(self, x, time):
        return self.up(self.first(x).sin())[..., :WIDTH] * 2


@torch.no_grad()
def test_blocks_without_a_place_are_named():
    model = packed(kind=Unmatched)
    assert torch.equal(model(*inputs()), unfused(model)(*inputs()))
    assert blocks.notes(model) == ["2 blocks run unfused, nothing in them agreed with a fused kernel: blocks.0, ..."]


# --- tensors that wait -----------------------------------------------------------------------------------------------

OTHER_USES = {
    "view": lambda y: y.view(-1),
    "sum": lambda y: y.sum(),
    "list": lambda y: torch.tensor(y.flatten().tolist()),
    "cat": lambda y: torch.cat([y, y]),
    "in place": lambda y: y.add_(1),
    "alpha": lambda y: torch.add(y, torch.ones(2, 3, 32), alpha=2),
    "index": lambda y: y[:, 1],
    "dropout": lambda y: F.dropout(y, 0.5, False),
    "divide": lambda y: y / 1.0 / 2.0,
    "both": lambda y: y * torch.ones(32) + y,
    "iterate": lambda y: list(y)[1],
    "twice": lambda y: (y * torch.ones(32)) * torch.ones(2, 1, 32) + torch.ones(2, 3, 32),
    "per token": lambda y: y * torch.arange(96.0).view(1, 3, 32) + torch.ones(2, 3, 32),
}


@torch.no_grad()
@pytest.mark.parametrize("use", list(OTHER_USES))
def test_any_use_of_a_waiting_tensor_is_torchs(use):
    linear = nn.Linear(16, 32)
    plan = LayerPlan("linear", (32, 16), TensorPlan.parse("int8"), TensorPlan.parse("int8/token"))
    linear, x = layers.pack("l", linear, plan, torch.float32), torch.randn(2, 3, 16)
    expected = OTHER_USES[use](linear(x))
    results = []
    for _ in range(2):
        with deferred.run():
            y = linear(x)
            assert isinstance(y, deferred.Product) or results
            results.append(deferred.plain(OTHER_USES[use](y)))
    assert all(torch.equal(result, expected) and type(result) is torch.Tensor for result in results)


@torch.no_grad()
def test_a_product_that_torch_needed_is_not_made_twice():
    model = packed(torch.float32)
    linear, x = model.blocks[0].q, torch.randn(2, 3, WIDTH)
    for _ in range(2):
        with deferred.run() as run:
            y = linear(x)
            assert (y + x).shape == x.shape and run.endings == 1
    with deferred.run() as run:
        y = linear(x)
        assert y.sum().isfinite() and (y + x).shape == x.shape and run.endings == 0


def test_a_module_may_have_several_roles():
    module, said = nn.Linear(2, 2), []
    for name in ("inner", "outer"):
        takeover.take(module, name, lambda module, inner, x, name=name: (said.append(name), inner(x))[1])
    module(torch.zeros(1, 2))
    takeover.give_back(module, "outer")
    module(torch.zeros(1, 2))
    takeover.give_back(module, "inner")
    assert said == ["outer", "inner", "inner"] and "forward" not in vars(module)
