"""What users leave on a layer survives quantizing and undoing it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dq


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 1), Rows(16, 16), nn.Linear(16, 16)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block[0](x)
            x = x + block[2](block[1](x.movedim(1, -1))).movedim(-1, 1)
        return x


class Rows(nn.Linear):
    """A linear by another name, as some libraries have."""


def output(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 16, 3, 3, generator=torch.Generator().manual_seed(1))).detach()


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


CALLS = {
    "after": lambda layer: layer.register_forward_hook(lambda module, args, y: 3 * y),
    "before": lambda layer: layer.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "before, keywords": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((3 * args[0],), kwargs), with_kwargs=True
    ),
    "always": lambda layer: layer.register_forward_hook(lambda module, args, y: 3 * y, always_call=True),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("place", [0, 1])
def test_hooks_on_a_layer_keep_working_and_can_be_removed(kind, place, calibrated):
    model = Denoiser()
    bare = output(model)
    handle = CALLS[kind](model.blocks[0][place])
    before = output(model)
    assert error(bare, before) > 0.1
    if calibrated:
        dq.quantize(model, "viditq-w8a8", calibration=lambda given: output(given), progress=False)
    else:
        dq.quantize(model, "int8", progress=False)
    assert error(output(model), before) < 0.02
    dq.dequantize(model)
    assert error(output(model), before) < 0.02
    handle.remove()
    assert error(output(model), bare) < 0.02


def test_gradients_pass_by_backward_hooks():
    model, seen = Denoiser(), []
    model.blocks[0][1].register_full_backward_hook(lambda module, given, got: seen.append(1))
    dq.quantize(model, "int8-weight", progress=False)
    model(torch.randn(1, 16, 2, 2, requires_grad=True)).sum().backward()
    assert seen == [1]


def test_attributes_children_and_buffers_of_a_layer_move_along():
    model = Denoiser()
    layer = model.blocks[0][1]
    layer.note, layer.gate = "mine", nn.Linear(16, 16)
    layer.register_buffer("seen", torch.ones(3))
    dq.quantize(model, "int8", keep=[r".*gate"], progress=False)
    for undo in (lambda: None, lambda: dq.dequantize(model)):
        undo()
        now = model.blocks[0][1]
        assert now is not layer and now.note == "mine" and now.gate is layer.gate and torch.equal(now.seen, layer.seen)
    assert type(now) is nn.Linear and set(vars(now)) == set(vars(nn.Linear(1, 1))) | {"note"}


def test_a_layer_with_a_forward_of_its_own_is_kept_and_said_so():
    model = Denoiser()
    layer = model.blocks[0][1]
    inner = layer.forward
    layer.forward = lambda x: 3 * inner(x)
    before = output(model)
    report = dq.quantize(model, "int8", progress=False)
    assert error(output(model), before) < 0.02
    (row,) = [row for row in report.layers if row.name == "blocks.0.1"]
    assert row.weight is None and row.reason == "its forward was replaced on this model"
    assert [row.name for row in dq.explain(model).layers if row.weight is None] == ["blocks.0.1"]
