"""Recorded calls are those the pipeline makes, to the bit; policies choose as said; a killed calibration goes on."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from PIL import Image
from torch import nn

import pipelines.tiny as tiny
from dq import DQError, api
from dq.trace import capture as capture_module
from dq.trace import identity, policies, records, running, world
from dq.trace.calibration import POLICIES, Calibration, resolve
from dq.trace.capture import capture
from dq.trace.records import Store
from tests import zoo

STEPS = 4
KWARGS = {name: {k: v for k, v in tiny.CALL[name].items() if k != "num_inference_steps"} for name in tiny.NAMES}
PROMPTS = ["a red circle", "a blue square left of a green star", "two rings"]


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny.load(name) for name in tiny.NAMES}


@pytest.fixture
def pixart(pipes):
    return pipes["tiny-pixart"]


def settings(name="tiny-pixart", **changes):
    return Calibration(**{"prompts": PROMPTS, "steps": STEPS, "samples": 6, "call_kwargs": KWARGS[name]} | changes)


def record(pipe, folder, **changes):
    name = "tiny-sd" if hasattr(pipe, "unet") else "tiny-pixart"
    capture(pipe, api.find_denoisers(pipe), settings(name, **changes), folder, progress=False)


def calls(folder, part="transformer"):
    store = Store(Path(folder) / part)
    return [store.read(key) for key in store.keys("calls/")]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_recorded_call_made_again_gives_the_live_output_exactly(pipes, name, tmp_path):
    """P1 of PTQ4DM, over all steps of a run: the trajectory that the user's own call takes."""
    pipe, live = pipes[name], []
    ((part, model),) = api.find_denoisers(pipe).items()
    record(pipe, tmp_path, policy="all", samples=STEPS, prompts=["a red circle"], seed=3)
    watch = model.register_forward_hook(lambda _, args, kwargs, output: live.append(output[0]), with_kwargs=True)
    generator = torch.Generator().manual_seed(running.run_seed(3, 0))
    pipe("a red circle", num_inference_steps=STEPS, generator=generator, output_type="latent", **KWARGS[name])
    watch.remove()
    found = calls(tmp_path, part)
    assert [call["info"]["step"] for call in found] == list(range(STEPS)) and len(live) == STEPS
    with torch.no_grad():
        for call, output in zip(found, live, strict=True):
            assert torch.equal(model(*call["args"], **call["kwargs"])[0], output)


def test_a_record_says_where_it_comes_from(pixart, tmp_path):
    record(pixart, tmp_path, policy="all", samples=2 * STEPS)
    infos = [call["info"] for call in calls(tmp_path)]
    assert [(info["run"], info["step"]) for info in infos] == [(run, step) for run in (0, 1) for step in range(STEPS)]
    assert all(a["timestep"] > b["timestep"] for a, b in itertools.pairwise(infos[:4]))
    assert all(info["branches"] == [1, 0] for info in infos)


@pytest.mark.parametrize(
    "changes, branches",
    [({"guidance_scale": 1.0}, [0]), ({"num_images_per_prompt": 2}, [1, 1, 0, 0])],
)
def test_guidance_branches_follow_the_batch(pixart, tmp_path, changes, branches):
    record(pixart, tmp_path, call_kwargs=KWARGS["tiny-pixart"] | changes)
    assert all(call["info"]["branches"] == branches for call in calls(tmp_path))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_records_as_many_pairs_as_asked_and_no_others(pixart, tmp_path, policy):
    record(pixart, tmp_path, policy=policy, samples=8)
    found = [(call["info"]["run"], call["info"]["step"]) for call in calls(tmp_path)]
    assert len(set(found)) == len(found) == 8
    if policy != "clustered":
        pairs = policies.choose(settings(policy=policy, samples=8))
        assert found == [(run, step) for run in pairs for step in sorted(pairs[run])]


