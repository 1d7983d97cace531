"""What `dq.explain` says of speed: a figure a layer, what would be faster, ranks that decided, bf16 without units."""

from __future__ import annotations

import json

import pytest
import torch

import dq
from dq import kernels
from dq.kernels import choice
from dq.report import Row, with_speed
from tests import zoo
from tests.kernels.injected import Times, inject
from tests.models import PIXART, UNET


def quantized(name=PIXART, recipe="int8", dtype=torch.float32):
    model = zoo.build(name).to(dtype)
    dq.quantize(model, recipe, progress=False)
    return model


class ByFormats(Times):
    """Milliseconds of `dense` by whether activations are rounded, of full precision by dtype."""

    def __init__(self, weight_only=0.5, rounded=2.0, bf16=1.0):
        super().__init__()
        self.rounded, self.weight_only, self.bf16, self.problem = rounded, weight_only, bf16, None

    def __call__(self, runs):
        self.asked.append(list(runs))
        mine = self.weight_only if self.problem.plan.act is None else self.rounded
        return {name: 1.0 if name == choice.FULL else mine for name in runs}


def by_formats(monkeypatch, tmp_path, **ms) -> ByFormats:
    inject(monkeypatch, tmp_path, {})
    times, timed = ByFormats(**ms), choice._time

    def watched(problem, *rest):
        times.problem = problem
        return timed(problem, *rest)

    monkeypatch.setattr(choice, "_time", watched)
    monkeypatch.setattr(choice, "clocked", times)
    return times


def test_rows_have_the_speed_of_layers_that_never_ran(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"dense": 0.5})
    model = quantized()
    assert all(row.speedup is None for row in dq.quantize(zoo.build(PIXART), "int8", progress=False).layers)
    report = dq.explain(model)
    assert {row.speedup for row in report.layers if row.weight} == {2.0} and times.asked
    assert "dense: decode int8 + F.linear, int8 emulated, 2.0x full precision" in str(report)
    assert {row["speedup"] for row in json.loads(report.to_json())["layers"]} == {2.0, None}
    count = len(times.asked)
    dq.explain(model)
    assert len(times.asked) == count, "once"


def test_slower_than_full_precision_is_said_with_what_is_faster(monkeypatch, tmp_path):
    by_formats(monkeypatch, tmp_path)
    notes = " ".join(dq.explain(quantized()).notes)
    assert "times as long here as in full precision; the fastest plan of the same size" in notes
    assert "is the same weights weight-only: 0.50 times" in notes


def test_8_bit_activations_are_named_where_they_are_faster(monkeypatch, tmp_path):
    by_formats(monkeypatch, tmp_path, weight_only=3.0, rounded=0.25)
    for name in (PIXART, UNET):
        notes = " ".join(dq.explain(quantized(name, "int4-weight")).notes)
        assert "quantized layers take 3.00 times as long" in notes and "with 8-bit activations: " in notes


def test_where_nothing_of_the_size_is_faster_that_is_said(monkeypatch, tmp_path):
    by_formats(monkeypatch, tmp_path, weight_only=2.0)
    notes = " ".join(dq.explain(quantized()).notes)
    assert (
        "quantized layers take 2.00 times as long" in notes and "no other plan of the same weights is faster" in notes
    )


def test_faster_plans_need_no_note(monkeypatch, tmp_path):
    by_formats(monkeypatch, tmp_path, rounded=0.5)
    assert not [note for note in dq.explain(quantized()).notes if "full precision" in note]


def test_ranks_that_decided_for_want_of_time_are_said(monkeypatch, tmp_path):
    inject(monkeypatch, tmp_path, {})
    monkeypatch.setattr(choice, "_spent", 1e9)
    report = dq.explain(quantized())
    count = sum(row.weight is not None for row in report.layers)
    assert f"model: kernels of {count} layers were chosen by rank: 1000000000 s of measuring are spent" in report.notes


@pytest.mark.parametrize(
    ("units", "dtype", "said"), [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False)]
)
def test_bf16_without_units_is_said_with_what_fp32_gives(monkeypatch, tmp_path, units, dtype, said):
    inject(monkeypatch, tmp_path, {"dense": 0.9})
    monkeypatch.setattr(kernels, "bf16", lambda: units)
    ms = {torch.float32: 1.0, torch.bfloat16: 4.8}
    monkeypatch.setattr(choice, "full_ms", lambda problem, dtype: ms[dtype])
    notes = " ".join(dq.explain(quantized(dtype=getattr(torch, dtype))).notes)
    expected = "no bf16 units: full precision takes 4.8 times as long in bf16 as in fp32"
    assert (expected in notes and "dtype=torch.float32" in notes) is said


def test_the_full_layer_is_timed_once_in_each_dtype(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"full": 2.5})
    problem = next(layer for layer in quantized().modules() if hasattr(layer, "problem")).problem
    assert [choice.full_ms(problem, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)] == [2.5] * 3
    assert times.asked == [["full"], ["full"]]


def test_static_choice_says_nothing_of_speed(monkeypatch, tmp_path):
    times = inject(monkeypatch, tmp_path, {"dense": 9.0})
    monkeypatch.setenv("DQ_CHOICE", "static")
    report = dq.explain(quantized())
    assert times.asked == [] and "full precision" not in str(report)


def test_speeds_of_a_group_are_a_range():
    row = Row("a", "linear", "int8", None, 0, 1, None, "", "cpu", "int8 x int8", speedup=1.94)
    other = Row("b", "linear", "int8", None, 0, 1, None, "", "cpu", "int8 x int8", speedup=11.2)
    assert with_speed(row.kernel, [row]) == "int8 x int8, 1.9x full precision"
    assert with_speed(row.kernel, [other, row]) == "int8 x int8, 1.9-11.2x full precision"
    assert with_speed("plain", [Row("c", "linear", "int8", None, 0, 1, None, "")]) == "plain"
