"""Ranges of stored scales: what each search promises, shifts of one-sided inputs, and what is refused."""

import pytest
import torch

from dq import formats
from dq.errors import DQError
from dq.fit import ranges
from dq.plan import TensorPlan

each_format = pytest.mark.parametrize("name", ["int8", "int4", "int8a", "fp4", "fp8", "fp6_e2m3"])


def draw(kind, count=20_000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    return {"normal": x, "heavy": x.pow(3), "gelu": torch.nn.functional.gelu(2 * x)}[kind].reshape(100, -1)


def lost(x, name, scale, shift=0.0, power=2.0):
    rounded = formats.get(name).fake(x.reshape(1, -1) + shift, "tensor", scale=torch.tensor([[scale]])) - shift
    return float((rounded - x.reshape(1, -1)).abs().pow(power).mean())


@each_format
def test_minmax_covers_everything(name):
    x, spec = draw("heavy"), formats.get(name)
    scale, shift = ranges.static(x, spec, "minmax")
    assert shift == 0
    assert scale == float(spec.fit(x, "tensor").scale)


@each_format
@pytest.mark.parametrize("kind", ["normal", "heavy", "gelu"])
def test_searches_are_never_worse_than_minmax(name, kind):
    x, spec = draw(kind), formats.get(name)
    whole, found = (ranges.static(x, spec, method)[0] for method in ("minmax", "mse"))
    assert lost(x, name, found, power=2.4) <= lost(x, name, whole, power=2.4)
    assert found <= whole
    if name == "int4":
        assert lost(x, name, found) < 0.7 * lost(x, name, whole)


def test_mse_search_beats_a_search_by_absolute_error_and_fixed_cuts_at_8_bits():
    x, spec = draw("heavy"), formats.get("int8")
    by_power = [float(ranges.mse(x.reshape(1, -1), spec, power=power)) for power in (2.4, 1.0)]
    assert lost(x, "int8", by_power[0]) < lost(x, "int8", by_power[1])
    cut = float(ranges.percentile(x.reshape(1, -1), spec, (0.9,)))
    assert lost(x, "int8", ranges.static(x, spec, "percentile")[0]) < lost(x, "int8", cut)


def test_percentile_leaves_out_the_tails():
    x = torch.cat([torch.linspace(-1, 1, 100_001), torch.tensor([500.0])])[None]
    spec = formats.get("int8")
    torch.testing.assert_close(float(ranges.percentile(x, spec, (0.99,))), 0.99 / 127, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", list(ranges.METHODS))
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_shift_lets_one_sided_inputs_use_the_whole_grid(method, name):
    x, spec = draw("gelu"), formats.get(name)
    plain, centred = (ranges.static(x, spec, method, centre) for centre in (False, True))
    assert centred[1] < 0
    assert lost(x, name, *centred) < 0.55 * lost(x, name, *plain)
    assert TensorPlan.parse(str(TensorPlan(name, "tensor", "static", centred[1]))).shift == centred[1]
    mirrored = ranges.static(-x, spec, method, True)
    torch.testing.assert_close(lost(-x, name, *mirrored), lost(x, name, *centred), rtol=0.05, atol=0)
    assert mirrored[1] > 0


@each_format
@pytest.mark.parametrize("kind", ["normal", "heavy", "gelu"])
@pytest.mark.parametrize("method", list(ranges.METHODS))
def test_a_shift_is_only_kept_where_it_helps(name, kind, method):
    x, spec = draw(kind), formats.get(name)
    plain, centred = (ranges.static(x, spec, method, centre) for centre in (False, True))
    assert lost(x, name, *centred, power=2.4) <= lost(x, name, *plain, power=2.4)
    if name == "fp8":
        assert centred == plain  # floats are densest at 0


def test_rows_have_scales_of_their_own():
    x, spec = draw("heavy") * torch.logspace(-2, 2, 100)[:, None], formats.get("int4")
    for method in ranges.METHODS.values():
        scales = method(x, spec)
        assert scales.shape == (100, 1)
        torch.testing.assert_close(scales[7:8], method(x[7:8], spec))


def test_large_inputs_are_sampled_alike_each_time():
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[1234567] = 40.0
    spec, state = formats.get("int8"), torch.get_rng_state()
    first, second = ranges.static(x, spec, "mse"), ranges.static(x, spec, "mse")
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(ranges.static(x, spec, "minmax")[0], 40 / 127)
    assert first[0] < 10 / 127


def test_zeros_and_constants():
    for x in (torch.zeros(10), torch.full((10,), 3.0)):
        for method in ranges.METHODS:
            scale, shift = ranges.static(x, formats.get("int8"), method, True)
            assert scale > 0
            assert lost(x, "int8", scale, shift) < 1e-8


def test_what_is_refused():
    x, spec = draw("normal"), formats.get("int8")
    with pytest.raises(DQError, match="Did you mean 'minmax'"):
        ranges.static(x, spec, "min-max")
    with pytest.raises(DQError, match="no values"):
        ranges.static(x[:0], spec)
    with pytest.raises(DQError, match="'nvfp4'"):
        ranges.static(x, formats.get("nvfp4"))
    with pytest.raises(formats.FormatError, match="1 non-finite"):
        ranges.static(torch.tensor([1.0, torch.inf]), spec)
