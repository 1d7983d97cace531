"""A help that fades: it begins as what rounding left, is halved phase by phase, and is gone at the end."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dq.fit import auxiliary, distill
from dq.fit.auxiliary import FADED, Auxiliary
from dq.fit.trainable import Trainable
from tests.fit.test_tune import WISH, Killed, equal, packed_of, plan, state_of, stopping, tuned

PARTS = ("weights", "scales", "bias", "aux")
HELPED = replace(WISH, parts=PARTS, rank=4, full=True)


def test_of_full_rank_the_layer_begins_as_it_was_in_full_precision():
    module, packed = packed_of(plan("int4/channel", None))
    made, x = Trainable(module, packed, PARTS, rank=24), torch.randn(5, 40)
    made.hold(helped=True)
    torch.testing.assert_close(made.forward(x), module(x), rtol=1e-4, atol=1e-4)
    made.hold()
    assert float((made.forward(x) - module(x)).detach().abs().max()) > 1e-2  # what is shipped has none of it


def test_weights_begin_where_they_were_within_their_codes_with_the_help_and_without():
    module, packed = packed_of(plan("int4/channel", None))
    for parts in (PARTS, PARTS[:-1]):
        begun, made = (Trainable(module, packed, parts, rank=4, full=full).weight.unit for full in (True, False))
        assert torch.equal(made, made.round()) and not torch.equal(begun, begun.round())
        assert torch.equal(begun.round(), made)


def test_its_gradient_is_the_slope_of_the_loss():
    module, packed = packed_of(plan("int4/channel", None))
    made, x = Trainable(module, packed, PARTS, rank=4), torch.randn(5, 40)
    made.weight.help.fade(0, 0.3)

    def loss() -> torch.Tensor:
        made.hold(helped=True)
        return made.forward(x).square().sum()

    loss().backward()
    made.gather()
    factors = (made.weight.help.down, made.weight.help.up)
    for value, grad in [(value, value.grad.clone()) for value in factors]:
        direction = torch.randn_like(value)
        slope, base, ends = float((grad * direction).sum()), value.data.clone(), []
        for sign in (1, -1):
            value.data = base + sign * 1e-3 * direction
            ends.append(float(loss().detach()))
        value.data = base
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2)


def test_the_rank_is_halved_phase_by_phase_without_a_jump():
    made, ranks, seen = Auxiliary(torch.randn(24, 40), 8), [], []
    now = 0
    for update in range(1001):
        phase, factor = auxiliary.place(update / 1000, 8)
        for done in range(now, phase):
            made.halve(done)
        now = phase
        made.fade(phase, factor)
        ranks.append(int((made.gamma > 0).sum()))
        seen.append(made.product())
    order = sorted(set(ranks), reverse=True)
    assert order == [8, 4, 2, 1, 0] and ranks == sorted(ranks, reverse=True)
    assert ranks.index(0) == round(1000 * FADED)
    jumps = [float((a - b).norm() / seen[0].norm()) for a, b in pairwise(seen)]
    assert max(jumps) < 0.02
    assert not made.up.any() and not made.down.any() and not seen[-1].any()


def test_what_is_trained_with_it_has_the_bytes_of_plain_training():
    (pipe, report), (plain, without) = tuned(HELPED), tuned(replace(HELPED, parts=PARTS[:-1]))
    assert report.bytes_after == without.bytes_after
    shapes = [{name: (value.shape, value.dtype) for name, value in state_of(each).items()} for each in (pipe, plain)]
    assert shapes[0] == shapes[1] and not equal(state_of(pipe), state_of(plain))
    found = report.tuned["transformer"]
    assert found["after_db"] > found["before_db"] + 1
    assert any("gradient norm" in note for note in report.notes)


@pytest.mark.parametrize("after", [6, 23])
def test_killed_in_a_phase_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, after):
    monkeypatch.setattr(distill, "SAVED_S", 0.0)
    whole, _ = tuned(HELPED, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        tuned(replace(HELPED, stop=stopping(after, Killed)), folder=tmp_path / "killed")
    again, _ = tuned(HELPED, folder=tmp_path / "killed")
    assert equal(state_of(whole), state_of(again))


def test_states_are_judged_without_it(monkeypatch):
    held, real = [], Trainable.hold
    judging = distill._Work._judge

    def judge(work):
        held.clear()
        found = judging(work)
        assert held and not any(held)
        return found

    monkeypatch.setattr(Trainable, "hold", lambda made, helped=False: held.append(helped) or real(made, helped))
    monkeypatch.setattr(distill._Work, "_judge", judge)
    tuned(replace(HELPED, updates=9))
