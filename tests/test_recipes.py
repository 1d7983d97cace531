"""Planning: described families say what discovery finds, every layer is planned once, keep-lists and roles hold."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from torch import nn

import dq
from dq import cookbook, families, layers, methods, planning
from dq.errors import DQError
from dq.families import generic
from dq.plan import Plan, Recipe
from tests import zoo

DESCRIBED = sorted(families.described())
ROLES = ("modulation", "weight_only", "keep")
VARIED = ("FluxTransformer2DModel", "UNet2DConditionModel", "NucleusMoEImageTransformer2DModel")
each_described = pytest.mark.parametrize("name", DESCRIBED)
model_of = cache(zoo.default_model)


def layer_names(model):
    return [name for name, module in model.named_modules() if layers.kind_of(module) is not None]


# --- families --------------------------------------------------------------------------------------------------------


@each_described
def test_a_described_family_agrees_with_what_is_discovered(name):
    model, family = model_of(name), families.described()[name]
    found = generic.discover(model)
    assert set(family.blocks) == set(found.blocks)
    assert family.timestep == found.timestep


@each_described
def test_every_pattern_of_a_family_is_anchored_and_matches_a_layer(name):
    names, family = layer_names(model_of(name)), families.described()[name]
    for pattern in (pattern for role in ROLES for pattern in getattr(family, role)):
        assert pattern.endswith("$")
        assert any(re.match(pattern, layer) for layer in names), pattern
        assert not pattern.startswith((".*", "(.*"))


@each_described
def test_a_layer_has_one_role_in_its_family(name):
    family = families.described()[name]
    for layer in layer_names(model_of(name)):
        roles = [role for role in ROLES if any(re.match(pattern, layer) for pattern in getattr(family, role))]
        assert len(roles) <= 1, (layer, roles)


def test_no_class_is_described_twice():
    described = [name for family in set(families.described().values()) for name in family.classes]
    assert len(described) == len(set(described)) and set(described) <= set(zoo.ENTRIES)


def test_a_subclass_belongs_to_its_parents_family():
    class Mine(nn.Module):
        pass

    parent = type("FluxTransformer2DModel", (nn.Module,), {})
    assert families.of(type("Tuned", (parent,), {})()).name == "flux"
    assert families.of(Mine()).name == "generic"


# --- every layer, once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", dq.recipes())
@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", "UNet2DConditionModel", "NucleusMoEImageTransformer2DModel"]
)
def test_every_layer_is_planned_or_kept_with_a_reason(name, recipe):
    model = zoo.build(name)
    plan = planning.make_plan(model, cookbook.get(recipe))
    assert not set(plan.layers) & set(plan.kept)
    assert set(layer_names(model)) <= set(plan.layers) | set(plan.kept)
    assert all(plan.kept.values())
    for layer, row in plan.layers.items():
        row.check(layer)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_meta_model_and_the_real_one_get_the_same_plan():
    real = zoo.build("SD3Transformer2DModel")
    with torch.device("meta"):
        meta = type(real)(**{key: value for key, value in real.config.items() if not key.startswith("_")})
    int8 = cookbook.get("int8")
    assert planning.make_plan(meta, int8) == planning.make_plan(real, int8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.modulation = nn.Linear(64, 128)
        self.conv, self.pointwise = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)
        self.depthwise, self.router = nn.Conv2d(64, 64, 3, groups=64), nn.Linear(64, 8)


class Own(nn.Module):
    """A denoiser of no library."""

    def __init__(self, width=64):
        super().__init__()
        self.x_embedder, self.final = nn.Linear(4, 64), nn.Linear(64, 4)
        self.context = nn.Linear(width, 64)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, sigma):
        return x


def test_a_class_of_no_library_is_planned_by_its_structure():
    model = Own()
    plan = planning.make_plan(model, cookbook.get("int8"))
    block = {name: (str(row.weight), row.act and str(row.act)) for name, row in plan.layers.items()}
    assert plan.family == "generic" and plan.timestep == "sigma" and families.of(model).blocks == ("layers",)
    assert block["layers.0.to_q"] == ("int8/channel", "int8/token")
    assert block["layers.1.conv"] == ("int8/channel", "int8a/tensor")
    assert block["layers.1.pointwise"] == ("int8/channel", "int8a/token")
    assert block["layers.2.modulation"] == block["layers.2.depthwise"] == ("int8/channel", None)
    assert {"layers.0.router", "x_embedder", "final", "context"} <= set(plan.kept)


def test_an_embedder_too_large_to_keep_is_weight_only():
    plan = planning.make_plan(Own(width=4096), cookbook.get("int8"))
    assert plan.layers["context"].act is None and "large embedder" in plan.layers["context"].reason
    assert "x_embedder" in plan.kept


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("context_embedder", "edge"),
        ("layers.0.text_embedder.linear_1", "block"),
        ("layers.0.model.to_q", "block"),
        ("layers.0.norm1.linear", "modulation"),
        ("layers.0.img_mod.1", "modulation"),
        ("layers.0.resnets.1.time_emb_proj", "modulation"),
        ("t_embedder.mlp.2", "modulation"),
        ("time_embed.linear_1", "time"),
        ("layers.0.ffn.router", "keep"),
        ("proj_out", "edge"),
        ("layers.0.proj_out", "block"),
    ],
)
def test_roles_by_name_do_not_reach_too_far(name, role):
    family = generic.discover(Own())
    assert planning._role(family, name) == role


# --- what users ask for ----------------------------------------------------------------------------------------------


def test_a_keep_pattern_starts_at_the_beginning_of_the_name():
    plan = planning.make_plan(Own(), cookbook.get("int8"), keep=(r"layers\.0\.",))
    kept = {name for name in plan.kept if name.startswith("layers.0.")}
    assert kept == {name for name in layer_names(Own()) if name.startswith("layers.0.")}
    assert "kept by pattern" in plan.kept["layers.0.to_q"] and "layers.1.to_q" in plan.layers


@pytest.mark.parametrize(
    ("keep", "message"),
    [("to_q", "keep pattern 'to_q' matches no layer"), ("layers.(", "keep pattern .* is not a regular expression")],
)
def test_a_keep_pattern_that_matches_nothing_is_refused(keep, message):
    with pytest.raises(DQError, match=message):
        planning.make_plan(Own(), cookbook.get("int8"), keep=(keep,))


def test_a_model_without_layers_is_refused():
    with pytest.raises(DQError, match="Sequential has no linear, convolution or expert weights; pass a denoiser"):
        planning.make_plan(nn.Sequential(nn.LayerNorm(4)), cookbook.get("int8"))


def test_recipes_come_by_name_object_and_file(tmp_path):
    assert {"int8", "fp8", "mxfp8", "int8-weight", "int4-weight", "nvfp4-weight", "mxfp4-weight"} <= set(dq.recipes())
    recipe = cookbook.get("int8")
    assert cookbook.get(recipe) is recipe
    (tmp_path / "mine.json").write_text(json.dumps({**recipe.to_dict(), "name": "mine"}))
    mine = cookbook.get(tmp_path / "mine.json")
    assert isinstance(mine, Recipe) and (mine.name, mine.linear) == ("mine", recipe.linear)
    planning.make_plan(Own(), recipe).save(tmp_path / "plan.json")
    assert isinstance(cookbook.get(str(tmp_path / "plan.json")), Plan)
    with pytest.raises(DQError, match=r"recipe 'int8-wieght' is unknown, .*Did you mean 'int8-weight'"):
        cookbook.get("int8-wieght")


def test_mxfp8_rounds_inputs_in_blocks_and_leaves_those_of_convolutions():
    """A convolution's scales cover a sample, so that its activations have no blocks of 32."""
    recipe = cookbook.get("mxfp8")
    assert not recipe.needs_calibration
    plan = planning.make_plan(Own(), recipe)
    rows = {name: (str(row.weight), row.act and str(row.act)) for name, row in plan.layers.items()}
    assert rows["layers.0.to_q"] == ("mxfp8/group:32", "mxfp8/group:32")
    assert rows["layers.0.conv"] == ("mxfp8/group:32", None)
    assert rows["layers.0.modulation"][1] is None


def test_names_of_fitted_recipes_are_read_from_the_files_of_their_methods():
    assert cookbook.names() == [*cookbook.RECIPES, *methods.recipes()]
    for name in methods.recipes():
        assert cookbook.get(name).name == name


@pytest.mark.parametrize("name", ["int4", "w4", "4-bit", "INT4"])
def test_a_format_in_place_of_a_recipe_is_answered_with_the_recipes_of_its_bits(name):
    with pytest.raises(DQError, match=r"expected with 4-bit weights one of int4-weight, .*svdquant-int4") as error:
        cookbook.get(name)
    assert "int8" not in str(error.value)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {}], ids=["strided", "padded", "plain"])
def test_pointwise_convolutions_of_any_geometry_are_quantized(options):
    model = nn.Sequential(nn.Conv2d(32, 32, 1, **options))
    x = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        plan = planning.make_plan(model, cookbook.get("int8"))
        assert str(plan.layers["0"].act) == ("int8a/tensor" if options else "int8a/token")
        dq.quantize(model, plan, progress=False)
        noise = (model(x) - before).square().mean()
    assert 10 * torch.log10(before.square().mean() / noise) > 35
