"""Codes that make up for earlier ones, and codebooks that layers can afford."""

import pytest
import torch

from dq import formats
from dq.fit import codebook, rounding
from dq.plan import LayerPlan, Plan, TensorPlan


def problem(form="vq16x4", rows=24, columns=160, seed=0):
    """-> spec, weight (rows, columns), second moments of correlated inputs, a k-means codebook."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    x = torch.randn(2000, columns // 5, generator=generator) @ torch.randn(columns // 5, columns, generator=generator)
    x = (x + 2 * torch.randn(2000, columns, generator=generator)) * torch.rand(columns, generator=generator)
    gram, spec = x.t() @ x / 2000, formats.get(form)
    return spec, weight, gram, codebook.start(weight, spec, gram.diagonal(), seed)


@pytest.mark.parametrize("form", ["vq16x4", "vq64x2", "vq256x4", "vq16x1"])
def test_compensation_halves_the_error_where_inputs_are_correlated(form):
    spec, weight, gram, scales = problem(form)
    book = spec.book(scales)
    plain = codebook.decoded(book, codebook.assigned(weight, spec, scales, gram.diagonal()))
    made = codebook.decoded(book, codebook.compensated(weight, spec, scales, gram))
    assert rounding.error(made, weight, gram) < 0.5 * rounding.error(plain, weight, gram)


def test_without_correlation_every_vector_takes_its_nearest_entry():
    spec, weight, gram, scales = problem()
    only = gram.diagonal().diag()
    found = codebook.compensated(weight, spec, scales, only, damp=0.0)
    assert torch.equal(found, codebook.assigned(weight, spec, scales, gram.diagonal()))


def test_the_last_vector_has_the_best_code_that_the_others_leave():
    spec, weight, gram, scales = problem()
    book, codes = spec.book(scales), codebook.compensated(weight, spec, scales, gram, damp=0.0)
    last = int(rounding.factor(gram, 0.0, spec.span).columns[-1]) // spec.span

    def errors(tried):
        gap = codebook.decoded(book, tried) - weight
        return ((gap @ gram) * gap).sum(1)

    least = errors(codes)
    for code in range(spec.count):
        tried = codes.clone()
        tried[:, last] = code
        assert (errors(tried) >= least * (1 - 1e-4)).all()


def test_a_codebook_goes_to_the_loud_columns():
    spec, weight, gram, scales = problem()
    loud, even = gram.diagonal(), torch.ones(len(gram))
    first, second = (
        codebook.decoded(spec.book(s), codebook.assigned(weight, spec, s, loud)) - weight
        for s in (scales, codebook.start(weight, spec, even, 0))
    )
    assert (first.square() * loud).sum() < (second.square() * loud).sum()


def test_small_layers_have_fewer_entries_and_odd_rows_have_int8():
    form = TensorPlan.parse("vq256x4")
    shapes = {"wide": (256, 256), "small": (32, 32), "odd": (64, 27), "least": (2, 16)}
    plan = codebook.prepared(Plan({name: LayerPlan("linear", shape, form) for name, shape in shapes.items()}))
    found = {name: layer.weight.format for name, layer in plan.layers.items()}
    assert found == {"wide": "vq256x4", "small": "vq16x4", "odd": "int8", "least": "int8"}
    assert "rows of 27 weights do not fill vectors of vq256x4" in plan.layers["odd"].reason
    for name, layer in plan.layers.items():
        layer.check(name)
