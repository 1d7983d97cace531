"""Plans and recipes of any content are read or refused in one line; what is read is safe to use on a model."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from torch import nn

import dq
from dq import cookbook, planning, schema
from dq.disk import read_json
from dq.errors import DQError
from dq.model import check_fit
from dq.plan import COMPUTE, LayerPlan, Plan, Recipe, compute_dtype
from tests import mutated

GOOD = {"kind": "linear", "shape": [64, 64], "weight": "int8"}
TABLE = {"act": "int8/tensor/table", "steps": 2}
WRONG = [
    ({"shape": [64.0, 64]}, r"shape.0 is 64.0, expected a valid integer"),
    ({"shape": [64] * 9}, r"shape is \[64.*expected at most 5 items"),
    ({"shape": [2**31, 64]}, "shape.0 is 2147483648, expected less than"),
    ({"rank": -1}, "rank is -1, expected greater than or equal to 0"),
    ({"rank": "4"}, "rank is '4', expected a valid integer"),
    ({"rank": True}, "rank is True, expected a valid integer"),
    ({"rank": 10**30}, "rank is 10*, expected less than"),
    ({"rotate": "64"}, "rotate is '64', expected a valid integer"),
    ({"rotate": 48}, "rotate is 48, expected a divisor"),
    ({"splits": 5}, "splits is 5, expected a valid list"),
    ({"splits": [1.5]}, "splits.0 is 1.5, expected a valid integer"),
    ({"weight": "int8/group:99999999999999999999"}, "a group of more than"),
    ({"weight": "nvfp4/tensor"}, "got tensor, expected group:16, the only one of nvfp4"),
    ({"act": "int8/token/dynamic/nan"}, "shift finite"),
    ({"act": "int8/token/dynamic/1/2"}, "clip above 0 and at most 1"),
    ({"act": "int8/token/dynamic/1/0.5/1"}, "expected format/granularity/scale/shift/clip"),
    ({"smooth": "false"}, "smooth is 'false', expected a valid boolean"),
    ({**TABLE, "steps": -1}, "steps is -1, expected greater than or equal to 1"),
    (TABLE, "steps is 2, its activation int8/tensor/table, the plan has 0 edges; expected steps to be 1"),
    ({"steps": 3}, "steps is 3, its activation None.*expected steps to be 1"),
]


def plan_of(row):
    return {"version": 1, "layers": {"blocks.0": {**GOOD, **row}}}


@pytest.mark.parametrize(("row", "message"), WRONG, ids=[str(row)[:40] for row, _ in WRONG])
def test_a_field_of_another_type_or_size_is_named_with_what_was_expected(row, message):
    with pytest.raises(DQError, match=f"layer 'blocks.0'.*{message}") as error:
        Plan.from_dict(plan_of(row))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [float("nan")]}, "edges.0 is nan, expected a finite number"),
        ({"edges": [5, 1]}, "must rise"),
        ({"edges": None}, "edges is None, expected a valid list"),
        ({"layers": []}, r"layers is \[\], expected a valid dictionary"),
        ({"layers": {"blocks.0": 1}}, "layer 'blocks.0': got 1, expected a valid dictionary"),
        ({"compute_dtype": "load"}, "compute_dtype is 'load', expected one of bfloat16, float16, float32, float64"),
        ({"attention": 5}, "attention is 5"),
        ({"version": True}, "version: got True"),
        ({"version": -1}, "version: got -1"),
        ({"version": 10**5000}, "version: got a int of many digits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_plan_is_named_with_its_file(change, message, tmp_path):
    with pytest.raises(DQError, match=message):
        Plan.from_dict(plan_of({}) | change)
    try:
        (tmp_path / "plan.json").write_text(json.dumps(plan_of({}) | change))
    except ValueError:  # an integer of more digits than JSON is written with
        return
    with pytest.raises(DQError, match=rf"^file '{tmp_path}/plan.json': .*{message}"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_a_million_layers_is_refused_at_once():
    data = {"version": 1, "layers": {f"blocks.{number}": GOOD for number in range(1_000_000)}}
    before = time.process_time()
    with pytest.raises(DQError, match=f"expected at most {schema.MOST_LAYERS} items"):
        Plan.from_dict(data)
    assert time.process_time() - before < 5


def test_as_many_layers_as_may_be_are_read_in_seconds():
    data = {"version": 1, "layers": {f"blocks.{number}": GOOD for number in range(schema.MOST_LAYERS)}}
    before = time.process_time()
    assert len(Plan.from_dict(data).layers) == schema.MOST_LAYERS
    assert time.process_time() - before < 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rank": 300_000}, r"rank is 300000, expected at most 128 for a linear \(64, 64\)"),
        ({"weight": "int4/group:65536"}, "weight has groups of 65536, expected at most its 64 columns"),
        ({"act": "int8/group:65536"}, "act has groups of 65536, expected at most its 64 columns"),
    ],
)
def test_what_would_dwarf_a_layer_is_refused_before_it_is_allocated(row, message):
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64)])})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DQError, match=f"layer 'blocks.0': {message}"):
        dq.quantize(model, Plan.from_dict(plan_of(row)), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rotation_without_a_matrix_is_refused_before_anything_is_changed():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(92, 64)])})
    with pytest.raises(DQError, match="rotate is 92, of which no Hadamard matrix is built here"):
        dq.quantize(model, Plan.from_dict(plan_of({"rotate": 92, "shape": [64, 92]})), progress=False)


def test_dtypes_are_looked_up_in_a_closed_list():
    assert [compute_dtype(name) for name in COMPUTE] == [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for name in ("load", "hub", "int8", "__name__", ""):
        with pytest.raises(DQError, match="compute dtype is"):
            compute_dtype(name)
        with pytest.raises(DQError, match="compute_dtype is"):
            dq.DQConfig("int8", compute_dtype=name)
        with pytest.raises(DQError, match="compute dtype is"):
            _ = Plan({}, compute_dtype=name).dtype


def sample():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64), nn.Conv2d(32, 32, 3)])})
    return planning.make_plan(model, cookbook.get("int8")).to_dict() | {"edges": [1.5, 7], "timestep": "t"}, model


@pytest.mark.parametrize("seed", range(4))
def test_any_plan_is_refused_in_one_line_or_fits_its_bounds(seed):
    good, model = sample()
    assert Plan.from_dict(good).layers
    for data in mutated.values(good, 300, seed):
        for checked in (True, False):
            try:
                plan = Plan.from_dict(data, checked)
                if checked:
                    plan.dtype  # noqa: B018
                    check_fit(model, plan)
            except DQError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("seed", range(2))
def test_any_recipe_is_refused_in_one_line_or_read(seed):
    good = cookbook.get("svdquant-int4").to_dict() | {"keep": ["a.*"]}
    for data in mutated.values(good, 300, seed):
        try:
            recipe = Recipe.from_dict(data)
        except DQError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_any_bytes_of_a_file_are_a_plan_or_an_error(tmp_path):
    path, content = tmp_path / "plan.json", json.dumps(sample()[0]).encode()
    for seed in range(200):
        path.write_bytes(mutated.bytes_of(content, seed))
        for read in (Plan.load, cookbook.get):
            try:
                read(path)
            except DQError as error:
                assert str(path) in str(error)


def test_what_is_no_plain_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(DQError, match="is no plain file"):
            read_json(path)


def test_a_layer_is_checked_alone_too():
    with pytest.raises(DQError, match="layer 'a' of the plan: rank is -1"):
        LayerPlan.from_dict("a", {**GOOD, "rank": -1})
