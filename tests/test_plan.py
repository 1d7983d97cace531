"""Plans and recipes as JSON: what is written is read back; what is wrong is refused in a line that names the place."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq import formats, layers
from dq.errors import DQError, nearest
from dq.plan import PLAN_VERSION, LayerPlan, Plan, Recipe, TensorPlan, read_json

INT8 = TensorPlan.parse("int8/channel")
GROUPABLE = [name for name in formats.names() if not formats.get(name).fixed]
tensor_plans = st.builds(
    TensorPlan,
    st.sampled_from(GROUPABLE),
    st.sampled_from(("tensor", "channel", "token", "group:16")),
    st.sampled_from(("dynamic", "static", "table")),
    st.sampled_from((0.0, 0.1702, -2.5)),
    st.sampled_from((1.0, 0.95, 0.6)),
)


def linear(**more):
    return LayerPlan("linear", (12, 32), INT8, **more)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plan=tensor_plans)
def test_a_tensor_plan_reads_back_what_it_prints(plan):
    assert TensorPlan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("kind", "act"),
    [("linear", "int4/token/static/0/0.9"), ("linear", "nvfp4/group:16/dynamic/0/0.9"), ("conv1d", "int4/tensor")],
)
def test_a_part_of_the_range_is_for_integers_under_dynamic_scales_in_linears(kind, act):
    act = replace(TensorPlan.parse(act), clip=0.9)
    plan = LayerPlan(kind, (12, 32) if kind == "linear" else (12, 32, 1), INT8, act)
    with pytest.raises(DQError, match=r"layer 'name': activation \S+/dynamic/0/0.9 .* covers 0.9|static/0/0.9"):
        plan.check("name")
    linear(act=TensorPlan.parse("int4a/group:16/dynamic/0.17/0.9")).check("name")


def test_two_levels_of_scales_are_for_weights():
    plan = linear(act=TensorPlan.parse("int4/group:8+channel"))
    with pytest.raises(
        DQError, match=r"layer 'name': activation granularity 'group:8.channel', .*two are for weights"
    ):
        plan.check("name")
    found = replace(linear(), weight=TensorPlan.parse("int4/group:8+channel"))
    assert LayerPlan.from_dict("name", found.to_dict()) == found and str(found.weight) == "int4/group:8+channel"


@pytest.mark.parametrize("name", formats.names())
def test_a_format_alone_means_its_default_granularity(name):
    assert TensorPlan.parse(name) == TensorPlan(name, str(formats.get(name).granularity))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9/channel", "tensor plan 'int9/channel': format: got 'int9'.*did you mean"),
        ("int8/row", "tensor plan 'int8/row': granularity: got 'row', expected tensor, channel, token or group"),
        ("int8/group:x", "expected a whole number after the colon"),
        ("int8/group:64+channel", "got group:64\\+channel of int8, expected two-level scales with symmetric integers"),
        (
            "int4a/group:64+channel",
            "expected two-level scales with symmetric integers of at most 4 bits, such as int4",
        ),
        ("int8/token/dynamik", "scale is 'dynamik', expected one of .*Did you mean 'dynamic'"),
    ],
)
def test_a_wrong_tensor_plan_is_refused(text, message):
    with pytest.raises(DQError, match=message):
        TensorPlan.parse(text)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_plan_survives_json(data):
    kind = data.draw(st.sampled_from(("linear", "conv2d")))
    act = data.draw(st.sampled_from((None, "int8/tensor/static", "int8/tensor/table")))
    layer = LayerPlan(
        kind,
        (12, 32) if kind == "linear" else (12, 32, 3, 3),
        data.draw(tensor_plans),
        TensorPlan.parse(act) if act else None,
        smooth=data.draw(st.booleans()),
        rank=data.draw(st.integers(0, 4)),
        splits=data.draw(st.sampled_from(((), (8,), (8, 24)))),
        steps=3 if act and act.endswith("table") else 1,
        reason="why not",
    )
    plan = Plan({"a.b": layer}, {"c": "kept"}, "int8", "flux", "timestep", (0.25, 0.5), "bfloat16")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_file_reads_back(tmp_path):
    plan = Plan({"to_q": linear(rank=2)}, recipe="int8")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert '"rank": 2' in (tmp_path / "plan.json").read_text() and "smooth" not in (tmp_path / "plan.json").read_text()


def test_a_plan_of_a_newer_version_says_to_upgrade():
    data = Plan({"to_q": linear()}).to_dict() | {"version": PLAN_VERSION + 1}
    with pytest.raises(
        DQError, match=f"plan version: got {PLAN_VERSION + 1}, expected at most {PLAN_VERSION}.*upgrade"
    ):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "plan version: got None"),
        ({"layrs": {}}, "unknown field 'layrs'.*Did you mean 'layers'"),
        ({"layers": {"to_q": {"shape": [4, 4], "weight": "int8"}}}, "to_q.*kind.*missing"),
        ({"layers": {"to_q": {"kind": "linear", "shape": [4, 4], "weight": "int8", "rnk": 2}}}, "to_q.*'rnk'.*'rank'"),
        ({"layers": {"to_q": {"kind": "lin", "shape": [4, 4], "weight": "int8"}}}, "layer 'to_q': kind is 'lin'"),
        ({"layers": {"to_q": {"kind": "linear", "shape": [4, 4], "weight": "int8", "splits": [4]}}}, "to_q.*splits"),
        ({"layers": {"to_q": {"kind": "linear", "shape": [4, 4], "weight": "in8"}}}, "tensor plan 'in8'"),
    ],
)
def test_a_broken_plan_is_refused_where_it_is_broken(change, message):
    with pytest.raises(DQError, match=message):
        Plan.from_dict({**Plan({}).to_dict(), **change})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (linear(act=TensorPlan.parse("int8/tensor")), "granularity 'tensor' of a linear.*expected token or group"),
        (
            LayerPlan("conv2d", (4, 4, 3, 3), INT8, TensorPlan.parse("int8/token")),
            "granularity 'token' of a conv2d.*expected tensor",
        ),
        (linear(act=TensorPlan.parse("lut4/token")), "activation format 'lut4', expected one without stored tables"),
        (LayerPlan("stack", (2, 4, 4), INT8, rank=1), "stacked experts are weight-only"),
        (linear(splits=(8, 8)), "splits .* must rise strictly inside its 32 inputs"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(plan, message):
    with pytest.raises(DQError, match=f"layer 'name': .*{message}"):
        plan.check("name")


@pytest.mark.parametrize(
    "weight",
    (
        *("int8/channel", "int8/tensor", "int4/group:16", "int4a/group:16", "nvfp4", "mxfp4", "int4/group:16+channel"),
        *("lut4/channel", "lut3/tensor", "lut3/group:16", "vq16x4"),
    ),
)
@pytest.mark.parametrize("more", [{}, {"splits": (5, 20)}, {"rank": 3, "smooth": True}])
@pytest.mark.parametrize("shape", [(12, 32), (6, 32, 3), (6, 32, 1, 3), (2, 32, 6)])
def test_packed_bytes_are_those_of_the_stored_tensors(weight, more, shape):
    kind = {2: "linear", 3: "conv1d", 4: "conv2d"}[len(shape)]
    kind, more = ("stack", {}) if shape == (2, 32, 6) else (kind, more)
    plan = LayerPlan(kind, shape, TensorPlan.parse(weight), **more)
    tensors = layers.tensor_shapes(plan).values()
    stored = sum(_elements(size) * (dtype.itemsize if dtype is not None else 2) for size, dtype in tensors)
    assert plan.packed_bytes == stored


def _elements(shape):
    total = 1
    for size in shape:
        total *= size
    return total


def test_a_recipe_survives_json_and_refuses_what_it_does_not_know():
    recipe = Recipe("mine", ("int4/group:64", None), ("int8/channel", "int8/tensor"), keep=(r"proj_out$",))
    data = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(data) == recipe
    with pytest.raises(DQError, match=r"unknown field 'liner'.*Did you mean 'linear'"):
        Recipe.from_dict({**data, "liner": 1})
    with pytest.raises(DQError, match=r"linear.*missing"):
        Recipe.from_dict({"name": "mine", "conv": ["int8", None]})
    with pytest.raises(DQError, match="tensor plan 'int7x'"):
        Recipe.from_dict({**data, "edge": "int7x"})


def test_files_that_are_not_json_objects_are_refused(tmp_path):
    with pytest.raises(DQError, match="does not exist; give the path"):
        read_json(tmp_path / "none.json")
    for text, message in (("{", "cannot be read as JSON"), ("[1]", "holds a JSON list, expected an object")):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(DQError, match=message):
            read_json(tmp_path / "broken.json")


def test_nearest_names_the_closest_and_lists_all():
    assert nearest("int8-wieght", ("int8", "int8-weight")) == (
        "expected one of int8, int8-weight. Did you mean 'int8-weight'?"
    )
    assert nearest("zzz", ("int8",)) == "expected one of int8."


def test_a_status_is_a_fact_and_not_part_of_the_wish():
    recipe = Recipe("mine", ("int8/channel", None), ("int8/channel", None), status="experimental")
    assert "status" not in recipe.to_dict(), "older versions read what this one saves"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({**recipe.to_dict(), "status": "experimental"}).status == "experimental"
    with pytest.raises(DQError, match=r"recipe 'mine': status is 'stabel'.*Did you mean 'stable'"):
        Recipe.from_dict({**recipe.to_dict(), "status": "stabel"})