def test_pipelines_model_schedulers_and_generators_are_as_they_were(pixart, tmp_path):
    model, scheduler = pixart.transformer, pixart.scheduler
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    state, bar = copy.deepcopy(vars(scheduler)), dict(pixart._progress_bar_config)
    random = torch.get_rng_state()
    record(pixart, tmp_path)
    try:
        assert all(module.training for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == [i % 2 == 0 for i in range(len([*model.parameters()]))]
        assert not model._forward_pre_hooks and "cache_context" not in vars(model)
        assert pixart.scheduler is scheduler and str(vars(scheduler)) == str(state)
        assert pixart._progress_bar_config == bar and torch.equal(torch.get_rng_state(), random)
    finally:
        model.eval().requires_grad_(True)


def test_a_denoiser_that_raises_midway_is_one_line_and_leaves_the_pipeline_alone(pixart, tmp_path, monkeypatch):
    model, real, count = pixart.transformer, pixart.transformer.forward, Counter()

    def failing(*args, **kwargs):
        count["calls"] += 1
        if count["calls"] == 3:
            raise RuntimeError("out of luck\nand more")
        return real(*args, **kwargs)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", failing)
        with pytest.raises(DQError, match=r"run 0.*RuntimeError: out of luck; nothing was changed$"):
            record(pixart, tmp_path)
    assert model.training and not model._forward_pre_hooks and "cache_context" not in vars(model)
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("runs/*"))
    record(pixart, tmp_path)
    assert len(calls(tmp_path)) == 6


def test_same_settings_same_files_and_a_finished_run_is_not_done_again(pixart, tmp_path, monkeypatch):
    for name in ("one", "two"):
        record(pixart, tmp_path / name, policy="clustered")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr(pixart.transformer, "forward", None)
    record(pixart, tmp_path / "one", policy="clustered")


def test_a_deleted_call_is_recorded_again(pixart, tmp_path):
    record(pixart, tmp_path)
    whole = files(tmp_path)
    store = Store(tmp_path / "transformer")
    store.drop(store.keys("calls/")[1])
    assert files(tmp_path) != whole
    record(pixart, tmp_path)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("policy", ["stratified", "clustered"])
def test_kill_9_at_any_moment_and_a_restart_give_the_same_bytes(pixart, tmp_path, policy):
    started = time.monotonic()
    record(pixart, tmp_path / "whole", policy=policy, samples=12)
    seconds = time.monotonic() - started
    draw, killed = np.random.default_rng(0), 0
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(
            target=record, args=(pixart, tmp_path / "killed"), kwargs={"policy": policy, "samples": 12}
        )
        process.start()
        process.join(timeout=draw.uniform(0.1, 0.5) * seconds)
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed
    record(pixart, tmp_path / "killed", policy=policy, samples=12)
    assert files(tmp_path / "whole") == files(tmp_path / "killed")


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"seed": 1}, "seed"),
        ({"prompts": PROMPTS[:2]}, "prompts"),
        ({"policy": "uniform"}, "policy"),
        ({"call_kwargs": KWARGS["tiny-pixart"] | {"guidance_scale": 2.0}}, "call_kwargs"),
    ],
)
def test_the_folder_of_another_calibration_is_refused(pixart, tmp_path, changes, what):
    record(pixart, tmp_path)
    with pytest.raises(DQError, match=f"another calibration: {what} differs; choose another folder or delete it"):
        record(pixart, tmp_path, **changes)


