"""The verbs: quantize, explain, dequantize, set_backend; what they leave alone; errors that leave all as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

import dq
from dq import cookbook, planning
from dq.errors import DQError
from dq.layers import PackedLinear, packed_layers
from dq.plan import Plan, Recipe
from tests import zoo

PIXART, UNET, WAN, EXPERTS = (
    "PixArtTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
    "NucleusMoEImageTransformer2DModel",
)


class Denoiser(nn.Module):
    """A denoiser of no library: x (batch, 32) -> (batch, 32)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = x + block(x)
        return x


class Pipeline(DiffusionPipeline):
    """Two denoisers, a scheduler and a part that is no denoiser; draws noise and takes three steps."""

    def __init__(self, transformer, transformer_2, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator=None):
        x = torch.randn(2, 32, generator=generator)
        self.scheduler.set_timesteps(3)
        for timestep in self.scheduler.timesteps:
            noise = self.transformer(x, timestep) * 0.1 + torch.randn(2, 32, generator=generator) * 0.01
            x = self.scheduler.step(noise, timestep, x).prev_sample
        return x


def pipeline():
    return Pipeline(Denoiser(), Denoiser(), nn.Linear(8, 32), DDIMScheduler())


def frozen(model):
    """Everything a failed call could have changed: modules, their types, and the bytes of all tensors."""
    types = [(name, id(module), type(module)) for name, module in model.named_modules()]
    return types, {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}, dir(model)


def unchanged(model, before):
    types, tensors, names = frozen(model)
    same = types == before[0] and tensors.keys() == before[1].keys() and names == before[2]
    return same and all(
        pointer == before[1][name][0] and torch.equal(value.nan_to_num(), before[1][name][1].nan_to_num())
        for name, (pointer, value) in tensors.items()
    )


# --- quantize --------------------------------------------------------------------------------------------------------


def test_every_denoiser_of_a_pipeline_is_quantized_and_nothing_else():
    pipe = pipeline()
    report = dq.quantize(pipe, "int8", progress=False)
    assert {row.name.split(".")[0] for row in report.layers} == {"transformer", "transformer_2"}
    assert packed_layers(pipe.transformer) and packed_layers(pipe.transformer_2) and type(pipe.vae) is nn.Linear
    full = sum(p.numel() * 4 for p in Denoiser().parameters())
    assert report.bytes_before == 2 * full and report.bytes_after < 0.32 * report.bytes_before


