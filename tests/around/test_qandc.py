"""Q&C: the spread of latents that a quantized, cached run has too much or too little, and what takes it back."""

from __future__ import annotations

import pytest
import torch

import dq
from dq import cookbook
from dq.around import qandc
from dq.around.runs import Search
from dq.host import mark
from dq.sampler.caches import branches
from dq.surroundings import Correction
from dq.trace import capture
from tests import zoo
from tests.around.pieces import settings, small
from tests.models import PIXART

FACTORS = {"output": (1.1,) * 4, "sample": (1.0,) * 4}


def test_a_spread_that_is_too_wide_is_taken_back_and_one_that_is_right_is_left():
    torch.manual_seed(0)
    wanted = torch.randn(64, 3, 16, 16) + torch.tensor([2.0, 0.0, -1.0]).view(1, 3, 1, 1)
    mean = wanted.mean((0, 2, 3), keepdim=True)
    got = mean + 1.1 * (wanted - mean)
    gain, center = qandc.fitted(got, wanted)
    assert all(abs(value - 1 / 1.1) < 1e-3 for value in gain)
    assert all(abs(a - b) < 1e-3 for a, b in zip(center, mean.flatten().tolist(), strict=True))
    assert all(abs(value - 1) < 1e-3 for value in qandc.fitted(wanted, wanted)[0])
    assert set(qandc.fitted(got / 9, wanted)[0]) == {qandc.MOST}


def test_the_gain_is_the_least_of_the_weighted_error():
    torch.manual_seed(1)
    wanted = torch.randn(16, 1, 8, 8) + 0.5
    got = 1.05 * wanted + 0.1 * torch.randn_like(wanted)
    (gain,), (mean,) = qandc.fitted(got, wanted)
    left = [qandc._left(mean + (gain + off) * (got - mean), wanted) for off in (-0.01, 0.0, 0.01)]
    assert left[1] == min(left)


def drifted(gain: float) -> Search:
    """A search on a pipeline whose model's output is not what it was in full precision."""
    search = Search(small(), "qandc", settings())
    search.record()
    search.pipe.transformer.gain = gain
    return search


def test_latents_of_prompts_held_out_are_left_with_less_weighted_error():
    search = drifted(0.8)
    found, said = qandc.find(search)
    assert (found.kind, found.steps) == ("variance", 4) and "held-out" in said[0]
    wanted = search.wanted[1].steps[-1]
    before, after = (qandc._left(search.run(1, each).steps[-1], wanted) for each in ([], [found]))
    assert after < before


def test_nothing_is_corrected_where_nothing_drifted():
    assert qandc.find(drifted(1.0))[0] is None


def test_both_corrections_run_in_one_plan():
    pipe, both = small(), (qandc.find(drifted(0.8))[0], Correction("scale", "DDIMScheduler", 4, FACTORS))
    dq.quantize(pipe, "int8", progress=False)
    for found in both:
        mark.correct(pipe.transformer, found)
        mark.correct(pipe.transformer, found)
    assert mark.plan_of(pipe.transformer).sampler == both, "one of a kind for a scheduler and number of steps"
    search = Search(pipe, "qandc", settings())
    alone = [search.run(0, [found]).end for found in both]
    together = search.run(0, both).end
    assert not any(torch.equal(together, each) for each in alone)


def test_named_recipes_are_sums():
    found = cookbook.get("qandc-w8a8")
    assert (found.method, found.cache, found.sampler) == ("ptq4dm", "interval:2", "qandc")
    assert found.needs_calibration and cookbook.get("qsched-w8a8").linear == cookbook.get("int8").linear


def test_calibration_records_under_the_cache_and_takes_it_off_again(monkeypatch):
    model, seen = zoo.build(PIXART), []
    real = capture.capture

    def watched(*args, **kwargs):
        seen.append(branches.of(model).text)
        return real(*args, **kwargs)

    monkeypatch.setattr("dq.stages.capturing.capture", watched)

    def loop(model):
        for step in (900.0, 500.0):
            zoo.call(model, zoo.ENTRIES[PIXART], timestep=torch.full((2,), step))

    dq.quantize(model, "ptq4dm-w8a8+interval:2", calibration=loop, progress=False)
    assert seen == ["interval:2"] and branches.of(model).text == "interval:2"
    with pytest.raises(dq.DQError, match="got a bare model"):
        dq.quantize(zoo.build(PIXART), "qandc-w8a8", calibration=loop, progress=False)
