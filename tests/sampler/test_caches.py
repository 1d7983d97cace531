"""Block caches around quantized models: off and at their limits bit for bit, fresh in every run, part of the plan."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import dq
from dq import cookbook
from dq.host import mark
from dq.sampler import caches
from dq.sampler.caches import branches, interval, parts
from pipelines import tiny
from tests import zoo
from tests.models import FLUX, PIXART, UNET

LATTE = "LatteTransformer3DModel"
STEPS = (900.0, 700.0, 500.0, 300.0)


def quantized(recipe: str, name: str = PIXART):
    model = zoo.build(name)
    dq.quantize(model, recipe, progress=False)
    return model


def given(model, step: float, seed: int = 0) -> torch.Tensor:
    """The output for seeded inputs at a step."""
    step, draw = step * (0.001 if "Flux" in type(model).__name__ else 1.0), torch.Generator().manual_seed(seed)
    inputs = zoo.ENTRIES[type(model).__name__].inputs(draw, model.dtype) | {"timestep": torch.full((2,), step)}
    with torch.no_grad():
        return torch.cat([value.float().flatten() for value in zoo.tensors_in(model(**inputs))])


def run(model, steps=STEPS) -> list[torch.Tensor]:
    """Outputs of a run: one input at several steps."""
    return [given(model, step) for step in steps]


def same(a, b) -> list[bool]:
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("name", [PIXART, UNET, FLUX, LATTE])
def test_an_interval_of_one_leaves_every_bit(name):
    assert all(same(run(quantized("int8+interval:1", name)), run(quantized("int8", name))))


@pytest.mark.parametrize("name", [PIXART, FLUX])
def test_a_first_block_threshold_of_zero_leaves_every_bit(name):
    assert all(same(run(quantized("int8+firstblock:0", name)), run(quantized("int8", name))))


@pytest.mark.parametrize("name", [PIXART, FLUX, LATTE])
def test_a_delta_threshold_of_zero_leaves_every_bit(name):
    assert all(same(run(quantized("int8+deltacache:0", name)), run(quantized("int8", name))))


@pytest.mark.parametrize("name", [PIXART, FLUX, LATTE])
def test_a_delta_cache_leaves_two_steps_out_once_two_were_computed(name):
    model, calls = quantized("int8+deltacache:10", name), []
    block = next(iter(parts.blocks(model).values()))
    next(module for module in block.modules() if hasattr(module, "plan")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    counts = []
    for step in (900.0, 800.0, 700.0, 600.0, 500.0, 400.0):
        before = len(calls)
        given(model, step)
        counts.append(len(calls) > before)
    assert counts == [True, True, False, False, True, False]


def test_a_delta_cache_gives_the_last_change_of_each_block():
    model, steps = quantized("int8+deltacache:10"), STEPS[:3]
    block, seen = model.transformer_blocks[0], []
    block.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs.get("hidden_states", *args[:1]), output)), with_kwargs=True
    )
    run(model, steps)
    (_, _), (before, after), (now, given_now) = seen
    assert torch.equal(given_now, now + (after - before))


def test_a_delta_cache_computes_the_first_tenth_of_a_pipelines_steps_and_its_last():
    pipe, calls = tiny.load("tiny-pixart"), []
    dq.quantize(pipe, "int8+deltacache:10", progress=False)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    layer.register_forward_hook(lambda *_: calls.append(len(steps)))
    steps = []
    pipe.transformer.register_forward_hook(lambda *_: steps.append(1))
    tiny.pictures(pipe, "tiny-pixart", ["a red circle"], num_inference_steps=30)
    assert calls[:3] == [0, 1, 2] and calls[3:5] == [5, 8] and calls[-1] == 29
    assert calls == [0, 1, 2, *range(5, 29, 3), 29]


@pytest.mark.parametrize("name", [PIXART, UNET, FLUX, LATTE])
def test_an_interval_runs_attention_and_feed_forward_in_every_nth_step(name):
    model = quantized("int8+interval:2", name)
    calls = []
    inner = next(iter(parts.inner(model).values()))
    deepest = next(module for module in inner.modules() if hasattr(module, "plan"))
    deepest.register_forward_hook(lambda *_: calls.append(1))
    found, plain = run(model), run(quantized("int8", name))
    assert len(calls) == 2 and same(found, plain) == [True, False, True, False]


def test_a_first_block_that_hardly_changes_leaves_the_others_out():
    model = quantized("int8+firstblock:1")
    found, plain = run(model), run(quantized("int8"))
    assert same(found, plain)[0] and not all(same(found, plain))


def test_taylorseer_computes_while_it_warms_and_extrapolates_then():
    steps = tuple(900.0 - 100 * index for index in range(6))
    found, plain = run(quantized("int8+taylorseer:3"), steps), run(quantized("int8"), steps)
    assert same(found, plain)[:3] == [True] * 3 and not all(same(found, plain))


@pytest.mark.parametrize("cache", ["interval:2", "firstblock:1", "taylorseer:3", "deltacache:10"])
def test_a_run_is_the_same_whatever_ran_before_it(cache):
    model = quantized(f"int8+{cache}")
    first = run(model)
    assert all(same(run(model), first)), "the timestep turned back"
    run(model, STEPS[:2])
    model._reset_stateful_cache()
    assert all(same(run(model), first)), "the pipeline said so"


def test_calls_at_one_timestep_are_branches_of_their_own():
    model, steps = quantized("int8+interval:2"), STEPS[:2]
    alone = [run(model, steps), [given(model, step, seed=5) for step in steps]]
    model._reset_stateful_cache()
    for index, step in enumerate(steps):
        for seed, wanted in zip((0, 5), alone, strict=True):
            assert torch.equal(given(model, step, seed), wanted[index])


def test_branches_that_the_pipeline_names_are_followed():
    model = quantized("int8+interval:2", FLUX)
    wanted = run(model)
    model._reset_stateful_cache()
    for index, step in enumerate(STEPS):
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                assert torch.equal(given(model, step), wanted[index])


@pytest.mark.parametrize("cache", ["interval:2", "firstblock:1", "deltacache:10"])
def test_a_cache_is_saved_reloaded_explained_and_switched_off(cache, tmp_path):
    model = quantized(f"int8+{cache}")
    wanted, plain = run(model), run(quantized("int8"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["plan"]["cache"] == cache
    again = type(model).from_pretrained(tmp_path)
    assert all(same(run(again), wanted))
    said = [note for note in dq.explain(again).notes if "cache" in note]
    assert any(cache in note for note in said) and not any("off" in note for note in said)
    dq.set_cache(again, False)
    assert all(same(run(again), plain)) and any("switched off" in note for note in dq.explain(again).notes)
    dq.set_cache(again, True)
    assert all(same(run(again), wanted))
    dq.dequantize(again)
    assert branches.of(again) is None and not hasattr(again, "_reset_stateful_cache")


def test_state_dicts_are_those_without_a_cache():
    with_cache, without = quantized("int8+interval:2").state_dict(), quantized("int8").state_dict()
    assert list(with_cache) == list(without)


def test_a_cached_model_compiles_block_by_block():
    model = quantized("int8+interval:2")
    wanted = run(model)
    torch._dynamo.reset()
    model._reset_stateful_cache()
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    for a, b in zip(run(model), wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    torch._dynamo.reset()


def test_an_offloaded_model_has_its_cache():
    wanted, model = run(quantized("int8+interval:2")), quantized("int8+interval:2")
    here = torch.device("cpu")
    model.enable_group_offload(onload_device=here, offload_device=here, offload_type="leaf_level")
    assert all(same(run(model), wanted))


def test_an_interval_has_no_mates_in_its_batch():
    model, entry = quantized("int8+interval:2"), zoo.ENTRIES[PIXART]

    def rows(keep):
        outputs = []
        for step in STEPS[:2]:
            inputs = entry.inputs(torch.Generator().manual_seed(0), model.dtype) | {"timestep": torch.full((2,), step)}
            inputs = zoo.moved(inputs, torch.device("cpu"))
            cut = {k: _rows(v, keep) for k, v in inputs.items()}
            with torch.no_grad():
                outputs.append(zoo.tensors_in(model(**cut))[0])
        model._reset_stateful_cache()
        return outputs

    for both, alone in zip(rows(slice(0, 2)), rows(slice(0, 1)), strict=True):
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def _rows(value, keep):
    if isinstance(value, torch.Tensor):
        return value[keep]
    return {k: _rows(v, keep) for k, v in value.items()} if isinstance(value, dict) else value


def test_lora_and_a_cache_go_together():
    peft = pytest.importorskip("peft")
    model = quantized("int8+interval:2", FLUX)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    plain = quantized("int8", FLUX)
    plain.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.is_floating_point():
            b.data.copy_(a.data)
    found, wanted = run(model), run(plain)
    assert same(found, wanted) == [True, False, True, False]


def test_diffusers_own_caches_go_on_quantized_models():
    model = quantized("int8", FLUX)
    plain = run(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert all(same(run(model), plain))
    model.disable_cache()
    assert all(same(run(model), plain))


class Bare(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)

    def forward(self, x, timestep=None):
        return self.inner(x)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda: dq.quantize(Bare(), "int8+interval:2"), "Bare has no attention and no feed-forward"),
        (lambda: dq.quantize(Bare(), "int8+firstblock"), "Bare has no list of transformer blocks"),
        (lambda: dq.quantize(Bare(), "int8+deltacache"), "Bare has no list of transformer blocks"),
        (lambda: quantized("int8+firstblock", UNET), "UNet2DConditionModel has no list of transformer blocks"),
        (lambda: quantized("int8+firstblock", LATTE), "spatial and temporal"),
        (lambda: quantized("int8+interval:1.5"), "a whole number from 1"),
        (lambda: quantized("int8+interval:x"), "a whole number from 1"),
        (lambda: cookbook.get("int8+qsched:2"), "cannot be added"),
        (lambda: cookbook.get("int8+interval+firstblock"), "has already"),
        (lambda: dq.set_cache(quantized("int8"), False), "has none in its plan"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(ask, message):
    with pytest.raises(dq.DQError, match=message) as error:
        ask()
    assert "\n" not in str(error.value)


def test_a_refused_cache_leaves_the_model_as_it_was():
    model = zoo.build(UNET)
    with pytest.raises(dq.DQError):
        dq.quantize(model, "int8+firstblock", progress=False)
    assert mark.plan_of(model) is None and branches.of(model) is None


def test_a_cache_of_diffusers_that_is_on_is_not_doubled():
    model = zoo.build(FLUX)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with pytest.raises(dq.DQError, match=r"has a cache on already; call disable_cache\(\)"):
        dq.quantize(model, "int8+interval:2", progress=False)


def test_every_kind_is_found_by_its_file():
    assert {"interval", "firstblock", "taylorseer", "deltacache"} <= caches.files().keys()
    for name, kind in caches.files().items():
        assert caches.parse(name) == (kind, kind.VALUE) and kind.LEAST <= kind.VALUE <= kind.MOST
        assert kind.line(kind.VALUE) and name in cookbook.ADDED
    assert interval.why_not(Bare()) is not None