def changed_last(tensor):
    tensor.data.view(-1)[-1] += 1


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda pipe: changed_last(max(pipe.transformer.parameters(), key=torch.numel)), r"models \(transformer\)"),
        (lambda pipe: changed_last(pipe.transformer.pos_embed.pos_embed), r"models \(transformer\)"),
        (lambda pipe: changed_last([*pipe.text_encoder.parameters()][-1]), r"components \(text_encoder\)"),
        (lambda pipe: changed_last([*pipe.vae.parameters()][-1]), r"components \(vae\)"),
        (lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5), r"components \(vae\)"),
        (lambda pipe: pipe.tokenizer.add_tokens(["hexagon"]), r"components \(tokenizer\)"),
        (lambda pipe: pipe.scheduler.register_to_config(solver_order=1), r"components \(scheduler\)"),
        (lambda pipe: setattr(pipe, "scheduler", DDIMScheduler()), r"components \(scheduler\)"),
        (lambda pipe: setattr(pipe.text_encoder.encoder.block[0].layer[0], "scaling", {"a": 0.5}), "text_encoder"),
    ],
)
def test_the_folder_of_a_pipeline_with_any_other_part_is_refused(change, what, tmp_path):
    record(tiny.load("tiny-pixart"), tmp_path, samples=STEPS)
    other = tiny.load("tiny-pixart")
    record(other, tmp_path, samples=STEPS)
    change(other)
    with pytest.raises(DQError, match=f"another calibration: .*{what}.* differs"):
        record(other, tmp_path, samples=STEPS)


@pytest.mark.parametrize("value", [torch.ones(3, 70_000), np.ones((3, 70_000)), Image.new("RGB", (300, 300))])
def test_embeddings_arrays_and_pictures_are_compared_to_the_last_value(value):
    other = copy.deepcopy(value)
    assert identity.digest({"a": [other]}) == identity.digest({"a": [value]})
    if isinstance(value, Image.Image):
        other.putpixel((299, 299), (0, 0, 1))
    else:
        other[2, -1] = 2
    assert identity.digest({"a": [other]}) != identity.digest({"a": [value]})


def loop_over(data, scale=1.0):
    return lambda model: model(data * scale)


def test_a_loop_is_known_by_what_it_does_and_with_which_data():
    same = [loop_over(torch.ones(4)), loop_over(torch.ones(4))]
    others = [loop_over(torch.arange(4.0)), loop_over(torch.ones(4), 2.0), lambda model: model(torch.ones(4))]
    assert len({identity.digest(each) for each in same}) == 1
    assert len({identity.digest(each) for each in (same[0], *others)}) == 4


def test_identity_includes_the_versions_that_made_the_records(pixart, monkeypatch):
    before = identity.of(pixart, {}, settings())
    monkeypatch.setattr(identity, "version", lambda name: "0")
    assert identity.differing(before, identity.of(pixart, {}, settings())) == "versions"


