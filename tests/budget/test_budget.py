"""Budgets: limits hold, the choice is better than plain formats, and what cannot be is refused with what can."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from typer.testing import CliRunner

import dq
from dq import api, cookbook
from dq.budget import charts, choices, cost, margins, search, sensing, sensitivity, trajectory
from dq.budget.predictions import BUCKETS, Predictions
from dq.cli import app
from dq.errors import DQError
from dq.kernels import cpu
from dq.layers import packed_layers
from dq.plan import LayerPlan, Plan, TensorPlan
from dq.trace.records import Store
from dq.trace.running import Runner
from pipelines import tiny
from tests.pipelines import parts

CALL = {key: value for key, value in tiny.CALL["tiny-pixart"].items() if key != "num_inference_steps"}


def calibration(**changes):
    return dq.Calibration(**{"steps": 4, "samples": 8, "call_kwargs": CALL, **changes})


def size(model):
    return sum(value.numel() * value.element_size() for value in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def explored(folder):
    """(Search, plans) of int8-weight on tiny-pixart, layers timed."""
    pipe = tiny.load("tiny-pixart")
    wish = sensing.Wish(timed=True, checks=4)
    return api.explore(pipe, "int8-weight", calibration(folder=folder), wish=wish, progress=False)


@pytest.mark.parametrize("bits", [3.0, 4.5, 6.0])
def test_bytes_stay_under_the_limit_and_use_it(explored, bits):
    found, _ = explored
    whole = found.bytes_of(found.choose(dq.Budget(bits=bits)))
    chosen = found.choose(dq.Budget(bytes=whole))
    assert 0.98 * whole <= found.bytes_of(chosen) <= whole


def test_a_quantized_pipeline_has_the_bytes_that_were_predicted(explored, folder):
    found, _ = explored
    limit = found.bytes_of(found.choose(dq.Budget(bits=4.5)))
    pipe = tiny.load("tiny-pixart")
    report = dq.quantize(
        pipe, "int8-weight", budget=dq.Budget(bytes=limit), calibration=calibration(folder=folder), progress=False
    )
    assert report.bytes_after == size(pipe.transformer) <= limit
    assert report.bytes_after >= 0.98 * limit
    assert len({layer.plan.weight.format for layer in packed_layers(pipe.transformer).values()}) > 2
    assert any("rank correlation" in note for note in report.notes)


def test_the_choice_is_predicted_to_be_better_than_one_format_greedy_and_random(explored):
    found, _ = explored
    plain = charts.uniform(found)["int4/group:64"]
    budget = dq.Budget(bytes=found.bytes_of(plain))
    best = found.sqnr_db(found.choose(budget))
    assert best > found.sqnr_db(plain) + 0.5
    assert best >= found.sqnr_db(found.greedy(budget))
    assert best > found.sqnr_db(found.random(budget, 0)) + 1


def test_measured_errors_of_unseen_plans_rank_as_predicted(explored):
    assert explored[0].trust["trajectory"] >= 0.8


def test_first_order_errors_are_those_measured_with_one_layer_at_a_time(explored, folder):
    pipe = tiny.load("tiny-pixart")
    model = pipe.transformer
    menus = choices.menus(
        api._plan_all({"": (model, cookbook.get("int8-weight"))}, ())[""], cookbook.get("int8-weight")
    )
    menus = {name: menu[3:6] for name, menu in list(menus.items())[2:12]}  # 5, 4 and 3 bits
    few, store = Predictions(model, Store(folder / "transformer"), 4), Store(folder / "first-order")
    predicted = sensitivity.prediction(
        model, menus, Predictions(model, Store(folder / "transformer"), 8), store, progress=False
    )
    measured = sensitivity.judged(model, menus, few, store, torch.float32, progress=False)
    pairs = [(predicted[n][i, -1], measured[n][i, -1]) for n in menus for i in range(3)]
    logs = np.log(np.array(pairs))
    assert np.corrcoef(logs.T)[0, 1] > 0.97


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    pipe, runs = tiny.load("tiny-pixart"), []
    whole = trajectory._walk

    def dies(runner, run, *rest):
        if len(runs) == 2:
            raise KeyboardInterrupt
        runs.append(run)
        whole(runner, run, *rest)

    runner = Runner(pipe, calibration(steps=2, samples=2))
    models_of, menus = {"": pipe.transformer}, {"": {"transformer_blocks.0.attn1.to_q": _menu((256, 256))}}
    undisturbed, count = trajectory.gradients(runner, models_of, menus, Store(tmp_path / "a"), False, most=4)
    monkeypatch.setattr(trajectory, "_walk", dies)
    with pytest.raises(KeyboardInterrupt):
        trajectory.gradients(runner, models_of, menus, Store(tmp_path / "b"), False, most=4)
    monkeypatch.setattr(trajectory, "_walk", lambda *given: (runs.append(given[1]), whole(*given)))
    resumed, again = trajectory.gradients(runner, models_of, menus, Store(tmp_path / "b"), False, most=4)
    assert runs == [0, 1, 2, 3] and count == again == 4
    for name, table in undisturbed[""].items():
        assert np.array_equal(table, resumed[""][name])


def _menu(shape):
    plan = LayerPlan("linear", shape, TensorPlan.parse("int8/channel"))
    return choices.menu(plan, cookbook.get("int8-weight"))


def test_the_gradient_through_the_run_is_the_derivative_of_the_picture(tmp_path):
    pipe = tiny.load("tiny-pixart")
    name = "transformer_blocks.1.attn2.to_v"
    layer, runner = pipe.transformer.get_submodule(name), Runner(pipe, calibration(steps=3, samples=3))
    listener = margins.Listener(pipe.transformer, {name: _menu((256, 256))})
    seen = {}
    listener.end = lambda: seen.update(listener.summed) or 1.0
    trajectory._walk(runner, 0, {"": pipe.transformer}, {"": listener}, sensitivity.generator(0, 0))
    step = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    judge = trajectory.Ends(runner, 1)
    signs = torch.randint(0, 2, judge._truth[0].shape, generator=sensitivity.generator(0, 0)) * 2 - 1
    with torch.no_grad():
        layer.weight += step
        above = judge._end(0)
        layer.weight -= 2 * step
        below = judge._end(0)
    slope = float(((above - below) / 2 * signs).sum())
    assert float((seen[name] * step).sum()) == pytest.approx(slope, rel=0.02)


def test_activations_branches_and_full_precision_are_among_the_choices():
    linear = LayerPlan("linear", (512, 512), TensorPlan.parse("int4/group:64"), TensorPlan.parse("int4/group:64"))
    menu = choices.menu(linear, cookbook.get("svdquant-int4"))
    assert menu[0] is None and linear in menu
    assert {choice.act.spec.bits for choice in menu[1:]} == {4, 8}
    assert {choice.weight.spec.bits for choice in menu[1:]} == {8, 7, 6, 5, 4, 3, 2}
    assert {0, 16, 32} >= {choice.rank for choice in menu[1:]} > {0}
    assert not any(choice.rank for choice in choices.menu(linear, cookbook.get("int8"))[1:])


def test_below_two_level_scales_are_two_level_ones_and_above_are_scales_of_groups():
    linear = LayerPlan("linear", (512, 512), TensorPlan.parse("int4/group:64+channel"), TensorPlan.parse("int8/token"))
    menu = [str(choice.weight) for choice in choices.menu(linear, cookbook.get("int8"))[1:]]
    above = ["int8/channel", "int7/group:64", "int6/group:64", "int5/group:64"]
    assert menu == above + [f"int{bits}/group:64+channel" for bits in (4, 3, 2)]


@pytest.mark.parametrize("recipe", ["int8", "svdquant-int4", "svdquant-w4a8", "qdiffusion-w4a8", "viditq-mp-w4a8"])
def test_every_choice_of_a_convolution_has_a_kernel(recipe):
    wish = cookbook.get(recipe)
    weight, act = (TensorPlan.parse(text) for text in wish.conv)
    conv = LayerPlan("conv2d", (64, 128, 3, 3), weight, act)
    menu = [choice for choice in choices.menu(conv, wish) if choice is not None and choice != conv]
    refused = {cpu._why_not_integer("conv", replace(choice, rank=0), None) for choice in menu}
    assert menu and refused == {None}
    widths = {choice.weight.spec.bits for choice in menu} | {weight.spec.bits}
    assert widths == ({8, 6, 4} if recipe == "viditq-mp-w4a8" else set(choices.WIDTHS))


def test_layers_that_share_an_input_round_it_once():
    """Two layers that take back each other's error do no harm, two that do the same do four times that of one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": nn.Linear(64, 64, bias=False), "k": nn.Linear(64, 64, bias=False)})
    plan = LayerPlan("linear", (64, 64), TensorPlan.parse("int8/channel"), TensorPlan.parse("int4/token"))
    x, signs = torch.randn(32, 64), torch.randint(0, 2, (32, 64)) * 2.0 - 1

    def energy(factor, names):
        with torch.no_grad():
            model["k"].weight.copy_(factor * model["q"].weight)
        listener = margins.Listener(model, dict.fromkeys(names, (plan,)))
        with listener.listening():
            ((model["q"](x) + model["k"](x)) * signs).sum().backward()
        listener.end()
        return sum(float(found.acts["int4/token"][margins.WHOLE]) for found in listener.running.values())

    alone = energy(1.0, ["q"])
    assert energy(1.0, ["q", "k"]) == pytest.approx(4 * alone, rel=1e-3)
    assert energy(-1.0, ["q", "k"]) < 1e-6 * alone


