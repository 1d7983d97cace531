"""The beam search over steps, control of `eval.experiments.thirds`: paths in one batch are the runs they stand for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dq
from dq import planning
from dq.fit import phases
from eval.experiments import thirds
from pipelines import tiny

STEPS = 4
PROMPT = "a red circle"


@pytest.fixture
def short(monkeypatch):
    """tiny-pixart in four steps; quantizing by a recipe of phases rounds to nearest."""
    real = dq.quantize

    def rounded(pipe, recipe, **_):
        plain = replace(recipe, late=(), switch=())
        pipe.scheduler.set_timesteps(STEPS)
        times = [float(time) for time in pipe.scheduler.timesteps]
        cuts = [round(share * STEPS) for share in recipe.switch]
        found = phases.Schedule(tuple(range(1 + len(cuts))), tuple((times[c - 1] + times[c]) / 2 for c in cuts))
        plan = phases.planned(planning.make_plan(pipe.transformer, plain), recipe, found)
        real(pipe, plan, progress=False)

    monkeypatch.setitem(tiny.CALL, "tiny-pixart", tiny.CALL["tiny-pixart"] | {"num_inference_steps": STEPS})
    monkeypatch.setattr(thirds.dq, "quantize", rounded)
    return rounded


def test_a_pattern_of_steps_is_a_recipe_of_as_many_phases():
    found = thirds.recipe_of([True, False, False, True])
    assert found.linear[1] == "int8/token" and found.late == ("int4/group:64", "int8/token")
    assert found.switch == (0.25, 0.75)


def test_the_path_that_the_beam_keeps_ends_where_its_own_run_ends(short, monkeypatch):
    ends, own = [], thirds._stepping

    def noting(pipe, choose):
        def chosen(latents):
            rows = choose(latents)
            ends.append(latents[rows])
            return rows

        return own(pipe, chosen)

    monkeypatch.setattr(thirds, "_stepping", noting)
    pattern = thirds.found_by_beam("tiny-pixart", 1, SimpleNamespace(prompts=[PROMPT]))
    assert len(pattern) == STEPS and sum(pattern) == 1
    pipe = tiny.load("tiny-pixart")
    short(pipe, thirds.recipe_of(pattern))
    alone = pipe(
        [PROMPT], generator=torch.Generator().manual_seed(0), **tiny.CALL["tiny-pixart"], output_type="latent"
    )
    full, end = ends[STEPS - 1], ends[-1][:1]
    # sums in another order tip 4-bit roundings over: near beside what rounding costs, not equal
    assert (end - alone.images).norm() < 0.2 * (end - full).norm()
