"""`dq.quantize` with recipes of a method, from prompts to saved models: same bytes, kills, processes, wrong use."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import random
import re
import socket
import time
import zlib
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from torch import nn

import dq
import pipelines.tiny as tiny
from dq import cookbook, methods, planning
from dq.errors import DQError
from dq.formats.base import FormatError
from dq.host import mark
from dq.layers import packed_layers
from dq.methods import gptq
from dq.model import check_fit
from dq.trace import records
from dq.trace.calibration import MOST_SEED, Calibration
from dq.trace.seen import Needs
from tests import zoo
from tests.models import same_state

CALL = {key: value for key, value in tiny.CALL["tiny-pixart"].items() if key != "num_inference_steps"}
PROMPTS = ["a red circle", "a blue square left of a green star"]
FEW = r"transformer_blocks\.(?!0\.attn1\.to_out|3\.ff\.net\.2)"  # kept: a few layers tell as much as all, sooner


class Denoiser(nn.Module):
    """A denoiser of no library: hidden_states (batch, tokens, 64) -> the same."""

    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(blocks)
        )

    def forward(self, hidden_states, timestep, text=None):
        x = hidden_states + (timestep / 1000).reshape(-1, 1, 1) + text
        for block in self.blocks:
            x = x + block(x)
        return x


class Pipeline(DiffusionPipeline):
    """A denoiser, a scheduler and a part that is no denoiser; its text is noise that the prompt seeds."""

    def __init__(self, transformer, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="latent"):
        words = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        text, x = torch.randn(1, 1, 64, generator=words), torch.randn(1, 8, 64, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, timestep, text=text), timestep, x).prev_sample
        return x


def pipeline():
    return Pipeline(Denoiser().eval(), nn.Linear(64, 64), DDIMScheduler())


def settings(**changes):
    return Calibration(**{"prompts": PROMPTS, "steps": 4, "samples": 8, "policy": "all"} | changes)


def made(recipe, **changes):
    """A small pipeline quantized from nothing; -> it and its report."""
    pipe = pipeline()
    return pipe, dq.quantize(pipe, recipe, calibration=settings(**changes), progress=False)


def state_of(target):
    """Everything a failed call could have changed."""
    parts = {"": target} if isinstance(target, nn.Module) else target.components
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    modules = [
        (name, id(m), type(m), m.training, len(vars(m)))
        for part in models.values()
        for name, m in part.named_modules()
    ]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for part in models.values() for m in part.modules()]
    tensors = {f"{part}.{name}": value.clone() for part in models for name, value in models[part].state_dict().items()}
    scheduler = getattr(target, "scheduler", None)
    return modules, hooks, str(vars(scheduler)) if scheduler else "", torch.get_rng_state().tolist(), tensors


def unchanged(target, before):
    after = state_of(target)
    return after[:4] == before[:4] and all(torch.equal(value, after[4][name]) for name, value in before[4].items())


def refused(target, recipe, message, **options):
    """The one line of a DQError that leaves the target as it was."""
    torch.manual_seed(5)
    before = state_of(target)
    with pytest.raises(DQError, match=message) as error:
        dq.quantize(target, recipe, progress=False, **options)
    assert "\n" not in str(error.value)
    assert unchanged(target, before)
    return str(error.value)


def decibels(full, value):
    return float(10 * torch.log10(full.square().sum() / (full - value).square().sum()))


# --- a trained pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    return tiny.load("tiny-pixart")


@pytest.fixture(scope="module", params=["svdquant-int4", "tfmq-w8a8"])
def trained(request):
    """tiny-pixart with a few layers fitted; -> pipeline, report, recipe name."""
    pipe = tiny.load("tiny-pixart")
    torch.manual_seed(5)
    random_state, scheduler = torch.get_rng_state(), copy.deepcopy(vars(pipe.scheduler))
    report = dq.quantize(pipe, request.param, calibration=settings(call_kwargs=CALL), keep=FEW, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state) and str(vars(pipe.scheduler)) == str(scheduler)
    return pipe, report, request.param


def latents(pipe, steps=4, **changes):
    call = CALL | {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(3), **changes}
    return pipe("two green rings", output_type="latent", **call).images


def test_the_report_says_what_each_layer_became_and_at_which_cost(trained):
    pipe, report, recipe = trained
    rows = {row.name: row for row in report.layers}
    layer = rows["transformer.transformer_blocks.3.ff.net.2"]
    assert layer.kernel and layer.error_db > 15 and layer.bytes > 0
    if recipe == "svdquant-int4":
        assert layer.act.startswith("int4") and layer.rank > 0 and re.match(r"best of \d+: ", layer.reason)
    else:
        assert layer.act.startswith("int8/tensor/table")
        (count,) = [note for note in report.notes if "have a table of scales" in note]
        tables = [row for row in report.layers if row.act and row.act.startswith("int8/tensor/table")]
        assert count.startswith(f"{len(tables)} of {len(tables)} layers")
        assert re.search(r"in [1-9]\d* the largest", count)
        assert any("4 step buckets, cut at timestep = " in note and "nearest bucket" in note for note in report.notes)
    tried = [re.search(r"([\d.]+) candidates tried a layer; peak memory ([\d.]+) GiB", note) for note in report.notes]
    (tried,) = filter(None, tried)
    assert float(tried[1]) > 1 and float(tried[2]) > 0
    kept = rows["transformer.transformer_blocks.1.ff.net.2"]
    assert (
        kept.weight is None
        and "pattern" in kept.reason
        and type(pipe.transformer.transformer_blocks[1].ff.net[2]) is nn.Linear
    )


def test_another_number_of_steps_another_scheduler_and_no_guidance_work(trained, full):
    pipe, _, recipe = trained
    uses = [{"steps": 4}, {"steps": 7}, {"steps": 1}, {"steps": 3, "guidance_scale": 1.0}]
    found = [decibels(latents(full, **use), latents(pipe, **use)) for use in uses]
    pair = [PixArtSigmaPipeline(**each.components) for each in (full, pipe)]
    for each in pair:
        each.set_progress_bar_config(disable=True)
        each.scheduler = DPMSolverMultistepScheduler.from_config(full.scheduler.config)
    found.append(decibels(*(latents(each, steps=5) for each in pair)))
    assert min(found) > (25 if recipe == "tfmq-w8a8" else 10), found


def test_timesteps_outside_the_calibrated_ones_take_the_nearest_bucket(trained, full):
    pipe, _, recipe = trained
    if recipe != "tfmq-w8a8":
        assert not mark.plan_of(pipe.transformer).edges and not any(
            "bucket" in note for note in dq.explain(pipe).notes
        )
        return
    note = next(note for note in dq.explain(pipe).notes if "bucket" in note)
    edges = mark.plan_of(pipe.transformer).edges
    assert len(edges) == 3 and f"= {edges[0]:g} ... {edges[-1]:g}" in note and note.startswith("transformer: ")
    layer = next(layer for layer in packed_layers(pipe.transformer).values() if layer.plan.steps > 1)
    assert layer.act_scale.shape == (4, 1) and len(layer.act_scale.unique()) > 1
    call = {"encoder_hidden_states": torch.zeros(1, 4, pipe.transformer.config.caption_channels)}
    for timestep, bucket in ((0, 0), (edges[0], 1), (5000, 3)):
        pipe.transformer(
            torch.zeros(1, pipe.transformer.config.in_channels, 8, 8), timestep=torch.tensor([timestep]), **call
        )
        assert int(layer.clock.index) == bucket


def test_a_saved_pipeline_reloads_with_the_very_same_output(trained, tmp_path):
    pipe, _, _ = trained
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert same_state(pipe.transformer, again.transformer)
    assert mark.plan_of(again.transformer).to_dict() == mark.plan_of(pipe.transformer).to_dict()
    assert dq.explain(again).notes == dq.explain(pipe).notes
    assert torch.equal(latents(pipe, 3), latents(again, 3))


# --- determinism ----------------------------------------------------------------------------------------------------

QUICK = ("svdquant-int4", "tfmq-w8a8")


@pytest.fixture(scope="module")
def whole():
    """What an undisturbed calibration of the small pipeline gives, by recipe: state dict and plan."""
    pipes = {recipe: made(recipe)[0] for recipe in QUICK}
    return {recipe: found(pipe) for recipe, pipe in pipes.items()}


def found(pipe):
    return {**pipe.transformer.state_dict()}, mark.plan_of(pipe.transformer).to_dict()


def alike(left, right):
    tensors, others = left[0], right[0]
    return (
        left[1] == right[1]
        and tensors.keys() == others.keys()
        and all(torch.equal(v, others[k]) for k, v in tensors.items())
    )


@pytest.mark.parametrize("recipe", QUICK)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_records(recipe, whole, tmp_path):
    assert len(whole[recipe][1]["layers"]) == 6
    torch.manual_seed(99)  # what else was drawn before has no say
    pipe, report = made(recipe, folder=tmp_path)
    assert alike(found(pipe), whole[recipe]) and (tmp_path / "transformer/units").is_dir()
    assert "note: " in str(report)
    assert not alike(found(made(recipe, seed=1)[0]), whole[recipe])


def test_a_finished_folder_is_not_calibrated_again(tmp_path, whole, monkeypatch):
    made("svdquant-int4", folder=tmp_path)
    pipe = pipeline()
    monkeypatch.setattr(Pipeline, "__call__", lambda self, prompt, num_inference_steps=4, generator=None: 1 / 0)
    monkeypatch.setattr(methods.files()["svdquant"], "fit", None)
    report = dq.quantize(pipe, "svdquant-int4", calibration=settings(folder=tmp_path), progress=False)
    assert alike(found(pipe), whole["svdquant-int4"]) and any(
        "all units were fitted before" in n for n in report.notes
    )


def test_another_recipe_takes_the_same_records_and_fits_anew(tmp_path, whole):
    for recipe in QUICK:
        assert alike(found(made(recipe, folder=tmp_path)[0]), whole[recipe])


def test_the_folder_of_another_calibration_is_refused_in_one_line(tmp_path):
    made("svdquant-int4", folder=tmp_path)
    where = {"seed": 1}, {"prompts": PROMPTS[:1]}, {"policy": "uniform"}, {"samples": 4}
    for changes in where:
        refused(
            pipeline(),
            "svdquant-int4",
            f"another calibration: {next(iter(changes))} differs",
            calibration=settings(folder=tmp_path, **changes),
        )
    other = pipeline()
    other.transformer.blocks[2][2].bias.data[0] += 1
    refused(other, "svdquant-int4", r"models \(transformer\) differs", calibration=settings(folder=tmp_path))


def test_a_folder_is_taken_up_by_another_process_whatever_the_order_of_diffusers_notes(tmp_path, whole):
    made("svdquant-int4", folder=tmp_path)
    pipe = pipeline()
    notes = pipe.scheduler.config["_use_default_values"]  # a set made into a list: each process has its own order
    pipe.scheduler.register_to_config(_use_default_values=notes[::-1])
    dq.quantize(pipe, "svdquant-int4", calibration=settings(folder=tmp_path), progress=False)
    assert pipe.scheduler.config["_use_default_values"] == notes[::-1] != notes
    assert alike(found(pipe), whole["svdquant-int4"])


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_unit_is_never_taken_for_a_whole_one(damage, tmp_path):
    made("svdquant-int4", folder=tmp_path)
    file = tmp_path / "transformer/units/002.entry/tree.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-9], "altered": content[:-9] + bytes(9), "empty": b""}[damage])
    said = refused(pipeline(), "svdquant-int4", "damaged", calibration=settings(folder=tmp_path))
    assert "units/002" in said and "delete" in said


# --- kills and several processes ------------------------------------------------------------------------------------


def work(recipe, folder, out, env):
    """A calibration in a process of its own; its result goes to `out`, whole or not at all."""
    os.environ.update(env)
    PartialState._reset_state()
    pipe, _ = made(recipe, folder=folder)
    torch.save(found(pipe), f"{out}.half")
    os.replace(f"{out}.half", out)  # noqa: PTH105


def start(recipe, folder, out, **env):
    process = multiprocessing.get_context("fork").Process(target=work, args=(recipe, folder, out, env))
    process.start()
    return process


def end(process):
    process.join(120)
    return process.exitcode


def entries(folder):
    names = [name for _, inner, files in os.walk(folder) for name in (*inner, *files)]  # folders may vanish meanwhile
    return sum(name.endswith((".entry", ".json")) for name in names)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", QUICK)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(recipe, kills, whole, tmp_path):
    draw, codes, out = random.Random(kills), [], tmp_path / "out"
    for _ in range(kills):
        process = start(recipe, tmp_path / "work", out)
        more = entries(tmp_path / "work") + draw.randrange(1, 12 if kills < 5 else 6)
        while process.is_alive() and entries(tmp_path / "work") < more:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        codes.append(end(process))
    assert codes.count(-9) >= 2 and set(codes) <= {0, -9}
    assert end(start(recipe, tmp_path / "work", out)) == 0
    assert alike(torch.load(out), whole[recipe])


@pytest.mark.parametrize("recipe", QUICK)
def test_two_processes_give_the_plan_and_the_bytes_of_one(recipe, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"out{rank}" for rank in range(2)]
    both = [
        start(recipe, tmp_path / "work", out, **shared, RANK=str(i), LOCAL_RANK=str(i)) for i, out in enumerate(outs)
    ]
    assert [end(process) for process in both] == [0, 0]
    assert all(alike(torch.load(out), whole[recipe]) for out in outs)


# --- bare models with a forward loop --------------------------------------------------------------------------------

VIDEO = (
    "CogVideoXTransformer3DModel",
    "WanTransformer3DModel",
    "LatteTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
)
OTHERS = ("UNet2DConditionModel", "FluxTransformer2DModel", "HunyuanDiT2DModel", "LTX2VideoTransformer3DModel")


def spared(model, recipe, every):
    """Patterns that keep all but each `every`-th layer."""
    names = planning.make_plan(model, cookbook.get(recipe)).layers
    return [f"{re.escape(name)}$" for i, name in enumerate(names) if i % every]


@pytest.mark.parametrize("recipe, every, least", [("svdquant-int4", 4, 0.0), ("viditq-w4a8", 2, -1.5)])
@pytest.mark.parametrize("name", VIDEO + OTHERS)
def test_a_model_run_by_a_function_ends_near_full_precision(name, recipe, every, least):
    model, plain, entry = zoo.build(name), zoo.build(name), zoo.ENTRIES[name]
    reference, keep = zoo.call(model, entry, 7), spared(model, recipe, every)

    def loop(given):
        assert given is model and not torch.is_grad_enabled()
        for seed in range(2):
            zoo.call(given, entry, seed)

    report = dq.quantize(model, recipe, calibration=loop, keep=keep, progress=False)
    dq.quantize(plain, replace(cookbook.get(recipe), method="", options={}), keep=keep, progress=False)
    assert mark.plan_of(model).layers.keys() == mark.plan_of(plain).layers.keys()
    assert not any("never called" in row.reason for row in report.layers)
    output, rounded = (zoo.call(each, entry, 7, dtype=torch.float32) for each in (model, plain))
    assert output.isfinite().all() and decibels(reference, output) > decibels(reference, rounded) + least


def test_tables_of_a_model_without_a_timestep_have_one_row():
    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Denoiser(2).blocks

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    model, x = Timeless(), torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    reference = model(x)
    dq.quantize(model, "tdq-w8a8", calibration=lambda given: [given(x), given(0.5 * x)], progress=False)
    assert {layer.plan.steps for layer in packed_layers(model).values()} == {1} and not mark.plan_of(model).edges
    assert decibels(reference, model(x)) > 25 and not any("bucket" in note for note in dq.explain(model).notes)


# --- wrong use ------------------------------------------------------------------------------------------------------


def never(model):
    return None


def raising(model):
    model(torch.zeros(1, 2, 64), torch.tensor(1.0), torch.zeros(1, 1, 64))
    raise ValueError("out of\npatience")


MINE = replace(cookbook.get("svdquant-int4"), name="mine", method="svdqant")
WRONG = {
    "data-free recipe": ("int8", "recipe 'int8' is data-free; leave calibration=None", settings),
    "no calibration": ("svdquant-int4", r"needs calibration data; pass calibration=dq\.Calibration\(prompts", None),
    "function for a pipeline": ("svdquant-int4", "forward_loop is for a bare model, got a pipeline", lambda: never),
    "not a calibration": ("svdquant-int4", r"calibration is \['a'\], expected dq.Calibration", lambda: ["a"]),
    "unknown method": (MINE, "recipe 'mine': method 'svdqant' is unknown.*Did you mean 'svdquant'", settings),
    "unknown recipe": ("svdquant-in4", "recipe 'svdquant-in4' is unknown.*Did you mean 'svdquant-int4'", settings),
    "call argument": ("svdquant-int4", "takes no 'promt'", lambda: settings(call_kwargs={"promt": "a"})),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_clear_line_and_changes_nothing(case):
    recipe, message, given = WRONG[case]
    refused(pipeline(), recipe, message, calibration=given and given())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"samples": 3}, "samples=3 and steps=4.*raise samples to 4"),
        ({"policy": "stratifeid"}, "policy is 'stratifeid'.*Did you mean 'stratified'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(changes, message):
    with pytest.raises(DQError, match=message) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loop, message",
    [
        (never, "forward_loop never called the model: got no calls, expected one or more"),
        (raising, "forward_loop failed during calibration with ValueError: out of; nothing was changed"),
        (settings(), "needs forward_loop"),
        (None, "needs calibration data; pass calibration=a function that runs the model"),
    ],
)
def test_a_bare_model_needs_a_function_that_runs_it(loop, message):
    refused(Denoiser().eval(), "svdquant-int4", message, calibration=loop)


def test_a_denoiser_that_raises_midway_leaves_the_pipeline_and_what_was_recorded(tmp_path, whole, monkeypatch):
    pipe, count = pipeline(), iter(range(100))
    real = Denoiser.forward

    def failing(self, *args, **kwargs):
        if next(count) == 6:
            raise RuntimeError("out of luck\nand more")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "forward", failing)
        refused(
            pipe,
            "svdquant-int4",
            r"run 1.*RuntimeError: out of luck; nothing was changed$",
            calibration=settings(folder=tmp_path),
        )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["00000.json"]
    dq.quantize(pipe, "svdquant-int4", calibration=settings(folder=tmp_path), progress=False)
    assert alike(found(pipe), whole["svdquant-int4"])


@pytest.mark.parametrize("writes", [3, 20], ids=["capturing", "fitting"])
def test_a_full_disk_is_one_line_and_what_was_finished_stays(writes, tmp_path, whole, monkeypatch):
    pipe, count, real = pipeline(), iter(range(1000)), records.save_file

    def save(*args, **kwargs):
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_file", save)
        refused(pipe, "svdquant-int4", "No space left on device; free space", calibration=settings(folder=tmp_path))
    assert (tmp_path / "transformer/full").is_dir() == (writes == 20)
    assert not any((tmp_path / "transformer/.partial").iterdir())
    dq.quantize(pipe, "svdquant-int4", calibration=settings(folder=tmp_path), progress=False)
    assert alike(found(pipe), whole["svdquant-int4"])


def test_a_method_that_fails_leaves_the_pipeline_as_it_was(monkeypatch):
    pipe, real = pipeline(), methods.files()["svdquant"].fit

    def fit(unit, seen, options):
        if unit.name == "blocks.2":
            raise DQError("no such luck")
        return real(unit, seen, options)

    monkeypatch.setattr(methods.files()["svdquant"], "fit", fit)
    refused(pipe, "svdquant-int4", "no such luck", calibration=settings())


def test_adapters_that_read_weights_are_refused_before_anything_runs(monkeypatch):
    peft = pytest.importorskip("peft")
    pipe = pipeline()
    pipe.transformer = zoo.build("UNet2DConditionModel")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    monkeypatch.setattr("dq.trace.capture.capture", None)
    refused(pipe, "svdquant-int4", "transformer has a DoRA adapter on layer", calibration=settings())


def test_quantized_models_are_refused_before_anything_runs(monkeypatch):
    pipe, _ = made("viditq-w8a8")
    monkeypatch.setattr("dq.trace.capture.capture", None)
    with pytest.raises(DQError, match="transformer is already quantized"):
        dq.quantize(pipe, "svdquant-int4", calibration=settings(), progress=False)


def test_further_components_are_rounded_beside_a_fitted_denoiser(whole):
    pipe = pipeline()
    pipe.vae = nn.Sequential(nn.Linear(64, 64))
    parts = {"vae": "int8-weight"}
    report = dq.quantize(pipe, "svdquant-int4", calibration=settings(), components=parts, progress=False)
    assert alike(found(pipe), whole["svdquant-int4"]) and packed_layers(pipe.vae)
    assert "vae.0" in {row.name for row in report.layers}


@pytest.mark.parametrize("recipe", ["svdquant-int4", "tdq-w8a8"])
def test_components_take_data_free_recipes_only(recipe):
    pipe = pipeline()
    pipe.vae = nn.Sequential(nn.Linear(64, 64))
    refused(pipe, "int8", f"{recipe}.*calibration", components={"vae": recipe})
    refused(pipe, recipe, f"{recipe}.*calibration", components={"vae": recipe}, calibration=settings())


# --- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", dq.recipes())
def test_every_recipe_plans_every_tiny_model(recipe):
    wanted = cookbook.get(recipe)
    for name in (
        "PixArtTransformer2DModel",
        "UNet2DConditionModel",
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
    ):
        model = zoo.build(name)
        plan = planning.make_plan(model, wanted)
        if wanted.needs_calibration:
            plan = methods.prepared(model, plan, wanted)
        check_fit(model, plan)
        assert plan.recipe == recipe and plan.layers
        assert type(plan).from_dict(plan.to_dict()) == plan


def test_every_method_file_has_its_needs_recipes_and_fit():
    assert {"gptq", "svdquant", "viditq", "ptq4dm", "qdiffusion", "tfmq", "tdq"} <= methods.files().keys()
    for name, method in methods.files().items():
        assert isinstance(method.NEEDS, Needs) and callable(method.fit), name
        assert method.RECIPES and all(recipe.method == name for recipe in method.RECIPES)
        assert all(recipe.needs_calibration and recipe.name in dq.recipes() for recipe in method.RECIPES)
        assert re.search(r"arXiv \d{4}\.\d{4,5}|arXiv:? ?\d{4}|\d{4}\.\d{5}|NeurIPS \d{4}", method.__doc__), (
            f"{name} cites its source"
        )


# --- numbers that nothing can be fitted to ------------------------------------------------------------------------

FITTED = [name for name in dq.recipes() if cookbook.get(name).needs_calibration]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))])

    def forward(self, x, timestep=None):
        return self.blocks[0](x)


@pytest.mark.parametrize("recipe", FITTED)
@pytest.mark.parametrize("what", ["NaN", "Inf", "1e30", "weight"])
def test_numbers_that_nothing_can_be_fitted_to_name_their_layer_for_every_recipe(recipe, what):
    model, x, wanted = Block(), torch.randn(4, 8, 64), cookbook.get(recipe)
    wanted = replace(wanted, route=0.0, late=()) if wanted.route else wanted  # a rule takes diffusers' blocks only
    if what == "weight":
        model.blocks[0][2].weight.data[0, 0] = float("nan")
    else:
        x[0, 0, 0] = float(what)
    with pytest.raises(DQError, match=rf"layer 'blocks\.0\.{2 if what == 'weight' else 0}'") as error:
        dq.quantize(model, wanted, calibration=lambda model: model(x), progress=False)
    assert "\n" not in str(error.value) and not packed_layers(model)


@pytest.mark.parametrize(
    "failure", [FormatError("second moments of the input: got 3"), torch.linalg.LinAlgError("no")]
)
def test_what_a_method_cannot_fit_names_its_unit(failure, monkeypatch):
    model = Block()
    monkeypatch.setattr(gptq, "fit", lambda *args: (_ for _ in ()).throw(failure))
    with pytest.raises(DQError, match=r"unit 'blocks\.0' cannot be fitted") as error:
        dq.quantize(model, "gptq-w4a8", calibration=lambda model: model(torch.ones(4, 8, 64)), progress=False)
    assert "\n" not in str(error.value) and not packed_layers(model)


@pytest.mark.parametrize("recipe", ["svdquant-int4", "ptq4dm-w8a8", "mixdq-w5a8"])
def test_the_largest_seed_works(recipe):
    model = Block()
    loop = lambda model: [model(torch.randn(4, 8, 64), torch.tensor([step])) for step in (900.0, 100.0)]  # noqa: E731
    seen = dq.Calibration(forward_loop=loop, seed=MOST_SEED)
    dq.quantize(model, recipe, calibration=seen, progress=False)
    assert len(packed_layers(model)) == 2
