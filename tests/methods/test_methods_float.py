"""FP4DiT, low-bitwidth floating point and LLM-FP4: the properties by which one knows that they work."""

from __future__ import annotations

import pytest
import torch

from dq.fit import formats
from dq.fit.drafts import DraftLinear
from dq.formats.floating import MiniFloat
from dq.layers.clock import Clock
from dq.methods import fp4dit, llmfp4, lowbitfp
from dq.plan import LayerPlan
from tests.methods.test_methods_unet import fitted, nearest, pipes, records, unit_error

__all__ = ["fitted", "pipes", "records"]  # fixtures
ALL = (*fp4dit.RECIPES, *lowbitfp.RECIPES, *llmfp4.RECIPES)
SPLITS = {name for names in formats.SPLITS.values() for name in names}
FEW = {"steps": 40, "batch": 1}
MODELS = ["tiny-pixart", pytest.param("tiny-sd", marks=pytest.mark.slow)]


def floats(made: dict) -> dict[str, DraftLinear]:
    """The layers whose weights the method gave floating formats."""
    return {layer: found for layer, found in made.items() if isinstance(found.plan.weight.spec, MiniFloat)}


def errors(fitted, recipe: str, **off) -> tuple[float, ...]:
    """Error of a unit of tiny-pixart by a recipe and with something of it switched off."""
    both = [fitted("tiny-pixart", recipe, **{**FEW, **changed}) for changed in ({}, off)]
    return tuple(unit_error(*each) for each in both)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", MODELS)
def test_drafts_are_whole_and_ship_as_they_are(name, recipe, fitted):
    unit, seen, made = fitted(name, recipe.name, **FEW)
    assert set(made) <= set(unit.layers) and floats(made)
    for layer, found in floats(made).items():
        found.plan.check(layer)
        assert LayerPlan.from_dict(layer, found.plan.to_dict()) == found.plan, "the plan survives its JSON"
        assert {found.plan.weight.format, found.plan.act.format} <= SPLITS
        assert found.plan.weight.spec.bits == unit.layers[layer].weight.spec.bits
        assert found.plan.act.spec.bits == unit.layers[layer].act.spec.bits
        packed, x = found.pack(torch.float32), seen.layers[layer].hat[:2]
        found.clock = packed.clock = Clock(seen.edges)
        assert torch.allclose(packed(x), found(x), atol=1e-3 * float(found(x).abs().max()))
    assert unit_error(unit, seen, made) < unit_error(unit, seen, nearest(unit))


def test_shifts_are_powers_of_two_as_far_apart_as_the_exponent_reaches(fitted):
    _, _, made = fitted("tiny-pixart", "llmfp4-w4a4", **FEW)
    shifted = [found.smooth.data for found in made.values() if found.smooth is not None]
    assert len(shifted) > len(floats(made)) / 4, "inputs of a trained transformer have uneven channels"
    for factors in shifted:
        assert torch.equal(factors.log2(), factors.log2().round())
        assert factors.max() / factors.min() <= 2 ** (2**3 - 1)


def test_exponents_in_the_weight_leave_less_error(fitted):  # LLM-FP4
    shifted, plain = errors(fitted, "llmfp4-w4a4", shift=False)
    assert shifted < plain


def test_searched_formats_leave_less_error_than_one(fitted):  # low-bitwidth floating point
    searched, one = errors(fitted, "lowbitfp-w8a8", formats=False)
    assert searched < 0.8 * one


def test_formats_follow_the_layer(fitted):  # FP4DiT: by role
    _, _, made = fitted("tiny-pixart", "fp4dit-w4a6", **FEW)
    assert len({found.plan.weight.format for found in floats(made).values()}) > 1
    assert {found.plan.act.format for found in floats(made).values()} == {"fp6_e2m3"}, "as published"


@pytest.mark.slow
def test_learned_rounding_gains_on_the_nearest(fitted):  # FP4DiT, low-bitwidth floating point
    learned, start = ({"start": "nearest", "steps": steps, "batch": 2} for steps in (60, 0))
    errors = [unit_error(*fitted("tiny-pixart", "fp4dit-w4a6", **options)) for options in (learned, start)]
    assert errors[0] < 0.95 * errors[1]