def test_the_thirds_of_a_run_are_of_its_steps_whoever_calls_and_how_often():
    pipe = parts.wan()  # two calls a step for guidance; the first denoiser has the first steps, the second the others
    call = {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    seen = dq.Calibration(prompts=["a cat"], steps=6, samples=6, call_kwargs=call)
    name, thirds = "blocks.0.ffn.net.2", {"transformer": [], "transformer_2": []}
    models = {part: getattr(pipe, part) for part in thirds}
    listeners = {}
    for part, model in models.items():
        listener = margins.Listener(model, {name: _menu(tuple(model.get_submodule(name).weight.shape))})
        listener.running[name].add = lambda gradient, third, part=part: thirds[part].append(third)
        listeners[part] = listener
    trajectory._walk(Runner(pipe, seen), 0, models, listeners, sensitivity.generator(0, 0))
    first, second = ([third for third in found if third < margins.WHOLE] for found in thirds.values())
    assert first and second and max(first) <= min(second)
    assert sorted(first + second) == [0] * 4 + [1] * 4 + [2] * 4, "two steps a third, two calls a step"


@pytest.mark.parametrize("recipe, fits", [("mixdq-w4a8", True), ("gptq-w4a8", True), ("viditq-mp-w4a8", False)])
def test_a_budget_leaves_room_for_smoothing_only_where_a_method_smooths(recipe, fits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
    wish = cookbook.get(recipe)
    wish = replace(wish, options={**wish.options, "bits": 8.25, "choices": ("int8/channel", "int4/channel")})
    report = dq.quantize(model, wish, calibration=lambda m: m(torch.randn(32, 128)), progress=False)
    rounded = {row.weight for row in report.layers if row.weight}
    assert (rounded == {"int8/channel"}) == fits, "8 bits and a scale for 128 of them are 8.25"


def test_a_branch_lowers_the_predicted_error(explored):
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    weight += 8 * torch.randn(256, 4) @ torch.randn(4, 256)
    plan = LayerPlan("linear", (256, 256), TensorPlan.parse("int4/group:64"))
    own = margins.Margins.empty(plan, ())
    own.add(torch.randn(256, 256), margins.WHOLE)
    plain, branched = margins.energies(weight, (plan, LayerPlan(**{**vars(plan), "rank": 16})), own)[:, -1]
    assert branched < 0.5 * plain


def test_harm_falls_with_every_bit(explored):
    rows = [row for *_, row in explored[0].rows() if len(row.choices) > 1]
    falls = [bool((np.diff(row.harm[1:]) > 0).all()) for row in rows]  # from 8 bits down to 2
    assert np.mean(falls) >= 0.9


def test_pictures_of_other_prompts_are_nearer_than_with_one_format_in_the_same_bytes(explored):
    found, plans = explored
    plain = charts.uniform(found)["int4/group:64"]
    mixed = found.choose(dq.Budget(bytes=found.bytes_of(plain)))
    pipe = tiny.load("tiny-pixart")
    others = calibration(steps=8, seed=5, samples=8)
    judge = trajectory.Ends(Runner(pipe, others), 6)
    errors = []
    for chosen in (plain, mixed):
        dq.quantize(pipe, search.plans(found, plans, chosen, "test")["transformer"], progress=False)
        errors.append(judge.error()[-1])
        dq.dequantize(pipe)
        pipe.transformer.load_state_dict(tiny.load("tiny-pixart").transformer.state_dict())
    assert 10 * np.log10(errors[0] / errors[1]) > 1


def test_a_loud_start_token_leaves_the_other_tokens_exact():
    text = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    text[:, 0] *= 60
    model = torch.nn.ModuleDict({"to_k": torch.nn.Linear(64, 64)})
    model.forward = lambda x: model["to_k"](x)
    recipe = dq.Recipe("kv", ("int8/channel", "int8/token"), ("int8/channel", "int8a/tensor"))
    with torch.no_grad():
        before = model(text)
        dq.quantize(model, recipe, progress=False)
        rest = before[:, 1:], model(text)[:, 1:]
    assert 10 * torch.log10(rest[0].square().sum() / (rest[1] - rest[0]).square().sum()) > 35


def _unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def _calls(start: torch.Tensor | None, count: int = 4) -> list[dict]:
    """Inputs of a U-Net: texts of 6 tokens, all beginning with `start`, the first of two with zeros instead."""
    dice, made = torch.Generator().manual_seed(1), []
    for index in range(count):
        text = torch.randn(2, 6, 32, generator=dice)
        if start is not None:
            text[1, 0], text[0] = start, 0
        x = torch.randn(2, 4, 8, 8, generator=dice)
        made.append({"sample": x, "timestep": torch.tensor(900 - 200 * index), "encoder_hidden_states": text})
    return made


def _run(calls):
    def loop(model):
        with torch.no_grad():
            return [model(**call).sample for call in calls]

    return loop


def test_mixdq_stores_the_output_of_the_start_token_where_text_is_seen(tmp_path):
    start = 20 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    calls, model, exact = _calls(start), _unet(), _unet()
    dq.quantize(model, "mixdq-w4a8", calibration=_run(calls), progress=False)
    started = {name for name, layer in packed_layers(model).items() if layer.plan.start}
    assert started == {name for name in packed_layers(model) if ".attn2.to_k" in name or ".attn2.to_v" in name}
    name = sorted(started)[0]
    text = calls[0]["encoder_hidden_states"]
    with torch.no_grad():
        y, truth = model.get_submodule(name)(text), exact.get_submodule(name)(text)
        other = model.get_submodule(name)(1.1 * text)
    assert torch.allclose(y[1, 0], truth[1, 0], atol=1e-5)
    assert not torch.allclose(y[1, 1:], truth[1, 1:], atol=1e-3), "all other tokens are rounded"
    assert not torch.allclose(other[1, 0], truth[1, 0], atol=1e-3), "so is another start token"
    assert torch.allclose(y[0], truth[0], atol=1e-6), "zeros are no start token, and exact by themselves"
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(_run(calls)(model), _run(calls)(again), strict=True))


def test_a_first_token_that_changes_with_the_prompt_is_not_stored():
    for calls in (_calls(None), [_calls(None, 1)[0]] * 3):
        model = _unet()
        dq.quantize(model, "mixdq-w4a8", calibration=_run(calls), progress=False)
        assert not any(layer.plan.start for layer in packed_layers(model).values())


def test_a_fused_adapter_reaches_the_start_token_and_leaves_with_it():
    peft = pytest.importorskip("peft")
    start = 20 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    calls, model = _calls(start), _unet()
    dq.quantize(model, "mixdq-w4a8", calibration=_run(calls), progress=False)
    before = _run(calls)(model)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False))
    adapted = _run(calls)(model)
    model.fuse_lora()
    fused = _run(calls)(model)
    # a sum in another order may move an input over the middle between two codes
    assert all((a - b).norm() < 0.01 * a.norm() for a, b in zip(adapted, fused, strict=True))
    assert not torch.allclose(adapted[0], before[0], atol=2e-3)
    model.unfuse_lora()
    model.disable_adapters()
    assert all(torch.equal(a, b) for a, b in zip(_run(calls)(model), before, strict=True))