class Holder(nn.Module):
    """Weights for another model, as a motion adapter has; never called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, sample):
        """It does nothing."""


def test_a_part_that_only_holds_weights_for_others_is_no_denoiser():
    pipe = Pipeline(Denoiser(), Holder(), nn.Linear(8, 32), DDIMScheduler())
    assert list(dq.api.find_denoisers(pipe)) == ["transformer"]
    dq.quantize(pipe, "int8", progress=False)
    assert not packed_layers(pipe.transformer_2)


@pytest.mark.parametrize("order", [1, -1])
def test_a_part_whose_layers_all_belong_to_another_is_quantized_with_it(order):
    whole, part = Denoiser(), Denoiser()
    part.blocks = whole.blocks[:2]
    names = ("transformer", "transformer_2")[::order]
    pipe = Pipeline(**dict(zip(names, (whole, part), strict=True)), vae=nn.Linear(8, 32), scheduler=DDIMScheduler())
    assert list(dq.api.find_denoisers(pipe)) == [names[0]]
    same = Pipeline(whole, whole, nn.Linear(8, 32), DDIMScheduler())
    assert list(dq.api.find_denoisers(same)) == ["transformer"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_layer_that_two_denoisers_share_is_one_layer_afterwards(calibrated):
    first, second = Denoiser(), Denoiser()
    second.blocks[1] = first.blocks[1]
    pipe = Pipeline(first, second, nn.Linear(8, 32), DDIMScheduler())
    if calibrated:
        pipe.__class__ = Alternating
        seen = dq.Calibration(prompts=["any"], steps=3, samples=3, call_kwargs={})
        report = dq.quantize(pipe, "gptq-w4a8", calibration=seen, progress=False)
    else:
        report = dq.quantize(pipe, "int8", progress=False)
    assert first.blocks[1][0] is second.blocks[1][0] and isinstance(first.blocks[1][0], PackedLinear)
    assert first.blocks[0][0] is not second.blocks[0][0]
    shared = {id(value): value.nbytes for model in (first, second) for value in model.parameters()}
    assert report.bytes_after == sum(shared.values())
    assert torch.isfinite(pipe()).all()


class Alternating(Pipeline):
    """Both denoisers in every step."""

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=3, generator=None):
        x = torch.randn(2, 32, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            noise = self.transformer(x, timestep) * 0.1 + self.transformer_2(x, timestep) * 0.1
            x = self.scheduler.step(noise, timestep, x).prev_sample
        return x


def test_other_components_are_quantized_when_named():
    pipe = Pipeline(Denoiser(), None, nn.Sequential(nn.Linear(64, 64)), DDIMScheduler())
    report = dq.quantize(pipe, "int8", components={"vae": "int8-weight"}, progress=False)
    acts = {row.name: row.act for row in report.layers if row.weight}
    assert acts["vae.0"] is None and acts["transformer.blocks.0.2"] == "int8/token"
    with pytest.raises(DQError, match=r"component 'vea' is not a model of Pipeline, .*Did you mean 'vae'"):
        dq.quantize(pipeline(), "int8", components={"vea": "int8"}, progress=False)


def test_a_denoiser_can_be_left_as_it_is_or_get_a_recipe_of_its_own():
    pipe = pipeline()
    dq.quantize(pipe, "int8", components={"transformer_2": None}, progress=False)
    assert packed_layers(pipe.transformer) and not packed_layers(pipe.transformer_2)
    dq.quantize(pipe, "int8-weight", components={"transformer": None}, progress=False)
    acts = {row.name.split(".")[0]: row.act for row in dq.explain(pipe).layers if row.weight}
    assert acts == {"transformer": "int8/token", "transformer_2": None}
    pipe = pipeline()
    report = dq.quantize(pipe, "int8", components={"transformer_2": "int4-weight"}, progress=False)
    weights = {row.name.split(".")[0]: row.weight for row in report.layers if row.weight}
    assert weights["transformer"].startswith("int8") and weights["transformer_2"].startswith("int4")


def test_leaving_everything_as_it_is_is_refused():
    none = {"transformer": None, "transformer_2": None}
    with pytest.raises(DQError, match="components leaves every part of Pipeline as it is"):
        dq.quantize(pipeline(), "int8", components=none, progress=False)
    named = none | {"transformer_2": "int8"}
    given = dq.Calibration(["a"], steps=1, samples=1)
    with pytest.raises(DQError, match="components leaves no denoiser to 'gptq-int4-weight'"):
        dq.quantize(pipeline(), "gptq-int4-weight", calibration=given, components=named, progress=False)


def test_quantizing_draws_no_random_numbers_and_leaves_the_scheduler():
    pipe = pipeline()
    torch.manual_seed(7)
    state, config = torch.get_rng_state(), copy.deepcopy(dict(pipe.scheduler.config))
    scheduler, tensors = pipe.scheduler, copy.deepcopy(vars(pipe.scheduler))
    dq.quantize(pipe, "int8", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.scheduler is scheduler and dict(pipe.scheduler.config) == config
    assert all(str(vars(scheduler)[name]) == str(value) for name, value in tensors.items())


def test_a_quantized_pipeline_draws_the_same_noise():
    plain, pipe = pipeline(), pipeline()
    dq.quantize(pipe, "int8", progress=False)
    used = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(plain(used[0]), pipe(used[1]), rtol=0, atol=0.05)
    assert torch.equal(used[0].get_state(), used[1].get_state())


def test_the_report_adds_up_and_reads_as_json():
    model = zoo.build(UNET)
    report = dq.quantize(model, "int8", progress=False)
    rows = json.loads(report.to_json())["layers"]
    stored = packed_layers(model)
    assert {row["name"] for row in rows if row["weight"]} == set(stored)
    for row in rows:
        if row["weight"]:
            layer = stored[row["name"]]
            assert row["bytes"] == sum(p.numel() * p.element_size() for p in layer.parameters())
            assert row["error_db"] > 35 and row["kernel"]
    assert report.seconds > 0 and "layers quantized" in str(report) and "int8/channel" in str(report)


def test_a_plan_from_json_gives_the_same_model_and_stays_the_callers(tmp_path):
    first, second = zoo.build(PIXART), zoo.build(PIXART)
    plan = planning.make_plan(first, cookbook.get("int8"))
    plan.save(tmp_path / "plan.json")
    dq.quantize(first, "int8", progress=False)
    before = copy.deepcopy(plan)
    dq.quantize(second, plan, progress=False)
    assert plan == before
    third = zoo.build(PIXART)
    dq.quantize(third, tmp_path / "plan.json", progress=False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]) and torch.equal(value, third.state_dict()[name])


def test_layers_are_kept_by_pattern():
    model = zoo.build(PIXART)
    report = dq.quantize(model, "int8", keep=r"transformer_blocks\.0\.attn", progress=False)
    kept = {row.name for row in report.layers if row.weight is None}
    assert any(name.startswith("transformer_blocks.0.attn1") for name in kept)
    assert all(type(model.get_submodule(name)) in (nn.Linear, nn.Conv2d) for name in kept)


def test_expert_weights_are_kept_by_pattern():
    model = zoo.build(EXPERTS)
    report = dq.quantize(model, "int8", keep=r".*\.experts\.down_proj", progress=False)
    kept = [row for row in report.layers if row.weight is None and row.kind == "stack"]
    assert kept and all(row.bytes == 4 * model.get_parameter(row.name).numel() for row in kept)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_experts_say_that_they_are_weight_only_and_why_no_grouped_product_serves_them(recipe):
    model = zoo.build(EXPERTS)
    dq.quantize(model, recipe, progress=False)
    rows = dq.explain(model).layers
    stacks = [row for row in rows if row.kind == "stack" and row.weight is not None]
    assert stacks and all(row.act is None and "decode" in row.kernel for row in stacks)
    assert all("stacked experts are weight-only" in dict(row.why_not)["scaled"] for row in stacks)
    assert not any("stacked" in reason for row in rows if row.kind != "stack" for _, reason in row.why_not)


def test_the_compute_dtype_is_that_of_most_weights():
    model = zoo.build(WAN, dtype=torch.bfloat16)  # its tables and time embedder stay in fp32
    assert next(model.parameters()).dtype == torch.float32
    dq.quantize(model, "int8", progress=False)
    assert {layer.compute_dtype for layer in packed_layers(model).values()} == {torch.bfloat16}


# --- explain, dequantize, set_backend --------------------------------------------------------------------------------


def test_explain_lists_every_layer_with_its_kernel_and_the_reasons_against_faster_ones():
    model = zoo.build(UNET)
    plan = planning.make_plan(model, cookbook.get("int8"))
    dq.quantize(model, "int8", progress=False)
    rows = {row.name: row for row in dq.explain(model).layers}
    assert set(rows) == set(plan.layers) | set(plan.kept)
    for name, layer in plan.layers.items():
        assert rows[name].kernel and (rows[name].weight, rows[name].act) == (
            str(layer.weight),
            str(layer.act) if layer.act else None,
        )
        if layer.act is None:
            reasons = " ".join(reason for _, reason in rows[name].why_not)
            assert "weight-only" in rows[name].kernel or "weight-only: activations stay in floating point" in reasons
    assert all(rows[name].reason == reason for name, reason in plan.kept.items())


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["int8-weight", "int4-weight", "nvfp4-weight"])
@pytest.mark.parametrize("name", [PIXART, UNET, EXPERTS])
def test_dequantize_gives_plain_layers_with_the_output_of_the_packed_ones(name, recipe):
    model = zoo.build(name)
    types = {layer: type(module) for layer, module in model.named_modules()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    dq.quantize(model, recipe, progress=False)
    packed = zoo.call(model, zoo.ENTRIES[name], dtype=torch.float32)
    dq.dequantize(model)
    assert {layer: type(module) for layer, module in model.named_modules()} == types
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert not packed_layers(model)
    plain = zoo.call(model, zoo.ENTRIES[name])
    torch.testing.assert_close(plain, packed, rtol=1e-3, atol=1e-3 * packed.abs().max().item())
    dq.quantize(model, recipe, progress=False)  # and it can be quantized again


@torch.no_grad()
def test_set_backend_changes_the_kernel_of_every_layer_and_not_the_output():
    model = zoo.build(PIXART)
    dq.quantize(model, "int8", progress=False)
    fast = zoo.call(model, zoo.ENTRIES[PIXART], dtype=torch.float32)
    dq.set_backend("reference")
    try:
        slow = zoo.call(model, zoo.ENTRIES[PIXART], dtype=torch.float32)
        kernels = {row.backend for row in dq.explain(model).layers if row.weight}
    finally:
        dq.set_backend("auto")
    assert kernels == {"reference"}
    assert 10 * torch.log10(slow.square().sum() / (slow - fast).square().sum()) > 60
    assert any(row.backend in ("cpu", "torchops", "dense") for row in dq.explain(model).layers)


def test_unknown_backends_are_refused_with_the_nearest_name():
    with pytest.raises(DQError, match=r"backend 'refrence' is unknown, .*Did you mean 'reference'"):
        dq.set_backend("refrence")


# --- errors ----------------------------------------------------------------------------------------------------------


def spoiled(model):
    """NaN in the last layer, so that all others are packed before it is seen."""
    model.blocks[2][2].weight.data[1, 2] = torch.nan
    return model


def other_plan():
    return planning.make_plan(zoo.build(PIXART), cookbook.get("int8"))


def newer_plan(folder):
    data = planning.make_plan(Denoiser(), cookbook.get("int8")).to_dict() | {"version": 99}
    (Path(folder) / "newer.json").write_text(json.dumps(data))
    return Path(folder) / "newer.json"


def misshapen():
    plan = planning.make_plan(Denoiser(), cookbook.get("int8"))
    return Plan.from_dict(json.loads(json.dumps(plan.to_dict()).replace("[32, 64]", "[32, 63]")))


CALIBRATED = Recipe("mine", ("int8", "int8/token"), ("int8", None), method="gptq")
WRONG = {
    "recipe": ("int8-wight", {}, r"recipe 'int8-wight' is unknown, expected one of .*Did you mean 'int8-weight'\?"),
    "keep": ("int8", {"keep": ["to_q"]}, "keep pattern 'to_q' matches no layer"),
    "keep with a plan": (other_plan, {"keep": ["blocks"]}, r"keep=\['blocks'\] goes with a recipe, got a plan"),
    "newer plan": (newer_plan, {}, "plan version: got 99, expected at most 1.*upgrade"),
    "other model": (other_plan, {}, r"layer '[\w.]+' of the plan is not in Denoiser; is this plan for another model"),
    "shape": (
        misshapen,
        {},
        r"layer 'blocks\.0\.2': the plan is for linear \(32, 63\), Denoiser has linear \(32, 64\)",
    ),
    "calibration": (CALIBRATED, {}, "recipe 'mine' needs calibration data; pass calibration=a function that runs"),
    "data-free": ("int8", {"calibration": print}, "recipe 'int8' is data-free; leave calibration=None"),
    "no file": ("nowhere.json", {}, "file 'nowhere.json' does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_clear_line_and_changes_nothing(case, tmp_path):
    recipe, options, message = WRONG[case]
    if callable(recipe):
        recipe = recipe(tmp_path) if recipe is newer_plan else recipe()
    model = Denoiser()
    before = frozen(model)
    with pytest.raises(DQError, match=message) as error:
        dq.quantize(model, recipe, progress=False, **options)
    assert "\n" not in str(error.value)
    assert unchanged(model, before)


def test_weights_that_are_not_finite_leave_every_component_as_it_was():
    pipe = Pipeline(Denoiser(), spoiled(Denoiser()), None, DDIMScheduler())
    before = [frozen(model) for model in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(DQError, match=r"layer 'blocks\.2\.2': weight: got 1 non-finite values of 2048") as error:
        dq.quantize(pipe, "int8", progress=False)
    assert "\n" not in str(error.value)
    assert unchanged(pipe.transformer, before[0]) and unchanged(pipe.transformer_2, before[1])


def test_a_quantized_model_is_not_quantized_again():
    model = Denoiser()
    dq.quantize(model, "int8", progress=False)
    before = frozen(model)
    with pytest.raises(DQError, match=r"Denoiser is already quantized \(layer 'blocks\.0\.0'\); call dq.dequantize"):
        dq.quantize(model, "int8", progress=False)
    assert unchanged(model, before) and isinstance(model.blocks[0][2], PackedLinear)


def test_a_model_with_fused_adapters_still_attached_is_refused():
    peft = pytest.importorskip("peft")
    model = zoo.build(UNET)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    model.fuse_lora()
    before = frozen(model)
    with pytest.raises(
        DQError, match=r"UNet2DConditionModel has adapters fused into its weights \('default'\); before"
    ):
        dq.quantize(model, "int8", progress=False)
    assert unchanged(model, before)


@pytest.mark.parametrize("verb", [dq.explain, dq.dequantize])
def test_explain_and_dequantize_want_a_quantized_target(verb):
    with pytest.raises(DQError, match=r"Denoiser has no quantized layer; call dq\.quantize"):
        verb(Denoiser())


@pytest.mark.parametrize(
    ("target", "message"),
    [("a path", "target is a str, expected a DiffusionPipeline or a torch nn.Module"), (nn.LayerNorm(4), "no linear")],
)
def test_targets_that_are_no_models_are_refused(target, message):
    with pytest.raises(DQError, match=message):
        dq.quantize(target, "int8", progress=False)


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(DQError, match="Pipeline has no denoiser among transformer, transformer_2, vae, scheduler"):
        dq.quantize(Pipeline(None, None, nn.Linear(4, 4), DDIMScheduler()), "int8", progress=False)


@torch.no_grad()
def test_a_model_may_have_a_backend_of_its_own_whatever_the_default_is():
    one, other = (zoo.build(PIXART) for _ in range(2))
    for model in (one, other):
        dq.quantize(model, "int8", progress=False)

    def backends(model):
        return {row.backend for row in dq.explain(model).layers if row.weight}

    dq.set_backend("reference", one)
    assert backends(one) == {"reference"} and backends(other) != {"reference"}
    copied = copy.deepcopy(one)
    dq.set_backend("reference")
    try:
        dq.set_backend("auto", one)
        assert backends(one) != {"reference"} and backends(other) == backends(copied) == {"reference"}
    finally:
        dq.set_backend("auto")
    assert backends(copied) == {"reference"} != backends(other)
    with pytest.raises(DQError, match="no quantized layer"):
        dq.set_backend("reference", zoo.build(PIXART))
