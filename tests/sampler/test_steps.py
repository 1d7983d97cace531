"""Corrections of a scheduler's steps: nothing but the step of one instance changes, and at 1 not a bit of that."""

from __future__ import annotations

import copy
import pickle

import diffusers
import pytest
import torch

from dq.errors import DQError
from dq.sampler import steps
from dq.sampler.corrections import files
from dq.surroundings import CORRECTIONS, Correction

SCHEDULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "TCDScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
)
STEPS = 4


def scheduler(name: str = "TCDScheduler", count: int = STEPS):
    made = getattr(diffusers, name)()
    made.set_timesteps(count)
    return made


def scale(name: str = "TCDScheduler", output=(1.0,) * STEPS, sample=(1.0,) * STEPS) -> Correction:
    return Correction("scale", name, STEPS, {"output": tuple(output), "sample": tuple(sample)})


def loop(stepping, first: int = 0) -> torch.Tensor:
    """The sample at the end of a run whose model output is a fixed function of the sample."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=draw)
    stepping.set_timesteps(stepping.num_inference_steps)
    takes = "generator" in steps.inspect.signature(stepping.step).parameters
    for t in stepping.timesteps[first:]:
        x = stepping.step(torch.tanh(x), t, x, **({"generator": draw} if takes else {})).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_factors_of_one_leave_every_bit(name):
    plain, corrected = scheduler(name), scheduler(name)
    steps.attach(corrected, [scale(name)])
    assert steps.of(corrected).fitting(), "the correction is one for this run"
    assert torch.equal(loop(corrected), loop(plain))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_factors_are_those_of_the_step(name):
    output, sample = (0.9, 1.1, 1.2, 0.8), (1.1, 0.9, 1.0, 1.05)
    plain, corrected = scheduler(name), scheduler(name)
    steps.attach(corrected, [scale(name, output, sample)])
    moments = list(dict.fromkeys(plain.timesteps.tolist()))
    x, draws = torch.randn(2, 3, 4, 4), [torch.Generator().manual_seed(1) for _ in "ab"]
    y = x
    takes = "generator" in steps.inspect.signature(plain.step).parameters
    for t in plain.timesteps:
        k = moments.index(float(t))
        more = [{"generator": draw} if takes else {} for draw in draws]
        e = torch.tanh(x)
        x = plain.step(e * output[k], t, x * sample[k], **more[0]).prev_sample
        y = corrected.step(e, t, sample=y, return_dict=False, **more[1])[0]
        assert torch.equal(x, y)


def test_all_but_the_step_stays_the_schedulers_own(tmp_path):
    plain, corrected = scheduler(), scheduler()
    steps.attach(corrected, [scale(output=(0.5,) * STEPS)])
    assert type(corrected) is type(plain) and corrected.config == plain.config
    corrected.save_pretrained(tmp_path / "corrected")
    plain.save_pretrained(tmp_path / "plain")
    texts = [(tmp_path / name / "scheduler_config.json").read_text() for name in ("corrected", "plain")]
    assert texts[0] == texts[1]
    for made in (type(plain).from_config(corrected.config), type(plain).from_pretrained(tmp_path / "corrected")):
        made.set_timesteps(STEPS)
        assert torch.equal(loop(made), loop(plain))
    shown = [list(steps.inspect.signature(each.step).parameters) for each in (corrected, plain)]
    assert shown[0] == shown[1] and "eta" in shown[0], "pipelines ask for eta"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_corrections_and_are_copies(copied):
    own = scheduler()
    steps.attach(own, [scale(output=(0.5,) * STEPS)])
    other = copied(own)
    assert steps.of(other).scheduler is other, "it steps itself"
    assert torch.equal(loop(other), loop(own)) and not torch.equal(loop(own), loop(scheduler()))
    steps.detach(own)
    assert steps.of(other) is not None and torch.equal(loop(own), loop(scheduler()))


@pytest.mark.parametrize("name, count", [("TCDScheduler", STEPS + 1), ("DDIMScheduler", STEPS)])
def test_another_run_than_it_was_found_for_is_uncorrected_and_says_so_once(name, count):
    own = scheduler(name, count)
    steps.attach(own, [scale(output=(0.5,) * STEPS)])
    with pytest.warns(UserWarning, match=rf"TCDScheduler in 4 steps; {name} in {count} steps runs without") as seen:
        found = loop(own)
        loop(own)
    assert torch.equal(found, loop(scheduler(name, count)))
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_a_run_that_begins_in_the_middle_has_the_values_of_its_steps():
    own, late = scheduler("DDIMScheduler"), scheduler("DDIMScheduler")
    steps.attach(own, [scale("DDIMScheduler", output=(0.5, 0.5, 1.0, 1.0))])
    assert torch.equal(loop(own, first=2), loop(late, first=2))
    assert not torch.equal(loop(own, first=1), loop(late, first=1))


def test_a_correction_is_chosen_by_scheduler_and_steps_and_can_be_switched_off():
    two = Correction("scale", "TCDScheduler", 2, {"output": (0.5, 0.5), "sample": (1.0, 1.0)})
    own = scheduler()
    steps.attach(own, [two, scale()])
    assert torch.equal(loop(own), loop(scheduler()))
    own.set_timesteps(2)
    assert not torch.equal(loop(own), loop(scheduler(count=2)))
    steps.of(own).on = False
    own.set_timesteps(2)
    assert torch.equal(loop(own), loop(scheduler(count=2)))


def variance(gain, mean=((0.5, -1.0, 0.0),) * STEPS) -> Correction:
    return Correction("variance", "DDIMScheduler", STEPS, {"gain": tuple(gain), "mean": tuple(mean)})


def test_a_gain_of_one_leaves_a_channel_and_another_moves_it_from_its_mean():
    own, plain = scheduler("DDIMScheduler"), scheduler("DDIMScheduler")
    steps.attach(own, [variance([(1.0, 1.0, 0.9)] * STEPS)])
    x = torch.randn(2, 3, 4, 4)
    t = plain.timesteps[0]
    wanted, found = (each.step(torch.tanh(x), t, x).prev_sample for each in (plain, own))
    assert torch.equal(found[:, :2], wanted[:, :2])
    torch.testing.assert_close(found[:, 2], 0.9 * wanted[:, 2])
    steps.attach(own, [variance([(1.2, 1.0, 1.0)] * STEPS)])
    found = own.step(torch.tanh(x), t, x, return_dict=False)[0]
    torch.testing.assert_close(found[:, 0], 0.5 + 1.2 * (wanted[:, 0] - 0.5))
    assert found.bfloat16().dtype is torch.bfloat16


def test_corrections_keep_the_dtypes_of_a_run():
    own = scheduler("DDIMScheduler")
    steps.attach(own, [scale("DDIMScheduler", output=(0.9,) * STEPS), variance([(1.1, 1.0, 0.9)] * STEPS)])
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert own.step(x, own.timesteps[0], x).prev_sample.dtype is torch.bfloat16


def test_every_kind_has_a_file_and_every_file_a_kind():
    assert files().keys() == CORRECTIONS.keys()
    assert all(hasattr(kind, "before") or hasattr(kind, "after") for kind in files().values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 3}, "has 4 values, expected 3"),
        ({"values": {"output": [1.0] * 4}}, "expected output and sample"),
        ({"values": {"output": [1.0] * 4, "sample": [[1.0]] * 4}}, "differ in length"),
        ({"values": {"output": [1.0] * 4, "sample": [1.0, 1.0, 1.0, 1e9]}}, "values beyond"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, message):
    with pytest.raises(DQError, match=message) as error:
        Correction.from_dict(scale().to_dict() | change)
    assert "\n" not in str(error.value)


def test_what_has_no_step_of_that_form_is_refused():
    class Strange:
        def step(self, x):
            return x

    with pytest.raises(DQError, match=r"Strange has no step\(model_output, timestep, sample\)"):
        steps.attach(Strange(), [scale()])
