"""PV-Tuning's steps: few of the codes of a codebook move in an update, to where the loss falls."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import dq
from dq import cookbook
from dq.fit import vectors
from dq.fit.trainable import Trainable
from dq.fit.tune import Tune
from dq.layers import packed_layers
from tests.fit.test_tune import equal, state_of, tuned

WISH = Tune(updates=60, runs=8, batch=2, parts=("weights", "scales"))
DICE = torch.Generator().manual_seed(0)


def layer(parts=("weights", "scales"), rows=64, columns=64):
    module = nn.Linear(columns, rows)
    module.weight.data = torch.randn(rows, columns, generator=DICE)
    holder = nn.Sequential(module)
    dq.quantize(holder, dq.Recipe("v", ("vq16x4", None), ("vq16x4", None)), progress=False)
    (packed,) = packed_layers(holder).values()
    return Trainable(module, packed, parts), packed


def test_a_layer_begins_as_it_is_packed_and_comes_back_to_the_byte():
    made, packed = layer()
    made.hold()
    assert torch.equal(made.leaf.detach(), packed.dense_weight().float())
    again = made.pack()
    for name, value in packed.named_parameters(recurse=False):
        assert torch.equal(value, getattr(again, name)), name


def test_an_update_gives_few_of_the_vectors_another_code_and_those_of_the_largest_mean_gradient():
    made, _ = layer(rows=512, columns=512)
    own = made.weight
    before = own.code.clone()
    gradient = torch.randn(own.push.shape, generator=DICE)
    gradient[:1000] *= 10
    own.push.grad = gradient
    changed = own.jump(1.0)
    moved = (own.code != before).nonzero()[:, 0]
    assert 0 < changed == len(moved) <= round(vectors.TAU * len(before)) and moved.max() < 1000
    own.push.grad = None
    assert own.jump(1.0) == 0, "a stage in which codes stay"


def test_codes_go_where_the_error_falls():
    made, _ = layer(parts=("weights",))
    wanted = made.weight.book.detach()[torch.randint(0, 16, made.weight.code.shape, generator=DICE)]
    errors = []
    for _ in range(3000):
        made.hold()
        gap = made.leaf.detach().reshape(wanted.shape) - wanted
        errors.append(float(gap.square().sum()))
        made.leaf.grad = 2 * gap.reshape(made.leaf.shape)
        made.gather()
        made.weight.jump(1.0)
    assert errors[-1] < 0.2 * errors[0], "3000 updates reach every vector three times"
    assert all(after <= before for before, after in pairwise(errors[:300])), "no step goes back"


def test_entries_get_the_gradients_of_their_vectors():
    made, _ = layer()
    made.hold()
    weight = made.weight.book.detach().clone().requires_grad_()
    target = torch.randn(made.leaf.shape, generator=DICE)
    (weight[made.weight.code.long()].reshape(target.shape) - target).square().sum().backward()
    made.leaf.grad = 2 * (made.leaf.detach() - target)
    made.gather()
    assert torch.allclose(made.weight.book.grad, weight.grad, rtol=1e-4, atol=1e-4)


def two_bits(tune):
    recipe = dq.Recipe("v", ("vq64x4", None), ("vq64x4", None))
    return tuned(tune, recipe)


def test_codes_and_entries_of_a_model_move_at_equal_bytes_and_help():
    pipe, report = two_bits(WISH)
    _, control = two_bits(replace(WISH, parts=("scales",)))
    found = report.tuned["transformer"]
    assert found["after_db"] > found["before_db"] + 0.5
    assert control.bytes_after == report.bytes_after
    names = {name.rpartition(".")[2] for name in changed(pipe, two_bits(replace(WISH, parts=("bias",)))[0])}
    assert {"weight", "table"} <= names


def changed(one, other) -> set[str]:
    mine, theirs = state_of(one), state_of(other)
    return {name for name, value in mine.items() if not torch.equal(value, theirs[name])}


def test_the_same_updates_give_the_same_bytes():
    one, other = (two_bits(replace(WISH, updates=8))[0] for _ in range(2))
    assert equal(state_of(one), state_of(other))


def test_the_recipe_tunes_codes_and_its_control_does_not():
    recipe = cookbook.get("pvtuning-w2")
    assert Tune.of(recipe.options["tune"]).parts == ("weights", "scales", "bias")
    assert dq.Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("form", ["int4/group:64", "lut3/channel"])
def test_other_formats_are_trained_as_before(form):
    module = nn.Linear(64, 32)
    holder = nn.Sequential(module)
    dq.quantize(holder, dq.Recipe("x", (form, None), (form, None)), progress=False)
    (packed,) = packed_layers(holder).values()
    assert not isinstance(Trainable(module, packed, ("weights", "scales")).weight, vectors.Vectors)