@pytest.mark.parametrize("name, bits", [("mixdq-w4a8", 4.25), ("viditq-mp-w4a8", 5.5)])
def test_methods_of_mixed_precision_keep_their_mean_bits(name, bits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(6)))
    with torch.no_grad():
        for index, layer in enumerate(model):
            layer.weight[:, :4] *= 1 + 4 * index
    x = torch.randn(32, 128)
    report = dq.quantize(model, name, calibration=lambda m: m(x), progress=False)
    packed = packed_layers(model).values()
    mean = 8 * sum(choices.weight_bytes(layer.plan, torch.float32) for layer in packed) / (128 * 128 * len(packed))
    assert bits - 1 < mean <= bits
    assert {row.weight for row in report.layers} <= {
        str(TensorPlan.parse(c)) for c in cookbook.get(name).options["choices"]
    }


@pytest.mark.slow
def test_svdquant_is_fitted_to_the_formats_a_budget_chose():
    pipe = tiny.load("tiny-pixart")
    free = size(pipe.transformer)
    budget = dq.Budget(bytes=int(0.21 * free))
    seen = calibration(steps=2, samples=4)
    report = dq.quantize(pipe, "svdquant-int4", budget=budget, calibration=seen, progress=False)
    assert report.bytes_after <= budget.bytes
    assert report.bytes_after >= 0.95 * budget.bytes
    assert len({(row.weight, row.act) for row in report.layers}) > 3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bytes": 1000}, "the least possible is"),
        ({"bits": 1.0}, "bits is 1"),
        ({"ms_per_step": 1e-3}, "ms_per_step"),
        ({"bytes": 3_000_000, "ms_per_step": 1e-3}, "ms_per_step"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_nearest_figure(explored, change, said):
    with pytest.raises(dq.DQError, match=said) as refusal:
        explored[0].choose(dq.Budget(**change))
    assert "least possible" in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bytes": 0},
        {"bits": True},
        {"bits": 4, "scope": "all"},
        {"bits": 4, "metric": "x"},
        {"bits": 4, "runs": 0},
        {"bits": 4, "checks": 1.5},
    ],
)
def test_a_budget_that_means_nothing_is_refused_at_once(change):
    with pytest.raises(dq.DQError, match="budget"):
        dq.Budget(**change)


