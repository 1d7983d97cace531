"""Q-Sched: what the search finds, and that it is part of the pipeline afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

import dq
from dq import around, cookbook
from dq.around import descent, qsched
from dq.around.runs import Search
from dq.host import mark
from dq.layers import packed_layers
from dq.sampler import steps
from dq.surroundings import Correction
from pipelines import tiny
from tests.around.pieces import settings, small

NAME = "tiny-pixart-4step"


def test_the_search_recovers_a_planted_bias():
    pipe = small()
    search = Search(pipe, "qsched", settings())
    search.record()
    pipe.transformer.gain = 0.95
    found, said = qsched.find(search)
    assert all(abs(value - 1 / 0.95) < 0.005 for value in found.values["output"])
    assert all(abs(value - 1) < 0.005 for value in found.values["sample"])
    assert (found.scheduler, found.steps) == ("DDIMScheduler", 4) and "held-out" in said[0]
    assert search.score([found], held_out=True) > search.score([], held_out=True) + 20, "decibels"


def test_nothing_is_corrected_where_nothing_scores_better():
    search = Search(small(), "qsched", settings())
    search.record()
    found, said = qsched.find(search)
    assert found is None and said[0].endswith("no correction")


def test_what_only_helps_the_prompts_that_were_searched_on_is_dropped():
    def score(pictures, prompts):
        return float(pictures.mean()) * (1 if "one" in prompts or "two" in prompts else -1)

    found, _ = qsched.find(Search(small(), "qsched", settings(score=score)))
    assert found is None


def test_runs_in_batches_are_the_runs_of_the_same_prompts_alone():
    search = Search(small(), "qsched", settings())
    assert [len(batch) for batch in search.batches] == [2, 2]
    alone = [search.pipe(**search.runner.arguments(number))[0] for number in range(4)]
    torch.testing.assert_close(torch.cat([search.run(index).end for index in range(2)]), torch.cat(alone))


def test_climbing_finds_the_top_and_keeps_to_its_limit():
    looked = []

    def score(point):
        looked.append(point)
        return -((point[0] - 1.3) ** 2) - (point[1] + 0.2) ** 2

    best, value, used = descent.climb(score, [1.0, 0.0], 0.1, 0.001, 200)
    assert abs(best[0] - 1.3) < 0.002 and abs(best[1] + 0.2) < 0.002 and used == len(looked) and value == score(best)
    assert descent.climb(score, [1.0, 0.0], 0.1, 0.001, 7)[2] == 7


# --- part of the pipeline ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """The search's answer, at once."""

    def find(search):
        search.score([])
        values = {"output": (1.1, 1.0, 1.0, 0.9), "sample": (1.0, 1.02, 1.0, 1.0)}
        search.distinct = 4
        return search.correction("scale", values), ["looked"]

    monkeypatch.setattr(qsched, "find", find)


def calibration(**more) -> dq.Calibration:
    call = {key: value for key, value in tiny.CALL[NAME].items() if key != "num_inference_steps"}
    return dq.Calibration(prompts=["a red circle"] * 2, steps=4, samples=4, call_kwargs=call, **more)


def picture(pipe) -> torch.Tensor:
    given = tiny.CALL[NAME] | {"generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    return pipe("a blue square", **given).images


def test_corrections_are_saved_reloaded_explained_and_switched_off(quick, tmp_path):
    pipe = tiny.load(NAME)
    report = dq.quantize(pipe, "int8+qsched", calibration=calibration(), progress=False)
    assert report.recipe == "int8+qsched" and "looked" in report.notes
    dq.save(pipe, tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    corrected = picture(pipe)
    assert torch.equal(picture(again), corrected)
    plan = json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]["plan"]
    assert plan["sampler"][0]["scheduler"] == "TCDScheduler" and plan["recipe"] == "int8+qsched"
    assert any("TCDScheduler in 4 steps: output times 1.100" in note for note in dq.explain(again).notes)
    dq.set_sampler(again, False)
    plain = tiny.load(NAME)
    dq.quantize(plain, "int8", progress=False)
    assert torch.equal(picture(again), picture(plain)) and not torch.equal(picture(plain), corrected)
    assert any("switched off" in note for note in dq.explain(again).notes)
    dq.set_sampler(again, True)
    assert torch.equal(picture(again), corrected)
    again.scheduler = type(again.scheduler).from_config(again.scheduler.config)
    assert torch.equal(picture(again), corrected), "another of the same class is corrected as well"
    again.scheduler = EulerDiscreteScheduler.from_config(again.scheduler.config)
    assert any("EulerDiscreteScheduler runs without" in note for note in dq.explain(again).notes)
    dq.dequantize(pipe)
    assert steps.of(pipe.scheduler) is None


def test_a_plan_brings_its_corrections_along(quick):
    pipe = small()
    dq.quantize(pipe, "int8+qsched", calibration=settings(), progress=False)
    plan, other = mark.plan_of(pipe.transformer), small()
    dq.quantize(other, dq.Plan.from_dict(plan.to_dict()), progress=False)
    assert steps.of(other.scheduler).corrections == plan.sampler


def test_a_search_that_fails_leaves_the_pipeline_as_it_was(monkeypatch):
    pipe = small()
    before, weights = (
        pipe(["x"], generator=torch.Generator().manual_seed(0))[0],
        dict(pipe.transformer.named_modules()),
    )
    monkeypatch.setattr(qsched, "find", lambda search: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dq.quantize(pipe, "int8+qsched", calibration=settings(), progress=False)
    assert not packed_layers(pipe.transformer) and mark.plan_of(pipe.transformer) is None
    assert dict(pipe.transformer.named_modules()) == weights and steps.of(pipe.scheduler) is None
    assert torch.equal(pipe(["x"], generator=torch.Generator().manual_seed(0))[0], before)
    assert "quantization_config" not in pipe.transformer.config


def test_a_pipeline_in_full_precision_is_corrected_by_a_score(tmp_path):
    pipe = small()
    score = lambda pictures, prompts: float(pictures.mean())  # noqa: E731
    found = dq.correct(pipe, "qsched", settings(score=score))
    assert isinstance(found, Correction) and steps.of(pipe.scheduler).corrections == (found,)
    with pytest.raises(dq.DQError, match="give calibration a score"):
        dq.correct(pipe, "qsched", settings())
    with pytest.raises(dq.DQError, match="score gave nan, expected a finite number"):
        dq.correct(pipe, "qsched", settings(score=lambda *_: float("nan")))


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda: dq.quantize(small().transformer, "int8+qsched", calibration=settings()), "got a bare model"),
        (lambda: dq.quantize(small(), "int8+qsched"), "needs calibration"),
        (lambda: dq.quantize(small(), "int8+qsced", calibration=settings()), "did you mean 'qsched'|expected"),
        (lambda: cookbook.get("int8+qsched+qsched"), "has already"),
        (lambda: dq.set_sampler(small(), False), "no corrected scheduler"),
        (lambda: dq.correct(small(), "qshed", settings(score=max)), "'qshed' is unknown"),
        (lambda: settings(score=3), "score is 3, expected a function"),
        (lambda: dq.DQConfig(recipe="int8+qsched"), "needs calibration"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(ask, message):
    with pytest.raises(dq.DQError, match=message) as error:
        ask()
    assert "\n" not in str(error.value)


def test_systems_are_found_by_listing_their_folder_and_cite_their_source():
    there = {path.stem for path in Path(around.__file__).parent.glob("*.py")} - {"__init__", *around.ROOM}
    assert around.files().keys() == there
    assert all("arXiv" in system.__doc__ and callable(system.find) for system in around.files().values())
