"""Tuning: trained is what packed layers hold and only that; the best state is kept, a killed tuning goes on."""

from __future__ import annotations

import os
import zlib
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

import dq
from dq import kernels
from dq.errors import DQError
from dq.fit import distill, drafts, room, student
from dq.fit.trainable import Trainable
from dq.fit.tune import PARTS, Tune
from dq.layers import packed_layers
from dq.plan import LayerPlan, TensorPlan
from dq.trace import pairs
from dq.trace.calibration import Calibration
from dq.trace.pairs import Pair
from tests.models import same_state
from tests.shared import ran

WEIGHTS = (
    "int4/group:16",
    "int4/channel",
    "int3a/group:16",
    "int4/group:16+channel",
    "nvfp4",
    "mxfp4",
    "e2m1/channel",
    "hif8/channel",
    "lut4/channel",
    "vq16x2",
)


def plan(weight: str, act: str | None = "int8/token", **more) -> LayerPlan:
    return LayerPlan("linear", (24, 40), TensorPlan.parse(weight), act and TensorPlan.parse(act), **more)


def packed_of(layer: LayerPlan):
    """-> (layer of random weights, what it is packed to under a plan, its optional tensors filled with something)."""
    torch.manual_seed(0)
    made = nn.Linear(40, 24) if layer.kind == "linear" else nn.Conv2d(8, 24, 3, padding=1)
    draft = drafts.draft(made, layer)
    for name in ("smooth", "proj_down", "proj_up", "act_scale"):
        if (value := getattr(draft, name)) is not None:
            value.data = 0.5 + torch.rand_like(value) / 10
    return made, draft.pack(torch.float32)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_begins_as_the_packed_layer_and_packs_to_the_same_bytes(weight):
    module, packed = packed_of(plan(weight, "int8/token", smooth=True, rank=3))
    made, x = Trainable(module, packed, PARTS), torch.randn(2, 5, 40)
    made.hold()
    kernels.select("reference")
    try:
        torch.testing.assert_close(made.forward(x), packed(x), rtol=1e-5, atol=1e-6)
    finally:
        kernels.select("auto")
    assert same_state(made.pack(), packed)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_was_trained_packs_to_what_the_forward_gave(weight):
    module, packed = packed_of(plan(weight, "int8/token", smooth=True, rank=3))
    made, x = Trainable(module, packed, PARTS), torch.randn(2, 5, 40)
    for values in made.parameters.values():
        for value in values:
            value.data += 0.4 * torch.rand_like(value)
    made.hold()
    found, given = made.pack(), made.forward(x)
    found.backend = "reference"
    torch.testing.assert_close(given, found(x), rtol=1e-4, atol=1e-5)
    assert {k: (v.shape, v.dtype) for k, v in found.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in packed.state_dict().items()
    }
    assert found.plan == packed.plan and not same_state(found, packed)