def test_a_budget_goes_with_a_recipe_not_with_a_plan_or_a_number():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(dq.DQError, match=r"expected dq.Budget"):
        dq.quantize(model, "int8-weight", budget=4, progress=False)


def test_a_text_mask_in_floating_point_that_the_model_counts_asks_for_no_gradient():
    pipe = parts.hunyuan_video()
    call = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}
    call |= {"prompt_embeds": torch.randn(1, 9, parts.WIDTH), "pooled_prompt_embeds": torch.randn(1, parts.POOLED)}
    call |= {"prompt_attention_mask": torch.tensor([[1] * 6 + [0] * 3])}
    seen = dq.Calibration(prompts=["a cat"], steps=2, samples=2, call_kwargs=call)
    report = dq.quantize(pipe, "int8-weight", budget=dq.Budget(bits=5), calibration=seen, progress=False)
    assert any("sensitivity: trajectory" in note for note in report.notes)


class Counting(nn.Module):
    """A denoiser that counts, compares, indexes and writes in its inputs, as video models do with their masks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x, timestep, mask, ids, flags, scale):
        count = mask.sum(1, dtype=torch.int)
        x[:, 0] *= scale
        for block in self.blocks:
            x = x + block(x) * (mask[..., None] > 0.5) * (count[:, None, None] / mask.shape[1])
        return x.index_select(1, ids) * ~flags


def test_inputs_of_every_kind_may_go_where_no_gradient_goes():
    model = Counting()
    inputs = {"mask": torch.tensor([[1.0, 1.0, 0.0]]), "ids": torch.tensor([2, 0, 1]), "scale": torch.tensor(0.5)}
    inputs |= {"flags": torch.zeros(1, 3, 1, dtype=torch.bool), "timestep": torch.tensor([500])}
    loop = lambda model: [model(torch.randn(1, 3, 32), **inputs) for _ in range(3)]  # noqa: E731
    report = dq.quantize(model, "int8-weight", budget=dq.Budget(bits=5), calibration=loop, progress=False)
    assert len([row for row in report.layers if row.weight]) == 4


class Blocks(nn.Module):
    """Two blocks, the second one loud."""

    def __init__(self, count: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 512), nn.Linear(512, 128)) for _ in range(count))
        nn.init.normal_(self.blocks[1][1].weight, std=0.5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize(("recipe", "limits"), [("svdquant-w4a8", ("bits",)), ("svdquant-int4", ("bits", "act_bits"))])
def test_own_bits_are_those_that_the_recipe_gives_in_one_width(recipe, limits):
    loop = lambda model: [model(torch.randn(1, 64, 128)) for _ in range(3)]  # noqa: E731
    one, mixed = Blocks(), Blocks()
    whole = dq.quantize(one, recipe, calibration=loop, progress=False)
    assert any(layer.plan.rank for layer in packed_layers(one).values()), "branches count"
    budget = dq.Budget(**dict.fromkeys(limits, "own"))
    report = dq.quantize(mixed, recipe, calibration=loop, budget=budget, progress=False)
    assert 0.85 * whole.bytes_after < report.bytes_after <= whole.bytes_after
    widths = {layer.plan.weight.spec.bits for layer in packed_layers(mixed).values()}
    assert len(widths) > 1, "the loud layer has more"
    if "act_bits" in limits:
        assert {layer.plan.act.spec.bits for layer in packed_layers(mixed).values()} == {4}


@pytest.mark.parametrize("count", [28, 33])
def test_a_limit_that_is_just_met_is_met_whatever_way_costs_are_summed(count):
    menus = {str(i): (None, *_menu((3 + i, 64))[1:]) for i in range(count)}
    menus = {
        name: tuple(replace(c, act=TensorPlan.parse("int4/token")) for c in menu[1:]) for name, menu in menus.items()
    }
    plan = Plan({name: menu[0] for name, menu in menus.items()})
    errors = {name: np.ones((len(menu), BUCKETS + 1)) for name, menu in menus.items()}
    counts = {name: 3 * (i + 1) ** 3 + 1 for i, name in enumerate(menus)}
    rows = search.measured(plan, menus, errors, {}, torch.float32, 0, counts)
    found = search.Search("made", "trajectory", {"": search.Part(rows)}, {"denoiser": 0})
    chosen = found.choose(dq.Budget(act_bits=4))
    assert found.act_bits_of(chosen) == pytest.approx(4)


def test_own_bits_need_a_recipe(explored):
    for budget in (dq.Budget(bits="own"), dq.Budget(act_bits="own")):
        with pytest.raises(DQError, match="'own'"):
            explored[0].choose(budget)
    with pytest.raises(DQError, match="bytes is 'own'"):
        dq.Budget(bytes="own")


def test_a_run_that_cannot_be_differentiated_is_one_line_with_what_can_be_done(monkeypatch):
    pipe = tiny.load("tiny-pixart")
    real = pipe.scheduler.step
    monkeypatch.setattr(type(pipe.scheduler), "step", lambda self, noise, *args, **kwargs: noise.numpy() and real)
    wish = dq.Budget(bits=5)
    with pytest.raises(DQError, match=r"cannot be differentiated: .*metric='prediction'") as error:
        seen = calibration(prompts=["a red circle"])
        monkeypatch.setattr("dq.stages.capturing.capture", lambda *args, **kwargs: {})
        dq.quantize(pipe, "int8-weight", budget=wish, calibration=seen, progress=False)
    assert "\n" not in str(error.value)


def test_weights_that_lie_on_a_grid_already_are_measured_all_the_same():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))])})
    model.forward = lambda x: model["blocks"][0](x)
    dq.quantize(model, "int4-weight", progress=False)
    dq.dequantize(model)
    loop = lambda model: model(torch.ones(4, 8, 64))  # noqa: E731
    dq.quantize(model, "int8-weight", budget=dq.Budget(bits=6), calibration=loop, progress=False)
    assert len(packed_layers(model)) == 2


def test_a_bare_model_is_measured_by_its_own_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight *= 1e-3  # so that the first layer's error hardly matters at the end ...
        model[2].bias += 1.0
    x = torch.randn(32, 64)
    report = dq.quantize(
        model, "int8-weight", budget=dq.Budget(bits=5), calibration=lambda m: m(x), keep=[], progress=False
    )
    assert report.bytes_after <= report.bytes_before * 5 / 32 + 4 * 128
    assert any("SQNR" in note for note in report.notes)


def test_without_data_weights_alone_decide():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    report = dq.quantize(model, "int8-weight", budget=dq.Budget(bits=4.5), progress=False)
    assert {row.weight for row in report.layers if row.weight} == {"int4/group:64"}


def test_layers_of_a_kind_may_share_a_choice(explored):
    found, _ = explored
    chosen = found.choose(dq.Budget(bits=4.5, tie="kind"))["transformer"]
    kinds = {}
    for name, choice in chosen.items():
        kinds.setdefault(name.replace("0", "#").translate(str.maketrans("12345", "#####")), set()).add(choice)
    assert all(len(found) == 1 for name, found in kinds.items() if name.startswith("transformer_blocks"))


def test_a_search_is_a_json_that_solves_the_same_again(explored):
    found, _ = explored
    again = search.Search.from_dict(json.loads(json.dumps(found.to_dict())))
    budget = dq.Budget(bits=4.2)
    assert again.choose(budget) == found.choose(budget)
    assert again.sqnr_db(found.choose(budget)) == found.sqnr_db(found.choose(budget))


def test_searched_plans_have_times(explored):
    found, _ = explored
    pipe = tiny.load("tiny-pixart")
    plan = api._plan_all({"": (pipe.transformer, cookbook.get("int8-weight"))}, ())[""]
    assert found.ms_of(charts.uniform(found)["int8/channel"]) > 0
    assert set(found.parts["transformer"].layers) == set(plan.layers)


def test_peak_counts_what_a_call_holds():
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024, bias=False), torch.nn.Linear(1024, 256, bias=False))
    x = torch.randn(1000, 256)
    with cost._Held() as held, torch.inference_mode():
        model(x)
    assert held.most == 4 * 1000 * (1024 + 256)


def test_plan_command_writes_plan_curve_and_page(folder, tmp_path):
    out, curve, page = tmp_path / "plan.json", tmp_path / "curve.png", tmp_path / "page.html"
    given = [
        "--set",
        "height=64",
        "--set",
        "width=64",
        "--set",
        "max_sequence_length=40",
        "--set",
        "clean_caption=false",
    ]
    given += [
        "--steps",
        "2",
        "--samples",
        "4",
        "--dtype",
        "fp32",
        "--budget-bits",
        "4.5",
        "--work",
        str(tmp_path / "work"),
    ]
    result = CliRunner().invoke(
        app,
        ["plan", "tiny-pixart", *given, "--out", str(out), "--curve", str(curve), "--page", str(page)],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert "all int4/group:64" in result.output
    assert curve.stat().st_size > 10_000
    assert page.read_text().count("<tr>") > 60 and "http" not in page.read_text()
    edited = json.loads(out.read_text())
    name = "transformer_blocks.0.attn1.to_q"
    edited["layers"][name]["weight"] = "int8/channel"
    out.write_text(json.dumps(edited))
    pipe = tiny.load("tiny-pixart")
    dq.quantize(pipe, out, progress=False)
    assert packed_layers(pipe.transformer)[name].plan.weight.format == "int8"


def test_a_plan_of_another_architecture_is_refused_naming_the_first_layer(explored, tmp_path):
    found, plans = explored
    path = tmp_path / "plan.json"
    search.plans(found, plans, found.choose(dq.Budget(bits=4.5)), "test")["transformer"].save(path)
    with pytest.raises(dq.DQError, match=r"transformer_blocks\.0|adaln_single"):
        dq.quantize(tiny.load("tiny-sd"), path, progress=False)


@pytest.mark.parametrize("way", ["greedy", "random"])
def test_what_mixed_precision_is_compared_with_rounds_every_layer_and_fills_the_budget(explored, way):
    found, _ = explored
    budget = dq.Budget(bytes=found.bytes_of(charts.uniform(found)["int4/group:64"]))
    chosen = found.greedy(budget) if way == "greedy" else found.random(budget, 3)
    kept = [name for part, name, row in found.rows() if row.choices[chosen[part][name]] is None]
    assert kept == []
    assert 0.97 * budget.bytes <= found.bytes_of(chosen) <= budget.bytes


def test_a_layer_that_is_never_called_keeps_what_the_recipe_plans():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("used", "idle")})
    model.forward = lambda x: model["used"](x)
    x = torch.randn(8, 64)
    dq.quantize(model, "int8-weight", budget=dq.Budget(bits=6.6), calibration=lambda m: m(x), progress=False)
    assert packed_layers(model)["idle"].plan.weight.format == "int8"
