"""Recipes that bring a tuning along: what each moves, and that its own idea is what gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dq
from dq import cookbook
from dq.errors import DQError
from dq.fit import distill
from dq.fit.tune import Stage, Tune
from dq.layers import packed_layers
from dq.plan import Recipe
from pipelines import tiny
from tests.fit.test_tune import KEEP, Killed, pipeline, settings, stopping
from tests.models import same_state

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


def test_pvtuning_moves_the_codes_and_entries_that_vptq_leaves():
    (start, plain), (pipe, report) = (
        made(without_tuning("pvtuning-w2"), None),
        made("pvtuning-w2", replace(FEW, updates=40)),
    )
    found = report.tuned["transformer"]
    assert found["after_db"] > found["before_db"] + 0.5
    assert report.bytes_after == plain.bytes_after
    assert same_state(start.transformer, made("vptq-w2", None)[0].transformer)
    mine, theirs = pipe.transformer.state_dict(), start.transformer.state_dict()
    moved = {name.rpartition(".")[2] for name in mine if not torch.equal(mine[name], theirs[name])}
    assert {"weight", "table"} <= moved <= {"weight", "table", "scale", "bias"}


def test_a_recipe_of_its_own_tuning_reads_back_from_json(tmp_path):
    recipe = cookbook.get("efficientdm-w4a8")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Tune.of(recipe.options["tune"], FEW) == replace(
        FEW, parts=("lowrank", "scales", "act"), rank=32, minutes=FEW.minutes
    )


SMALL = Tune(updates=6, runs=2, batch=1)
FIRST_BLOCK = (r"transformer_blocks\.([1-9]|\d\d)\.", "pos_embed", "proj_out", "caption_projection")


def drawing(recipe: str | Recipe, tune: Tune | None = SMALL, folder=None, name="tiny-pixart", keep=FIRST_BLOCK):
    """An embedded pipeline of which few layers are quantized, and the report."""
    pipe = tiny.load(name)
    call = {key: value for key, value in tiny.CALL[name].items() if key != "num_inference_steps"}
    given = dq.Calibration(["a red circle", "two squares"], steps=2, samples=4, call_kwargs=call, folder=folder)
    return pipe, dq.quantize(pipe, recipe, calibration=given, keep=keep, tune=tune, progress=False)


def moved(one, other) -> dict[str, set[str]]:
    """Tensors that differ, by layer."""
    found: dict[str, set[str]] = {}
    for name, value in one.transformer.state_dict().items():
        if not torch.equal(value, other.transformer.state_dict()[name]):
            layer, _, key = name.rpartition(".")
            found.setdefault(layer, set()).add(key)
    return found


def of_time(pipe) -> set[str]:
    """Names of the layers that see the timestep alone."""
    layers = packed_layers(pipe.transformer).items()
    return {name for name, layer in layers if layer.plan.role == "time"}


def staged(name: str, *stages: dict) -> Recipe:
    recipe = cookbook.get(name)
    return replace(recipe, options={"tune": {**recipe.options["tune"], "stages": list(stages)}})


@pytest.fixture(scope="module")
def quest():
    return drawing(without_tuning("quest-w4a4"), None)[0], drawing("quest-w4a4")


def test_quest_changes_layers_of_the_time_and_feed_forwards_and_of_others_the_ranges_alone(quest):  # P1
    before, (after, report) = quest
    found = moved(before, after)
    whole = {name for name, keys in found.items() if keys & {"weight", "bias"}}
    assert whole == {*of_time(after), *(f"transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2"))}
    others = [keys for name, keys in found.items() if name not in whole]
    assert len(others) == 8 and all(keys == {"act_scale"} for keys in others)
    assert report.tuned["transformer"]["after_db"] > report.tuned["transformer"]["before_db"]


def test_the_layers_of_the_time_are_trained_first_and_by_their_own_errors_too(monkeypatch):
    seen, local, real, told = [], [], distill._Work._step, distill.within

    def step(work):
        said = real(work)
        seen.append(
            {name for value, (name, *_) in zip(work.values, work.owners, strict=True) if value.grad is not None}
        )
        return said

    monkeypatch.setattr(distill._Work, "_step", step)
    monkeypatch.setattr(distill, "within", lambda mine, truth: local.append(set(mine)) or told(mine, truth))
    pipe, _ = drawing("quest-w4a8", replace(SMALL, updates=5))
    time, feeding = of_time(pipe), {f"transformer_blocks.0.ff.net.{n}" for n in ("0.proj", "2")}
    assert time and seen[0] == time and local[::4] == [time] + [feeding] * 4  # batches of four calls
    assert all(names > feeding and not names & time for names in seen[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quest-w4a4", "qvgen-w4a4"])
def test_killed_it_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SAVED_S", 0.0)
    whole, _ = drawing(name)
    with pytest.raises(Killed):
        drawing(name, replace(SMALL, stop=stopping(3, Killed)), tmp_path)
    again, _ = drawing(name, folder=tmp_path)
    assert not moved(whole, again)


@pytest.mark.parametrize("name", ["qvgen-w4a4", "qvgen-w3a3", "hif8-tuned"])
def test_what_was_trained_saves_and_loads_at_the_bytes_of_its_start(name, tmp_path):
    start, before = drawing(without_tuning(name), None)
    pipe, report = drawing(name)
    assert report.bytes_after == before.bytes_after and moved(start, pipe)
    assert report.tuned["transformer"]["after_db"] > report.tuned["transformer"]["before_db"]
    pipe.transformer.save_pretrained(tmp_path)
    assert same_state(type(pipe.transformer).from_pretrained(tmp_path), pipe.transformer)


def test_the_help_of_qvgen_is_halved_by_its_schedule_and_gone_when_layers_are_packed(monkeypatch):
    ranks, real = [], distill._Work._step

    def step(work):
        said = real(work)
        ranks.append({int((help.gamma > 0).sum()) for help in work.helps})
        left.extend(work.helps)
        return said

    left: list = []
    monkeypatch.setattr(distill._Work, "_step", step)
    drawing("qvgen-w4a4", replace(SMALL, updates=16))
    assert ranks == [{32}, {32}, {16}, {16}, {8}, {8}, {4}, {4}, {2}, {2}, {1}, {1}, {0}, {0}, {0}, {0}]
    assert left and not any(help.product().any() for help in left)


def test_a_recipe_with_stages_reads_back_from_json_and_says_what_is_wrong_with_them():
    recipe = cookbook.get("quest-w4a4")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    stages = Tune.of(recipe.options["tune"]).stages
    assert stages[0] == Stage(0.2, {"role:time": ("weights", "bias", "act")})
    for wrong, message in (
        ((Stage(0.5, {"": ("bias",)}),), "stages have 0.5 of the updates"),
        ((Stage(1.0, {"role:tim": ("bias",)}),), "role is unknown"),
        ((Stage(1.0, {"": ("codes",)}),), "stages moves 'codes'"),
        ((Stage(1.0, {"(": ("bias",)}),), "no pattern of layer names"),
        (("all",), "expected Stage"),
    ):
        with pytest.raises(DQError, match=message):
            Tune(stages=wrong)
    with pytest.raises(DQError, match="aux without weights"):
        Tune(parts=("aux", "bias"))
