"""PTQ4DM, Q-Diffusion, TFMQ-DM and TDQ: the properties by which one knows that they work, on the embedded models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from dq import cookbook, families, layers, methods, planning
from dq.fit import reconstruct, tables, walk
from dq.fit.drafts import draft
from dq.layers.clock import Clock
from dq.methods import ptq4dm, qdiffusion, tdq, tfmq
from dq.plan import LayerPlan, TensorPlan
from dq.trace import calibration, capture
from dq.trace.walk import Trace
from pipelines import tiny

UNITS = {"tiny-sd": ("up_blocks.2.resnets.0",), "tiny-pixart": ("transformer_blocks.5",)}
QUICK = {"steps": 60}


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny.load(name) for name in UNITS}


@pytest.fixture(scope="module")
def records(pipes, tmp_path_factory):
    """Folders with 8 recorded calls of each model: 2 runs of 4 steps."""
    folders = {}
    for name, pipe in pipes.items():
        folders[name] = tmp_path_factory.mktemp(name)
        call = {key: value for key, value in tiny.CALL[name].items() if key != "num_inference_steps"}
        prompts = [caption for caption, _ in tiny.prompts(2)]
        wanted = calibration.Calibration(prompts=prompts, steps=4, samples=8, policy="all", call_kwargs=call)
        capture.capture(pipe, {"model": denoiser(pipe)}, wanted, folders[name], progress=False)
    return folders


@pytest.fixture(scope="module")
def fitted(pipes, records):
    """fitted(model, recipe, **options) -> (unit, seen with its calls, drafts) of the model's chosen unit; cached."""
    made, cache = {}, {}

    def fit(name: str, recipe, **options):
        key = (name, getattr(recipe, "name", recipe), str(options))
        if key not in cache:
            cache[key] = _fit(name, recipe, options)
        return cache[key]

    def _fit(name, recipe, options):
        model = denoiser(pipes[name])
        wanted = cookbook.get(recipe)
        wanted = replace(wanted, options={**wanted.options, **options})
        plan = planning.make_plan(model, wanted)
        chosen = tuple(f"{unit}." for unit in UNITS[name])
        plan.layers = {layer: row for layer, row in plan.layers.items() if layer.startswith(chosen)}
        method = methods.files()[wanted.method]
        if hasattr(method, "prepare"):
            plan = method.prepare(model, plan, families.of(model), wanted.options)
        trace = Trace(model, plan, families.of(model), records[name] / "model", identity=str(len(made)))
        made[len(made)] = trace
        for unit in trace.units:
            seen = trace.observe(unit, method.NEEDS)
            if unit.layers:
                calls = {stream: list(seen.calls(stream)) for stream in ("full", "hat")}
                seen = replace(seen, calls=calls.__getitem__)
                return unit, seen, method.fit(unit, seen, wanted.options)
            trace.skip(unit)
        raise AssertionError(f"no unit of {name} has planned layers")

    return fit


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def unit_error(unit, seen, drafts) -> float:
    """Error of the unit's output over all recorded calls, in units of its power."""
    module, clock = reconstruct.assembled(unit, drafts)
    return reconstruct.measure(module, clock, seen.calls("full"))


def nearest(unit) -> dict:
    """Plain rounding with dynamic activations."""
    return {name: walk._nearest(unit, name) for name in unit.layers}


ALL = (*ptq4dm.RECIPES, *tdq.RECIPES, *tfmq.RECIPES, *qdiffusion.RECIPES)


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", UNITS)
def test_drafts_are_whole_and_ship_as_they_are(name, recipe, fitted):
    unit, seen, made = fitted(name, recipe.name, **(QUICK if "w4" in recipe.name and recipe.method != "tdq" else {}))
    assert set(made) <= set(unit.layers)
    for layer, found in made.items():
        found.plan.check(layer)
        assert LayerPlan.from_dict(layer, found.plan.to_dict()) == found.plan, "the plan survives its JSON"
        table = found.plan.act is not None and found.plan.act.scale == "table"
        assert found.plan.steps == (seen.buckets if table else 1) and seen.buckets == 4
        packed, x = found.pack(torch.float32), seen.layers[layer].hat[:2]
        found.clock = packed.clock = Clock(seen.edges)
        found.clock.index.fill_(1)
        assert torch.allclose(packed(x), found(x), atol=1e-3 * float(found(x).abs().max()))
        if found.act_scale is not None:
            assert packed.act_scale.shape == (found.plan.steps, len(found.plan.parts))
            assert (packed.act_scale > 0).all()
    assert unit_error(unit, seen, made) < 0.05


@pytest.mark.parametrize("recipe", ["ptq4dm-w8a8", "tdq-w8a8", "tfmq-w8a8"])
@pytest.mark.parametrize("name", UNITS)
def test_static_ranges_beat_plain_minimum_and_maximum(name, recipe, fitted):  # PTQ4DM P3, TDQ P3
    unit, seen, made = fitted(name, recipe)
    plain = methods.files()["ptq4dm"].fit(unit_with(unit, "static"), seen, {"plain": True})
    best, worst = unit_error(unit, seen, made), unit_error(unit, seen, plain)
    dynamic = unit_error(unit, seen, nearest(unit))
    assert best < 0.7 * worst
    assert best < 1.6 * dynamic, "two calls a step are few: within 2 dB of scales measured at run time"