def test_records_without_a_finished_run_are_taken_over_by_another_calibration(pixart, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(capture_module._Session, "finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record(pixart, tmp_path / "one", seed=1)
    record(pixart, tmp_path / "one")
    record(pixart, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_full_disk_is_one_line_and_what_was_finished_stays(pixart, tmp_path, monkeypatch):
    real = records.save_file

    def save(*args, **kwargs):
        if list(tmp_path.glob("runs/*.json")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(records, "save_file", save)
        with pytest.raises(DQError, match="No space left on device") as error:
            record(pixart, tmp_path)
    assert "\n" not in str(error.value) and not pixart.transformer._forward_pre_hooks
    assert len(list(tmp_path.glob("runs/*.json"))) == 1
    record(pixart, tmp_path)
    record(pixart, tmp_path.with_name("other"))
    assert files(tmp_path) == files(tmp_path.with_name("other"))


# --- policies -----------------------------------------------------------------------------------------------------


def chosen(**changes):
    pairs = policies.choose(Calibration(**changes))
    return pairs, np.array([step for steps in pairs.values() for step in steps])


@pytest.mark.parametrize("policy", ["uniform", "normal", "stratified"])
@pytest.mark.parametrize("steps, samples", [(1, 1), (3, 5), (4, 4), (20, 64), (7, 33), (50, 1000)])
def test_policies_choose_exactly_the_samples_within_the_steps(policy, steps, samples):
    pairs, found = chosen(policy=policy, steps=steps, samples=samples)
    assert len(found) == samples and found.min() >= 0 and found.max() < steps and list(pairs) == sorted(pairs)
    assert pairs == chosen(policy=policy, steps=steps, samples=samples)[0]
    if samples == 1000:
        assert pairs != chosen(policy=policy, steps=steps, samples=samples, seed=1)[0]


def test_all_takes_every_step_of_as_many_runs_as_fit():
    pairs, _ = chosen(policy="all", steps=20, samples=64)
    assert pairs == {run: set(range(20)) for run in range(3)}


def test_normal_has_the_mean_and_deviation_of_ptq4dm():
    """P2 of PTQ4DM: floor and clamp of Normal(0.4 T, 0.4 T), counted from the clean end."""
    steps, samples = 50, 4000
    _, found = chosen(policy="normal", steps=steps, samples=samples)
    back = steps - 1 - found
    truth = np.random.default_rng(99).normal(0.4 * steps, 0.4 * steps, 10**6)
    truth = np.floor(truth).clip(0, steps - 1)
    assert abs(back.mean() - truth.mean()) < 3 * truth.std() / samples**0.5
    assert abs(back.std() - truth.std()) < 3 * truth.std() / (2 * samples) ** 0.5
    assert (back < steps / 2).mean() > 0.5


def test_uniform_is_even_over_steps():
    _, found = chosen(policy="uniform", steps=10, samples=4000)
    assert np.abs(np.bincount(found, minlength=10) - 400).max() < 3 * 400**0.5


def test_stratified_keeps_a_stride_within_a_run_and_covers_all_steps_evenly():
    pairs, found = chosen(policy="stratified", steps=20, samples=80)
    assert all(np.diff(sorted(steps)).tolist() == [5, 5, 5] for steps in pairs.values())
    assert set(np.bincount(found, minlength=20)) == {4}
    pairs, found = chosen(policy="stratified", steps=20, samples=62)
    strata = np.bincount(found // 5)
    assert strata.max() - strata.min() <= 1


def pool(rng, clumps=8, each=60, steps=20):
    """Calls of clumps of unequal size: the first holds ten times as many as any other."""
    centres = rng.normal(size=(clumps, 64))
    clump = np.repeat(np.arange(clumps), [10 * each] + [each] * (clumps - 1))
    x = centres[clump] + 0.2 * rng.normal(size=(len(clump), 64))
    of = np.stack([np.arange(len(clump)) // steps, clump * steps // clumps], 1)
    return x, of, clump


def test_clustered_is_more_varied_than_a_uniform_set_of_equal_size():
    """Q&C's property of TAP: lower mean pairwise cosine and wider ranges per channel."""
    rng = np.random.default_rng(0)
    x, of, clump = pool(rng)
    picked = policies._cluster(x, of[:, 1], 64, np.random.default_rng(0))
    assert len(set(picked.tolist())) == 64
    assert np.bincount(clump[picked], minlength=8).min() >= 4

    def cosine(rows):
        unit = x[rows] / np.linalg.norm(x[rows], axis=1, keepdims=True)
        return (unit @ unit.T)[~np.eye(len(rows), dtype=bool)].mean()

    uniform = [rng.choice(len(x), 64, replace=False) for _ in range(20)]
    assert cosine(picked) < min(cosine(rows) for rows in uniform)
    assert np.ptp(x[picked], axis=0).mean() > np.mean([np.ptp(x[rows], axis=0).mean() for rows in uniform])


def test_labelings_that_differ_in_names_alone_merge_to_one():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    noisy = np.where(rng.random(200) < 0.1, rng.integers(0, 5, 200), labels)
    merged = policies._merge([labels, rng.permutation(5)[labels], rng.permutation(5)[noisy]], 5)
    assert (merged == labels).all()


def test_a_sketch_keeps_cosines():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, 64, 64, generator=generator)
    b = 0.5 * a + torch.randn(2, 4, 64, 64, generator=generator)
    truth = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    x, y = (np.array(capture_module.sketch(value)) for value in (a, b))
    assert abs(x @ y / np.linalg.norm(x) / np.linalg.norm(y) - truth) < 3 / capture_module.SKETCH**0.5


# --- several processes, other systems -----------------------------------------------------------------------------


def hold(folder, ready, done):
    with Calibration(folder=folder).workplace():
        ready.set()
        done.wait(30)


def test_a_folder_is_one_process_work_at_a_time(tmp_path):
    start = multiprocessing.get_context("spawn")
    ready, done = start.Event(), start.Event()
    process = start.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    for _ in range(2):
        with pytest.raises(DQError, match="another process is at work in the folder") as error:
            with Calibration(folder=tmp_path).workplace():
                pass
        assert "\n" not in str(error.value)
    process.kill()  # whoever holds it may die without a word
    process.join()
    with Calibration(folder=tmp_path).workplace() as place:
        assert place == tmp_path


def test_processes_of_one_launch_share_the_folder(tmp_path, monkeypatch):
    with Calibration(folder=tmp_path).workplace():
        monkeypatch.setattr(world, "processes", lambda: SimpleNamespace(is_main_process=False))
        with Calibration(folder=tmp_path).workplace() as place:
            assert place == tmp_path


UNIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog", "posix", "curses")
ELSEWHERE = """
import builtins, importlib, os, pkgutil
real = builtins.__import__

def elsewhere(name, globals=None, *rest, **named):
    if name in {names!r} and str((globals or {{}}).get("__name__")).partition(".")[0] == "dq":
        raise ModuleNotFoundError(f"No module named {{name!r}}")
    return real(name, globals, *rest, **named)

builtins.__import__ = elsewhere
for name in ("fork", "sched_getaffinity", "getuid", "geteuid", "killpg", "setsid"):
    delattr(os, name)
import dq
for item in pkgutil.walk_packages(dq.__path__, "dq."):
    if not item.name.startswith(("dq.kernels.triton", "dq.kernels.cpu.lib", "dq.cli.__main__")):
        importlib.import_module(item.name)
import torch
from torch import nn

def loop(model):
    model(torch.ones(4, 8, 64))

model = nn.ModuleDict({{"blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))])}})
model.forward = lambda x: model["blocks"][0](x)
for folder in (None, {folder!r}):
    seen = dq.Calibration(forward_loop=loop, folder=folder)
    dq.quantize(model, "gptq-int4-weight", calibration=seen, progress=False)
    dq.save(model, {saved!r})
    dq.dequantize(model)
    dq.load({saved!r}, model)
    dq.dequantize(model)
dq.quantize(model, "int8-weight", budget=dq.Budget(bits=6), calibration=loop, progress=False)
print("all done")
"""


def test_nothing_needs_a_module_that_windows_has_not(tmp_path):
    places = {"folder": str(tmp_path / "kept"), "saved": str(tmp_path / "saved")}
    program = ELSEWHERE.format(names=UNIX_ONLY, **places)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "all done", done.stderr[-2000:]


def test_renames_go_where_nothing_is_as_windows_wants_it(pixart, tmp_path, monkeypatch):
    real = Path.rename

    def strict(self, target):
        assert not Path(target).exists(), f"renamed onto {target}"
        return real(self, target)

    monkeypatch.setattr(Path, "rename", strict)
    record(pixart, tmp_path, samples=STEPS)
    store = Store(tmp_path / "transformer")
    key = store.keys("calls/")[0]
    store.write(key, store.read(key))
    store.drop(key)
    assert not store.has(key)


# --- forward loops ------------------------------------------------------------------------------------------------


def loop(model):
    entry = zoo.ENTRIES[type(model).__name__]
    for seed in range(3):
        zoo.call(model, entry, seed)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_every_call_of_a_forward_loop_is_recorded(name, tmp_path):
    model = zoo.build(name)
    live = []
    watch = model.register_forward_hook(lambda *got: live.append(zoo.tensors_in(got[-1])))
    capture(model, {"": model}, resolve(loop), tmp_path)
    watch.remove()
    found = calls(tmp_path, "")
    assert [(call["info"]["run"], call["info"]["step"]) for call in found] == [(0, -1), (1, -1), (2, -1)]
    assert all(set(call["info"]["branches"]) == {0} for call in found)
    with torch.no_grad():
        for call, outputs in zip(found, live, strict=True):
            again = zoo.tensors_in(model(*call["args"], **call["kwargs"]))
            assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


def test_a_forward_loop_that_failed_starts_anew(tmp_path):
    model, whole = zoo.build("UNet2DModel"), tmp_path / "whole"
    capture(model, {"": model}, Calibration(forward_loop=loop), whole)

    def half(model):
        zoo.call(model, zoo.ENTRIES["UNet2DModel"], 7)
        raise KeyError("half way")

    half.__qualname__ = loop.__qualname__
    with pytest.raises(DQError, match="forward_loop failed during calibration with KeyError: 'half way'"):
        capture(model, {"": model}, Calibration(forward_loop=half), tmp_path / "half")
    capture(model, {"": model}, Calibration(forward_loop=loop), tmp_path / "half")
    assert files(whole) == files(tmp_path / "half")


def replacing(model):
    loop(model)
    model.mid_block = copy.deepcopy(model.mid_block)


def training(model):
    with torch.enable_grad():
        loop(model)
        model.conv_in.bias.requires_grad_(True).sum().backward()
        torch.optim.SGD([model.conv_in.bias], lr=0.1).step()


def writing(model):
    loop(model)
    model.conv_out.weight.data[-1, -1, -1, -1] += 1  # behind autograd's back


@pytest.mark.parametrize(
    "wrong, message",
    [
        (replacing, "put another module in the place of 'mid_block'"),
        (training, "changed 'conv_in.bias' of the model"),
        (writing, "changed 'conv_out.weight' of the model"),
    ],
)
def test_a_loop_that_does_more_than_run_the_model_is_refused(wrong, message, tmp_path):
    model = zoo.build("UNet2DModel")
    with pytest.raises(DQError, match=f"forward_loop {message}") as error:
        capture(model, {"": model}, Calibration(forward_loop=wrong), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_layer_that_gives_no_usable_numbers_is_named(value, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    spoilt = lambda model: (model(torch.ones(2, 4)), model(torch.tensor([[1.0, value, 1.0, 1.0]])))  # noqa: E731
    with pytest.raises(DQError, match=r"layer '0' gave (NaN or Inf|values up to \S+) in calibration"):
        capture(model, {"": model}, Calibration(forward_loop=spoilt), tmp_path)
    model[0].bias.data.fill_(3.0)  # all of the first layer gets past the ReLU
    model[2].weight.data[3, 3] = value
    found = "its weight holds NaN or Inf" if value != 1e30 else "gave values up to"
    with pytest.raises(DQError, match=f"layer '2'.*{found}"):
        capture(model, {"": model}, Calibration(forward_loop=lambda model: model(torch.ones(2, 4))), tmp_path)
    assert not any(module._forward_hooks for module in model.modules())


# --- wrong use ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", " "]}, "a prompt is ' '"),
        ({"prompts": [3]}, "a prompt is 3"),
        ({"prompts": "no/such/file.txt"}, "cannot read the prompts file 'no/such/file.txt'"),
        ({"samples": 19}, r"samples=19 and steps=20.*raise samples to 20"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}, expected at most {2**63 - 1}"),
        ({"steps": 10**9, "samples": 10**9}, "steps is 1000000000, expected at most 10000"),
        ({"samples": 10**12}, "samples is 1000000000000, expected at most"),
        ({"prompts": (text for text in PROMPTS)}, "prompts is a generator, expected a list of texts"),
        ({"prompts": 3}, "prompts is a int"),
        ({"prompts": {"a": 1}}, "prompts is a dict"),
        ({"prompts": b"a red circle"}, "prompts is a bytes"),
        ({"policy": "stratifed"}, "Did you mean 'stratified'"),
        ({"call_kwargs": [1]}, "call_kwargs is a list"),
        ({"call_kwargs": {"num_inference_steps": 7}}, "give it as steps"),
        ({"forward_loop": 3}, "forward_loop is 3"),
    ],
)
def test_wrong_settings_are_refused_at_the_door(changes, message):
    with pytest.raises(DQError, match=message) as error:
        Calibration(**changes)
    assert "\n" not in str(error.value)


def test_prompts_come_from_a_list_a_file_or_with_dq(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \n")
    assert Calibration(prompts=path).texts() == Calibration(prompts=str(path)).texts() == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(DQError, match="is empty"):
        Calibration(prompts=path)
    own = Calibration().texts()
    assert len(own) == len(set(own)) == 64


def test_only_calibrations_and_functions_are_taken():
    assert resolve(settings()).steps == STEPS and resolve(loop).forward_loop is loop
    for wrong in (None, 3, "prompts.txt", ["a prompt"], nn.Linear(1, 1), Calibration):
        with pytest.raises(DQError, match=r"expected dq.Calibration\(prompts=...\) or a function"):
            resolve(wrong)


def test_wrong_combinations_of_target_and_calibration_are_refused(pixart, tmp_path):
    model = zoo.build("UNet2DModel")
    with pytest.raises(DQError, match="needs forward_loop"):
        capture(model, {"": model}, Calibration(), tmp_path)
    with pytest.raises(DQError, match="forward_loop is for a bare model"):
        capture(pixart, {"transformer": pixart.transformer}, resolve(loop), tmp_path)
    with pytest.raises(DQError, match=r"takes no 'guidance_scal'.*'guidance_scale'"):
        record(pixart, tmp_path, call_kwargs={"guidance_scal": 3})
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_never_called_is_named(pixart, tmp_path):
    model = zoo.build("UNet2DModel")
    with pytest.raises(DQError, match="forward_loop never called the model"):
        capture(model, {"": model}, resolve(lambda model: None), tmp_path / "loop")


def test_a_part_that_the_pipeline_never_calls_is_left_out(pixart, tmp_path):
    models = {"transformer": pixart.transformer, "adapter": zoo.build("UNet2DModel")}
    silent = capture(pixart, models, settings(), tmp_path, progress=False)
    assert silent == {"adapter": "never called by the pipeline, left in full precision"}
    assert capture(pixart, models, settings(), tmp_path, progress=False) == silent  # taken up from the folder


class InTurns(PixArtSigmaPipeline):
    """A pipeline with the setting of those with two experts."""

    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler, boundary_ratio=None):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_to_config(boundary_ratio=boundary_ratio)


def test_settings_of_the_pipeline_itself_are_compared(pixart):
    found = [identity.of(InTurns(**pixart.components, boundary_ratio=ratio), {}, settings()) for ratio in (0.5, 0.9)]
    assert identity.differing(*found) == "settings"


@pytest.mark.parametrize(
    "config, advice",
    [({}, "raise steps, or give call_kwargs"), ({"boundary_ratio": None}, "boundary_ratio=None"),
     ({"boundary_ratio": 0.01}, "boundary_ratio=0.01; raise steps")],
)  # fmt: skip
def test_an_expert_that_is_never_reached_is_told_with_what_helps(config, advice, tmp_path):
    pipe = tiny.load("tiny-pixart")
    pipe = (InTurns if config else type(pipe))(**pipe.components, **config)
    models = {"transformer": pipe.transformer, "transformer_2": copy.deepcopy(pipe.transformer)}
    with pytest.raises(DQError, match=f"'transformer_2' was never called in {STEPS} steps: .*{advice}") as error:
        capture(pipe, models, settings(samples=STEPS), tmp_path, progress=False)
    assert "components={'transformer_2': None}" in str(error.value) and "raise samples" not in str(error.value)


def test_an_expert_that_is_called_at_other_steps_only_is_told_to_raise_samples(tmp_path, monkeypatch):
    pipe, first = tiny.load("tiny-pixart"), {}
    other = copy.deepcopy(pipe.transformer)
    real = pipe.transformer.forward

    def experts(*args, **kwargs):
        late = float(kwargs["timestep"].max()) < first.setdefault("timestep", float(kwargs["timestep"].max()))
        return other(*args, **kwargs) if late else real(*args, **kwargs)

    pipe.transformer.forward = experts
    monkeypatch.setattr(policies, "choose", lambda calibration: {0: {0}})
    models = {"transformer": pipe.transformer, "transformer_2": other}
    with pytest.raises(DQError, match="'transformer_2' was called, but at no recorded step; raise samples"):
        capture(pipe, models, settings(samples=STEPS), tmp_path, progress=False)


# --- pipelines of other kinds -------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.weight, self.names = nn.Parameter(torch.ones(1)), names

    def cache_context(self, name):
        self.names.append(name)
        return contextlib.nullcontext()

    def forward(self, hidden_states, timestep):
        return hidden_states * self.weight


class Video:
    """Two experts one after the other, guidance by two calls, timesteps per token, a required image."""

    def __init__(self):
        self.names = []
        self.transformer, self.transformer_2 = Two(self.names), Two(self.names)
        self.components = {"transformer": self.transformer, "transformer_2": self.transformer_2}

    def __call__(self, image, prompt=None, num_inference_steps=4, generator=None):
        x = torch.randn(1, 4, generator=generator) + torch.randn(1, 4)
        for i in range(num_inference_steps):
            model = self.transformer if i < 1 else self.transformer_2
            t = torch.tensor([0.0, 1 - i / num_inference_steps])
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    x = model(x, timestep=t)


def test_two_denoisers_two_calls_a_step_and_token_timesteps(tmp_path):
    pipe = Video()
    models = dict(pipe.components)
    wanted = Calibration(steps=4, samples=8, policy="all", call_kwargs={"image": torch.ones(2)})
    with pytest.raises(DQError, match="Video also needs 'image'; add it to"):
        capture(pipe, models, Calibration(steps=4, samples=8, policy="all"), tmp_path / "lacking", progress=False)
    for name in ("one", "two"):
        capture(pipe, models, wanted, tmp_path / name, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "two"), "the global generator is seeded"
    first, second = calls(tmp_path / "one"), calls(tmp_path / "one", "transformer_2")
    assert [call["info"]["step"] for call in first] == [0, 0] * 2
    assert [call["info"]["step"] for call in second] == [1, 1, 2, 2, 3, 3] * 2
    assert [call["info"]["branches"] for call in second] == [[0], [1]] * 6
    assert second[0]["info"]["timestep"] == 0.75 and pipe.names[:2] == ["cond", "uncond"]
    assert "cache_context" not in vars(pipe.transformer)


def test_class_labels_are_drawn_and_their_empty_half_comes_second(tmp_path):
    class Classes:
        def __init__(self):
            self.transformer = zoo.build("DiTTransformer2DModel")
            self.components, self.labels = {"transformer": self.transformer}, []

        def __call__(self, class_labels, num_inference_steps=2, generator=None):
            self.labels += class_labels
            for t in range(num_inference_steps):
                inputs = zoo.ENTRIES["DiTTransformer2DModel"].inputs(torch.Generator().manual_seed(t), torch.float32)
                self.transformer(**inputs)

    pipe = Classes()
    capture(pipe, pipe.components, Calibration(steps=2, samples=4), tmp_path, progress=False)
    classes = pipe.transformer.config.num_embeds_ada_norm
    assert len(pipe.labels) == 2 and all(0 <= label < classes for label in pipe.labels)
    assert all(call["info"]["branches"] == [0, 1] for call in calls(tmp_path))


def test_processes_deal_out_the_runs_and_together_record_the_same(pixart, tmp_path, monkeypatch):
    record(pixart, tmp_path / "one", policy="uniform")
    for rank in (0, 1):
        world = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
        world.wait_for_everyone = lambda: None
        monkeypatch.setattr(capture_module, "processes", lambda world=world: world)
        if rank == 0:  # whose check for silent denoisers comes after the barrier
            record(pixart, tmp_path / "two", policy="uniform")
            assert files(tmp_path / "one") != files(tmp_path / "two")
        else:
            record(pixart, tmp_path / "two", policy="uniform")
    assert files(tmp_path / "one") == files(tmp_path / "two")
