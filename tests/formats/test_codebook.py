"""Vector codebooks: bytes worked out on paper, sizes by formula, k-means that finds what is there, wrong use."""

import math

import pytest
import torch

from dq import formats
from dq.errors import DQError
from dq.formats import codebook
from dq.formats.base import FormatError
from dq.plan import LayerPlan, TensorPlan


def draw(rows=48, k=64, seed=0):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def clusters(count=16, each=20, span=4):
    """Vectors around far places of their own, and the places."""
    places = 100 * draw(count, span, 3)
    return (places[:, None] + 0.01 * draw(count * each, span, 4).reshape(count, each, span)).flatten(0, 1), places


def cost(vectors, entries, weights=None):
    weights = torch.ones_like(vectors) if weights is None else weights
    return float(codebook.nearest(vectors, entries, weights)[1].double().sum())


def test_golden_vq4x2():
    form = formats.get("vq4x2")
    book = torch.tensor([[0, 0, 127, -64, -127, 5, 3, 2]], dtype=torch.int8)
    x = torch.tensor([[0.1, 0.1, 60.0, -30.0, -63.0, 3.0, 1.0, 1.2, 0.0, 0.0, 60.0, -30.0]])
    e = form.encode(x, scale=torch.tensor([[0.5]]), table=book)
    assert e.codes.tolist() == [[0, 1, 2, 3, 0, 1]]
    packed = form.pack(e.codes)
    assert packed.tolist() == [[0b11100100 - 256, 0b0100]] and torch.equal(form.unpack(packed, 12), e.codes)
    assert form.decode(e).tolist() == [[0, 0, 63.5, -32, -63.5, 2.5, 1.5, 1, 0, 0, 63.5, -32]]
    assert torch.equal(form.fake(x, scale=e.scale, table=book), form.decode(e))


@pytest.mark.parametrize(("name", "bits", "row"), [("vq256x4", 2, 16), ("vq64x2", 3, 24), ("vq8x1", 3, 24)])
def test_size_is_that_of_codes_and_codebook(name, bits, row):
    form, x = formats.get(name), draw()
    e = form.encode(x)
    assert form.bits_per_weight == bits and form.row_bytes(64) == row == form.pack(e.codes).shape[1]
    real = sum(t.nbytes for t in (form.pack(e.codes), e.scale, e.table))
    assert form.packed_bytes(48, 64) == real
    layer = LayerPlan("linear", (1152, 1152), TensorPlan.parse(name))
    wanted = math.log2(form.count) / form.span + 8 * form.count * form.span / 1152**2
    assert layer.packed_bytes * 8 / 1152**2 == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(("name", "least"), [("vq256x4", 10.0), ("vq64x2", 14.5), ("vq16x4", 4.3)])
def test_vectors_of_a_normal_distribution(name, least):
    """One value at a time leaves 9.3 dB at 2 bits: the best that a scalar codebook does."""
    x = draw(256, 256)
    noise = formats.get(name).fake(x) - x
    assert 10 * torch.log10(x.square().sum() / noise.square().sum()) > least


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_clusters_whatever_the_seed(seed):
    vectors, places = clusters()
    found = codebook.kmeans(vectors, len(places), seed=seed)
    assert torch.cdist(places, found).amin(1).max() < 0.1


def test_kmeans_gives_an_entry_without_vectors_to_the_worst_off():
    vectors, places = clusters(4)
    entries = torch.cat([places[:1], torch.full((3, 4), 1e4)])
    codes, far = codebook.nearest(vectors, entries, torch.ones_like(vectors))
    moved = codebook._centred(vectors, entries, torch.ones_like(vectors), codes, far)
    assert not (moved == 1e4).any() and cost(vectors, moved) < cost(vectors, places[:1])


def test_rounds_of_kmeans_never_cost_more(monkeypatch):
    vectors, weights, costs = draw(300, 4), draw(300, 4, 1).square(), []
    for rounds in (0, 1, 2, 4, 8, 16):
        monkeypatch.setattr(codebook, "ROUNDS", rounds)
        costs.append(cost(vectors, codebook.kmeans(vectors, 16, weights), weights))
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.9 * costs[0]


def test_kmeans_depends_on_the_seed_alone_and_serves_heavy_columns():
    vectors = draw(40000, 2)
    weights = torch.tensor([1.0, 0.01]).expand(40000, 2)
    state = torch.get_rng_state()
    first = codebook.kmeans(vectors, 16, weights, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, codebook.kmeans(vectors, 16, weights, seed=5))
    assert not torch.equal(first, codebook.kmeans(vectors, 16, weights, seed=6))
    assert cost(vectors, first, weights) < 0.7 * cost(vectors, codebook.kmeans(vectors, 16), weights)


def test_fewer_vectors_than_entries_are_exact():
    form, x = formats.get("vq16x4"), draw(2, 8)
    assert (form.fake(x) - x).abs().max() <= x.abs().max() / 254 + 1e-6
    assert torch.equal(form.fake(torch.zeros(3, 8)), torch.zeros(3, 8))


@pytest.mark.parametrize("name", ["vq100x4", "vq512x4", "vq1x4", "vq16x0", "vq16x65"])
def test_impossible_names_raise(name):
    with pytest.raises(FormatError, match=f"got '{name}', expected 2, 4, 8 ... 256 entries of 1 to 64 values"):
        formats.get(name)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda form: form.encode(draw(2, 10)), "rows of 10 weights, expected a multiple of 4"),
        (lambda form: form.encode(draw(2, 8), scale=torch.ones(1, 1)), "got a scale alone, expected its codebook"),
        (
            lambda form: form.encode(draw(2, 8), scale=torch.ones(1, 1), table=torch.zeros(1, 8, dtype=torch.int8)),
            r"got a torch.int8 codebook \(1, 8\), expected int8 \(1, 64\)",
        ),
        (lambda form: form.encode(draw(2, 8), "channel"), "got granularity channel, expected its only one, tensor"),
        (lambda form: form.grid(), "codes stand for 4 weights at once"),
        (lambda form: form.snap(draw(2, 8)), "its values stand in a codebook of the layer"),
    ],
)
def test_errors_say_what_was_expected(act, message):
    with pytest.raises(FormatError, match=message):
        act(formats.get("vq16x4"))


def test_plans_whose_rows_are_no_whole_number_of_vectors_are_refused():
    form = TensorPlan.parse("vq256x4")
    with pytest.raises(DQError, match="layer 'a': vq256x4 has a code for 4 weights of a row, expected parts of a"):
        LayerPlan("linear", (8, 18), form).check("a")
    with pytest.raises(DQError, match=r"got \[\(0, 6\), \(6, 16\)\]"):
        LayerPlan("linear", (8, 16), form, splits=(6,)).check("a")
    with pytest.raises(DQError, match="activation format 'vq256x4'"):
        LayerPlan("linear", (8, 16), form, act=form).check("a")