def unit_with(unit, scale: str):
    changed = {}
    for name, row in unit.layers.items():
        changed[name] = replace(row, act=replace(row.act, scale=scale)) if row.act else row
    return replace(unit, layers=changed)


@pytest.mark.parametrize("name", UNITS)
def test_squared_error_chooses_better_ranges_than_absolute_error(name, fitted):  # PTQ4DM P4
    unit, seen, _ = fitted(name, "ptq4dm-w8a8")
    plain = {"smooth": False, "shift": False, "rotate": False, "margins": (1.0,), "round": "nearest"}
    errors = [unit_error(unit, seen, ptq4dm.fit(unit, seen, {**plain, "power": power})) for power in (2.0, 1.0)]
    assert errors[0] <= errors[1]


def test_splits_keep_the_quiet_half():  # Q-Diffusion P1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 64, generator=generator) * torch.tensor([0.2] * 32 + [20.0] * 32)
    for act, before, after in (("int8/tensor/static", 2, 35), ("int4/tensor/static", 0.5, 14)):
        plan = LayerPlan("linear", (8, 64), TensorPlan.parse("int8/channel"), TensorPlan.parse(act))
        sqnr = []
        for splits in ((), (32,)):
            cut = replace(plan, splits=splits)
            made = draft(torch.nn.Linear(64, 8), cut)
            values = tables.boil_down(x, torch.zeros(len(x), dtype=torch.long), cut, 1)
            made.act_scale.data.copy_(tables.finite_set(values, cut.act))
            rounded = made._round(x, made.act_scale[0])
            sqnr.append([decibels(x[:, half], rounded[:, half]) for half in (slice(0, 32), slice(32, 64))])
        (quiet, loud), (quiet_split, loud_split) = sqnr
        assert quiet < before and quiet_split > after and abs(loud - loud_split) < 0.5


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


def test_shortcuts_are_cut_unless_told_otherwise(fitted):  # Q-Diffusion P2
    name = "up_blocks.2.resnets.0.conv_shortcut"
    unit, _, made = fitted("tiny-sd", "qdiffusion-w4a8", **QUICK)
    assert unit.layers[name].splits == (128,) and made[name].plan.splits == (128,) and len(made[name].scales) == 2
    assert not fitted("tiny-sd", "qdiffusion-w4a8", splits=False, steps=0)[0].layers[name].splits


@pytest.mark.parametrize("name", UNITS)
def test_reconstruction_beats_plain_rounding(name, fitted):  # Q-Diffusion P3
    unit, seen, made = fitted(name, "qdiffusion-w4a8", **QUICK)
    assert unit_error(unit, seen, made) <= 0.6 * unit_error(unit, seen, nearest(unit))


def test_learning_improves_on_gptq_or_is_dropped(fitted):
    unit, seen, made = fitted("tiny-pixart", "qdiffusion-w4a8", **QUICK)
    _, _, start = fitted("tiny-pixart", "qdiffusion-w4a8", steps=0)
    assert unit_error(unit, seen, made) <= 1.02 * unit_error(unit, seen, start)


def temporal_outputs(unit, seen, made) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, out) of the unit's temporal layer, full precision and quantized, a row per timestep seen."""
    name = next(name for name, row in unit.layers.items() if tfmq.temporal(row))
    layer = seen.layers[name]
    first = torch.stack([(layer.bucket == i).nonzero()[0, 0] for i in range(seen.buckets)])
    return unit.layer(name)(layer.x[first]), made[name](layer.x[first])


@torch.no_grad()
def test_temporal_features_stay_apart(fitted):  # TFMQ P1
    full, quantized = temporal_outputs(*fitted("tiny-sd", "tfmq-w4a8", **QUICK))
    _, nearest_grid = temporal_outputs(*fitted("tiny-sd", "tfmq-w4a8", start="nearest", steps=0))
    alike = torch.nn.functional.cosine_similarity
    assert alike(quantized, full).mean() > alike(nearest_grid, full).mean()
    assert (alike(quantized[:, None], full[None], dim=-1).argmax(1) == torch.arange(len(full))).all()


def test_temporal_layers_do_not_look_at_the_picture(pipes):  # TFMQ P2
    model, seen = pipes["tiny-sd"].unet, []
    names = [name for name in dict(model.named_modules()) if re.search(r"time_emb_proj$", name)]
    hooks = [model.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2])) for name in names]
    for seed in (0, 1):
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model(x, torch.tensor([500]), torch.zeros(1, 5, 128))
    for hook in hooks:
        hook.remove()
    half = len(seen) // 2
    assert half == len(names) and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_tables_cost_next_to_nothing(fitted):  # TFMQ P4, TDQ P2
    _, _, made = fitted("tiny-sd", "tfmq-w8a8")
    packed = [found.pack(torch.float32) for found in made.values()]
    tables_bytes = sum(4 * layer.act_scale.numel() for layer in packed if layer.act_scale is not None)
    assert 0 < tables_bytes < 0.01 * sum(layer.weight.numel() for layer in packed)
    assert all(type(layer) in layers.PACKED.values() for layer in packed), "no network is left at run time"
