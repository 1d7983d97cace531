"""Qua2SeDiMo: every way of rounding is what it says, and the recipe mixes ways under its bits."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import dq
from dq import cookbook
from dq.budget import sampled
from dq.fit import rounding
from dq.fit.drafts import draft
from dq.layers import packed_layers, stored_bytes
from dq.methods import qua2sedimo
from dq.plan import LayerPlan, TensorPlan
from eval.experiments import insights


def rounded(weight: torch.Tensor, text: str) -> torch.Tensor:
    plan = LayerPlan("linear", tuple(weight.shape), TensorPlan.parse(text))
    return rounding.on_grid(weight, plan, qua2sedimo.start(weight, plan))


@pytest.mark.parametrize("bits", [3, 4])
def test_values_where_the_weights_are_beat_even_steps_and_a_table_a_row_beats_one_of_all(bits):  # paper: P1
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((48, 128)) * torch.rand(48, 1)
    row, even, whole = (
        (rounded(weight, text) - weight).square().sum()
        for text in (f"lut{bits}/channel", f"int{bits}a/channel", f"lut{bits}/tensor")
    )
    assert row < even and row < whole
    assert all(len(values.unique()) <= 2**bits for values in rounded(weight, f"lut{bits}/channel"))
    assert len(rounded(weight, f"lut{bits}/tensor").unique()) <= 2**bits


@pytest.mark.parametrize("text", qua2sedimo.WAYS)
def test_a_packed_layer_is_the_direct_rounding_and_has_the_bytes_that_were_predicted(text):
    torch.manual_seed(0)
    module, x = nn.Linear(64, 32, bias=False), torch.randn(5, 64)
    plan = LayerPlan("linear", (32, 64), TensorPlan.parse(text))
    made = draft(module, plan)
    made.scales = qua2sedimo.start(module.weight.data, plan)
    packed = made.pack(torch.float32)
    assert torch.allclose(packed(x), x @ rounded(module.weight.data, text).t(), atol=1e-5)
    assert sum(value.nbytes for value in packed.parameters()) == stored_bytes(plan, torch.float32)


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    ).eval()


def call(model) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x, timestep=torch.tensor([10, 500]), class_labels=torch.tensor([1, 2])).sample


def test_the_recipe_mixes_ways_under_its_bits_and_comes_back_from_disk(tmp_path, monkeypatch):
    model, recipe = tiny_dit(), cookbook.get("qua2sedimo-w4")
    few = type(recipe)(**{**vars(recipe), "options": {**recipe.options, "plans": 12, "bits": 5.0}})
    report = dq.quantize(model, few, calibration=call, progress=False)
    found = packed_layers(model)
    assert len({sampled.way(layer.plan) for layer in found.values()}) > 1
    weights = sum(layer.plan.rows * layer.plan.columns for layer in found.values())
    assert sum(stored_bytes(layer.plan, torch.float32) for layer in found.values()) * 8 / weights <= 5.0
    assert report.bytes_after < report.bytes_before
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(call(DiTTransformer2DModel.from_pretrained(tmp_path).eval()), call(model))


def test_insights_are_decibels_over_uniform_steps(monkeypatch):
    from dq.budget.search import Measured, Part, Search

    plans = [LayerPlan("linear", (8, 8), TensorPlan.parse(text)) for text in ("lut4/channel", "int4a/channel")]
    rows = {
        f"blocks.{i}.attn.to_q": Measured(
            (None, *plans), torch.tensor([[0.0], [0.1], [1.0]]).numpy(), [9, 4, 4], [], 64
        )
        for i in range(2)
    }
    (row,) = insights.insights(Search("r", "sampled", {"": Part(rows)}))
    assert row["operation"] == "blocks.attn.to_q" and row["weights"] == 128 and row["bits"] == 4
    assert row["ways"] == {"lut/channel": 10.0, "inta/channel": 0.0}
