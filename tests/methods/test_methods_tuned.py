"""Recipes that bring a tuning along: what each moves, and that its own idea is what gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dq
from dq import cookbook
from dq.fit.tune import Tune
from dq.layers import packed_layers
from dq.plan import Recipe
from tests.fit.test_tune import KEEP, pipeline, settings

FEW = Tune(updates=120, runs=12)


def made(recipe: str | Recipe, tune: Tune | None = FEW):
    pipe = pipeline()
    return pipe, dq.quantize(pipe, recipe, calibration=settings(), keep=KEEP, tune=tune, progress=False)


def without_tuning(name: str) -> Recipe:
    recipe = cookbook.get(name)
    return replace(recipe, options={key: value for key, value in recipe.options.items() if key != "tune"})


@pytest.fixture(scope="module")
def efficient():
    return made(without_tuning("efficientdm-w4a4"), None), made("efficientdm-w4a4")


def test_efficientdm_brings_the_error_of_its_start_down_without_data(efficient):  # P2 has 3 dB, of a trained net
    (_, plain), (_, report) = efficient
    found = report.tuned["transformer"]
    assert found["updates"] == FEW.updates and found["after_db"] > found["before_db"] + 1.2  # 1.5 dB here
    assert report.bytes_after == plain.bytes_after and not plain.tuned


def test_efficientdm_learns_codes_steps_and_a_range_for_each_denoising_step(efficient):
    before, after = ({n: p.clone() for n, p in pipe.transformer.named_parameters()} for (pipe, _) in efficient)
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"weight", "scale", "act_scale"}
    for layer in packed_layers(efficient[1][0].transformer).values():
        assert layer.act_scale.shape == (4, 1) and len(layer.act_scale.unique()) == 4


def test_a_recipe_of_its_own_tuning_reads_back_from_json(tmp_path):
    recipe = cookbook.get("efficientdm-w4a8")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Tune.of(recipe.options["tune"], FEW) == replace(
        FEW, parts=("lowrank", "scales", "act"), rank=32, minutes=FEW.minutes
    )