@pytest.mark.parametrize("weight", ["int4/group:16", "int4/channel", "int4/group:16+channel", "nvfp4", "int4a/tensor"])
def test_the_gradient_of_steps_is_the_slope_of_the_loss(weight):
    """With codes that move along, the loss is smooth in the logarithm of a step."""
    module, packed = packed_of(plan(weight, None))
    made, x = Trainable(module, packed, ("scales",)), torch.randn(7, 40)
    (log,) = made.parameters["scales"]

    def loss() -> torch.Tensor:
        made.hold()
        return made.forward(x).square().sum()

    loss().backward()
    made.gather()
    direction = torch.randn_like(log)
    slope, base = float((log.grad * direction).sum()), log.data.clone()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            log.data = base + sign * 1e-3 * direction
            ends.append(float(loss()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_the_gradient_of_rounding_is_straight_through_inside_the_grid():
    module, packed = packed_of(plan("int3/channel", None))
    made, x = Trainable(module, packed, ("weights",)), torch.randn(7, 40)
    (unit,) = made.parameters["weights"]
    unit.data[0, :5] = 9.0  # beyond the grid: clipped, and no gradient
    made.hold()
    made.forward(x).square().sum().backward()
    whole = made.leaf.grad.clone()
    made.gather()
    assert torch.equal(unit.grad[0, :5], torch.zeros(5)) and float(whole[0, :5].abs().min()) > 0
    torch.testing.assert_close(unit.grad[1:], whole[1:] * packed.scale[1:])


def test_an_input_split_a_permutation_and_a_convolution_are_trained_too():
    split = plan("int4/group:16", "int8/token", splits=(16,))
    conv = LayerPlan("conv2d", (24, 8, 3, 3), TensorPlan.parse("int4/channel"), TensorPlan.parse("int8a/tensor"))
    for each, x in ((split, torch.randn(3, 40)), (conv, torch.randn(2, 8, 6, 6))):
        module, packed = packed_of(each)
        made = Trainable(module, packed, PARTS)
        made.hold()
        made.forward(x).square().sum().backward()
        made.gather()
        assert all(float(value.grad.abs().sum()) > 0 for values in made.parameters.values() for value in values)
        assert same_state(made.pack(), packed)


def test_stored_activation_scales_learn_with_their_own_gradient():
    act = replace(plan("int4/channel"), act=TensorPlan.parse("int4/tensor/static"))
    module, packed = packed_of(act)
    made = Trainable(module, packed, ("act",))
    assert list(made.parameters) == ["act"]
    made.hold()
    made.forward(torch.randn(9, 40)).square().sum().backward()
    made.gather()
    (log,) = made.parameters["act"]
    assert float(log.grad.abs().sum()) > 0 and made.leaf.grad is None


@pytest.mark.parametrize("weight", ["int4/group:16", "int3a/group:16", "nvfp4"])
def test_updates_of_low_rank_begin_at_nothing_and_are_merged_before_rounding(weight):  # EfficientDM P1
    module, packed = packed_of(plan(weight, None, rank=3))
    made, x = Trainable(module, packed, ("lowrank",), rank=2), torch.randn(2, 5, 40)
    assert torch.equal(made.pack().dense_weight(), packed.dense_weight())  # of nvfp4 a minus zero may become zero
    down, up = made.parameters["lowrank"]
    assert down.shape == (2, 40) and up.shape == (24, 2)
    made.hold()
    made.forward(x).square().sum().backward()
    through = made.leaf.grad * made.weight._step
    made.gather()
    inside = through @ down.detach().t()
    assert float((up.grad - inside).abs().max()) <= 1e-4 * float(inside.abs().max())
    up.data += 9.0
    found = made.pack()
    assert not torch.equal(found.stored, packed.stored) and torch.equal(found.scale, packed.scale)
    found.backend = "reference"
    torch.testing.assert_close(made.forward(x), found(x), rtol=1e-4, atol=1e-5)


# --- whole denoisers ------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """hidden_states (batch, tokens, 32) -> the same; one linear stays in full precision."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.last = nn.Linear(32, 32)

    def forward(self, hidden_states, timestep, text=None):
        x = hidden_states + text
        for block in self.blocks:
            x = x + block(x * (1 + timestep / 1000))
        return self.last(x)


class Pipeline(DiffusionPipeline):
    """Guided: rows without text first, then rows with."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, guidance_scale=3.0, generator=None, output_type="latent"):
        words = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        text = torch.cat([torch.zeros(1, 1, 32), torch.randn(1, 1, 32, generator=words)])
        x = torch.randn(1, 8, 32, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            free, held = self.transformer(torch.cat([x, x]), timestep, text=text).chunk(2)
            x = self.scheduler.step(free + guidance_scale * (held - free), timestep, x).prev_sample
        return x


def pipeline() -> Pipeline:
    return Pipeline(Denoiser().eval(), DDIMScheduler())


def settings(**changes) -> Calibration:
    return Calibration(**{"prompts": ["a red circle", "a blue square"], "steps": 4, "samples": 8} | changes)


WISH = Tune(updates=40, runs=8, batch=2)
KEEP = ("last",)


def tuned(wish=WISH, recipe="int4-weight", **changes):
    pipe = pipeline()
    return pipe, dq.quantize(pipe, recipe, calibration=settings(**changes), keep=KEEP, tune=wish, progress=False)


def untuned(recipe="int4-weight"):
    pipe = pipeline()
    given = {} if recipe == "int4-weight" else {"calibration": settings()}
    return pipe, dq.quantize(pipe, recipe, keep=KEEP, progress=False, **given)


@pytest.mark.parametrize("recipe", ["int4-weight", "svdquant-int4"])
def test_a_tuned_recipe_is_nearer_at_the_same_bytes_and_kernels(recipe):
    (untuned_pipe, plain), (pipe, report) = untuned(recipe), tuned(recipe=recipe)
    found = report.tuned["transformer"]
    gain = {"int4-weight": 1.0, "svdquant-int4": 0.05}[recipe]  # rounded activations of random weights leave no more
    assert found["after_db"] > found["before_db"] + gain and found["updates"] == 40
    assert report.bytes_after == plain.bytes_after
    kept = [(row.name, row.weight, row.act, row.rank, row.bytes, row.kernel) for row in report.layers]
    assert kept == [(row.name, row.weight, row.act, row.rank, row.bytes, row.kernel) for row in plain.layers]
    assert any("held-out prediction" in note for note in report.notes)
    assert state_of(pipe).keys() == state_of(untuned_pipe).keys()


def state_of(pipe) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_quantized_layers_change_and_only_the_parts_asked_for():
    (plain, _), (pipe, _) = untuned(), tuned(replace(WISH, parts=("bias",)))
    before, after = state_of(plain), state_of(pipe)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("bias") and not name.startswith("last")}


def test_only_the_layers_asked_for_change():
    (plain, _), (pipe, _) = untuned(), tuned(replace(WISH, layers=(r"blocks\.1\.",)))
    before, after = state_of(plain), state_of(pipe)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("blocks.1.") for name in moved)


def moved_shares(aware: bool) -> torch.Tensor:
    """Share of each layer's codes that a tuning by low rank changes, in a model whose layers differ in size."""
    found = []
    for wish in (None, replace(WISH, parts=("lowrank",), aware=aware, rank=4)):
        pipe = pipeline()
        with torch.no_grad():
            for block, times in zip(pipe.transformer.blocks, (4.0, 0.25), strict=True):
                block[0].weight *= times
                block[2].weight /= times
        dq.quantize(pipe, "int4-weight", calibration=wish and settings(), keep=KEEP, tune=wish, progress=False)
        found.append([layer.plan.weight.spec.unpack(layer.stored, layer.plan.columns)
                      for layer in packed_layers(pipe.transformer).values()])  # fmt: skip
    return torch.stack([(a != b).float().mean() for a, b in zip(*found, strict=True)])


def test_rates_in_steps_of_each_layer_move_codes_in_all_layers_alike():  # EfficientDM P3
    aware, alike = moved_shares(True), moved_shares(False)
    spread = [float(each.std() / each.mean()) for each in (aware, alike)]
    assert float(aware.min()) > 0 and spread[0] < 0.7 * spread[1], (aware, alike)


def test_it_saves_and_loads_as_any_model(tmp_path):
    pipe, _ = tuned()
    dq.save(pipe.transformer, tmp_path / "saved")
    again = Denoiser()
    dq.load(tmp_path / "saved", again)
    assert same_state(again, pipe.transformer)


def test_rates_that_ruin_everything_leave_the_layers_as_they_were():
    (plain, before), (pipe, report) = untuned(), tuned(replace(WISH, rate=1e6))
    assert equal(state_of(plain), state_of(pipe))
    assert report.tuned["transformer"]["after_db"] == report.tuned["transformer"]["before_db"]
    assert any("no state was better" in note for note in report.notes)
    assert [row.error_db for row in report.layers] == [row.error_db for row in before.layers]


class Killed(Exception):
    pass


def stopping(after: int, error: type[Exception] | None = None):
    count = iter(range(10_000))

    def stop() -> bool:
        if next(count) < after:
            return False
        if error is not None:
            raise error
        return True

    return stop


def test_a_killed_tuning_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SAVED_S", 0.0)
    whole, _ = tuned(folder=tmp_path / "whole")
    steps, real = [], distill._Work._step
    monkeypatch.setattr(distill._Work, "_step", lambda work: steps.append(1) or real(work))
    with pytest.raises(Killed):
        tuned(replace(WISH, stop=stopping(23, Killed)), folder=tmp_path / "killed")
    assert len(steps) == 23
    again, report = tuned(folder=tmp_path / "killed")
    assert len(steps) == 40 and report.tuned["transformer"]["updates"] == 40
    assert equal(state_of(whole), state_of(again))
    finished, _ = tuned(folder=tmp_path / "killed")
    assert len(steps) == 40 and equal(state_of(whole), state_of(finished))


def test_a_folder_of_another_calibration_is_refused_and_of_another_tuning_begun_anew(tmp_path, monkeypatch):
    first, _ = tuned(folder=tmp_path)
    other, _ = tuned(replace(WISH, batch=3), folder=tmp_path)
    assert not equal(state_of(first), state_of(other))
    with pytest.raises(DQError, match="holds another calibration"):
        tuned(folder=tmp_path, prompts=["something else"])


def test_a_caller_may_stop_it_and_gets_the_best_so_far():
    _, report = tuned(replace(WISH, stop=stopping(20)))
    assert report.tuned["transformer"]["updates"] == 20
    assert report.tuned["transformer"]["after_db"] > report.tuned["transformer"]["before_db"]
    assert any("stopped by the caller after 20 updates" in note for note in report.notes)


def test_a_loss_that_is_no_number_stops_it_keeps_the_best_and_says_where(monkeypatch):
    real, count = distill.share, iter(range(10_000))

    def broken(pair, output, guidance):
        found = real(pair, output, guidance)
        return (found[0] * float("nan"), found[1]) if output.requires_grad and next(count) == 61 else found

    monkeypatch.setattr(distill, "share", broken)
    pipe, report = tuned()
    assert report.tuned["transformer"]["updates"] == 30
    assert any("stopped at update 30: the loss is not a number at timestep" in note for note in report.notes)
    assert report.tuned["transformer"]["after_db"] > report.tuned["transformer"]["before_db"]
    assert all(value.isfinite().all() for value in state_of(pipe).values() if value.is_floating_point())


def test_minutes_decide_how_many_updates_there_are():
    _, report = tuned(Tune(minutes=0.03, runs=3, batch=1))
    found = report.tuned["transformer"]
    assert found["updates"] > distill.TIMED and found["seconds"] < 6


def test_blocks_that_run_again_on_the_way_back_give_the_same_bytes():
    (one, _), (other, _) = tuned(replace(WISH, checkpoint=True)), tuned(replace(WISH, checkpoint=False))
    assert equal(state_of(one), state_of(other))


def test_half_precision_products_learn_as_well():
    _, report = tuned(replace(WISH, precision="bf16"))
    assert report.tuned["transformer"]["after_db"] > report.tuned["transformer"]["before_db"] + 1


def test_the_error_is_that_of_the_guided_prediction():
    torch.manual_seed(0)
    truth, mine = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ((e, y),) = student.errors(Pair((), {}, truth, 1.0, (1, 0)), mine, 3.0)
    guided = lambda value: value[:1] + 3.0 * (value[1:] - value[:1])  # noqa: E731
    torch.testing.assert_close(e, guided(mine) - guided(truth))
    torch.testing.assert_close(y, guided(truth))
    ((plain, _),) = student.errors(Pair((), {}, truth, 1.0, (0, 0)), mine, 3.0)
    torch.testing.assert_close(plain, mine - truth)


def test_channels_of_a_learned_variance_do_not_count():
    truth = torch.randn(1, 8, 4, 4)
    pair = Pair((torch.randn(1, 4, 4, 4),), {}, (truth,), 1.0, (0,))
    ((e, _),) = student.errors(pair, (truth + torch.cat([torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)], 1),), None)
    assert e.shape == (1, 4, 4, 4) and float(e.abs().max()) == 0


def test_runs_not_calls_are_held_out(tmp_path):
    tuned(folder=tmp_path)
    store = pairs.Store(tmp_path / "transformer")
    learned, held = pairs.divided(store, 0.25)
    runs = [{key.rpartition("-")[0] for key in keys} for keys in (learned, held)]
    assert len(learned) == 24 and len(held) == 8 and not runs[0] & runs[1]


def test_a_bare_model_learns_from_the_loop_that_runs_it():
    model = Denoiser().eval()

    def loop(model):
        for step in range(12):
            model(torch.randn(2, 8, 32), torch.tensor(100.0 * step), text=torch.randn(2, 1, 32))

    report = dq.quantize(model, "int4-weight", calibration=loop, keep=KEEP, tune=WISH, progress=False)
    found = report.tuned["model"]
    assert found["after_db"] > found["before_db"] and len(packed_layers(model)) == 4


def shared_work(rank: int, size: int, port: int, folder) -> None:
    shared = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ.update(shared | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    PartialState._reset_state()
    asked, real = [], student.Student.answer
    student.Student.answer = lambda self, pair, short=False: asked.append(pair.timestep) or real(self, pair, short)
    pipe, report = tuned(replace(WISH, batch=3), folder=folder / "work")
    found = {"state": pipe.transformer.state_dict(), "tuned": report.tuned["transformer"], "asked": len(asked)}
    torch.save(found, folder / f"out{rank}")


def test_two_processes_share_the_calls_and_end_with_equal_layers(tmp_path):
    (alone,), (one, other) = ran(shared_work, 1, tmp_path / "1"), ran(shared_work, 2, tmp_path / "2")
    assert equal(one["state"], other["state"]) and one["tuned"]["after_db"] == other["tuned"]["after_db"]
    assert one["asked"] + other["asked"] == alone["asked"] and other["asked"] > 0.3 * alone["asked"]
    assert one["tuned"]["after_db"] == pytest.approx(alone["tuned"]["after_db"], abs=0.3)
    assert one["tuned"]["after_db"] > one["tuned"]["before_db"] + 1


def refused(message: str, recipe="int4-weight", **given) -> None:
    pipe = pipeline()
    before = state_of(pipe)
    with pytest.raises(DQError, match=message) as error:
        dq.quantize(pipe, recipe, **{"keep": KEEP, "calibration": settings(), "progress": False, **given})
    assert "\n" not in str(error.value) and equal(before, state_of(pipe))
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())


def test_wrong_use_is_one_line_and_changes_nothing(monkeypatch):
    refused(r"tune is 20, expected dq.Tune", tune=20)
    refused(r"no layer of transformer begins with 'nothing'", tune=replace(WISH, layers=("nothing",)))
    refused(r"nothing of smooth", tune=replace(WISH, parts=("smooth",)))
    with pytest.raises(DQError, match="a bare model needs runs to learn from"):
        dq.quantize(Denoiser(), "int4-weight", tune=WISH)
    monkeypatch.setattr(room, "free_bytes", lambda device: 10_000)
    refused(r"training needs about 0\.0 GiB beside the model, 0\.0 GiB are free; tune fewer layers", tune=WISH)


@pytest.mark.parametrize(
    "given", [{"minutes": 0}, {"updates": 0}, {"held": 1.0}, {"parts": ("bytes",)}, {"parts": ()}, {"parts": "bias"},
              {"loss": "l1"}, {"precision": "int8"}, {"layers": "blocks"}, {"batch": 1.5}, {"rate": float("nan")}],
)  # fmt: skip
def test_a_tuning_that_cannot_work_is_refused_when_it_is_stated(given):
    with pytest.raises(DQError, match=f"tune: {next(iter(given))} is"):
        Tune(**given)
