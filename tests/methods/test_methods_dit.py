"""Methods of transformers: the properties by which one knows that they work, on one unit of each embedded model."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from dq import cookbook, families, layers, methods, planning
from dq.fit import groups, levels, reconstruct, rounding, smooth
from dq.fit.drafts import draft
from dq.layers import hadamard
from dq.methods import comq, gptq, lrqdit, squeezellm, svdquant, viditq
from dq.plan import LayerPlan, TensorPlan
from dq.trace import calibration, capture
from dq.trace.seen import LayerSeen, Needs, Seen, Unit
from dq.trace.walk import Trace
from pipelines import tiny

UNITS = {"tiny-sd": "up_blocks.2.resnets.0", "tiny-pixart": "transformer_blocks.5"}
RECIPES = (*svdquant.RECIPES, *gptq.RECIPES, *comq.RECIPES, *viditq.RECIPES, *lrqdit.RECIPES, *squeezellm.RECIPES)
LEFT = re.compile("to_out|attn2.to_q")  # in full precision, to save time
EVERYTHING = Needs(rows=2048, gram=True, absmax=True, calls=True, hat=False)  # what the methods ask for
EXACT = TensorPlan.parse("int8/group:1")  # a scale for each weight: rounding leaves fp32's own error
# a unit's error as a share of that of plain rounding, on prompts that nothing was fitted to; ViDiT-Q moves no weight
WORST = {
    "svdquant-nvfp4": 0.8,
    "svdquant-int8": 0.6,
    "viditq-w8a8": 0.8,
    "viditq-w4a8": 0.98,
    "viditq-mp-w4a8": 0.9,
    "viditq-mp-w4a6": 0.9,
}
WORST |= {"lrqdit-w3a4": 0.75, "lrqdit-w4a4": 0.95, "squeezellm-w3": 0.6}  # plain: NormalFloat's table in every row
WORST |= {"comq-int4-weight": 0.6, "comq-w4a8": 0.6}  # one weight at a time: behind GPTQ
every_model = pytest.mark.parametrize("name", UNITS)
every_recipe = pytest.mark.parametrize("recipe", [recipe.name for recipe in RECIPES])


@pytest.fixture(scope="module")
def models():
    pipes = {name: tiny.load(name) for name in UNITS}
    return {name: (pipe, getattr(pipe, "unet", None) or pipe.transformer) for name, pipe in pipes.items()}


@pytest.fixture(scope="module")
def observed(models, tmp_path_factory):
    """observed[model] -> (unit, what it saw in 4 calls of one prompt, 4 calls of another prompt)."""
    found = {}
    for name in UNITS:
        sides = [observe(name, *models[name], turn, tmp_path_factory.mktemp(name)) for turn in range(2)]
        found[name] = (*sides[0], sides[1][1].calls("full"))
    return found


def observe(name, pipe, model, turn, folder):
    """(unit, seen) of the model's unit while it draws the turn-th prompt."""
    call = {key: value for key, value in tiny.CALL[name].items() if key != "num_inference_steps"}
    prompt = tiny.prompts(2)[turn][0]
    wanted = calibration.Calibration(prompts=[prompt], steps=4, samples=4, policy="all", seed=turn, call_kwargs=call)
    capture.capture(pipe, {"model": model}, wanted, folder, progress=False)
    plan = planning.make_plan(model, cookbook.get("svdquant-int4"))
    plan.layers = planned(name, model, "svdquant-int4")
    trace = Trace(model, plan, families.of(model), folder / "model")
    for unit in trace.units:
        if unit.layers:
            seen = trace.observe(unit, EVERYTHING)
            return unit, replace(seen, calls={"full": list(seen.calls("full"))}.__getitem__)
        trace.skip(unit)
    raise AssertionError(f"no unit of {name} has planned layers")


def planned(name, model, recipe):
    """The recipe's plans of the unit's layers."""
    rows = planning.make_plan(model, cookbook.get(recipe)).layers
    return {
        layer: row for layer, row in rows.items() if layer.startswith(f"{UNITS[name]}.") and not LEFT.search(layer)
    }


@pytest.fixture(scope="module")
def fitted(models, observed):
    """fitted(model, recipe, **options) -> (unit, seen, drafts); cached."""
    cache = {}

    def fit(name: str, recipe: str, **options):
        key = (name, recipe, str(options))
        if key not in cache:
            unit, seen, _ = observed[name]
            unit, wanted = replace(unit, layers=planned(name, models[name][1], recipe)), cookbook.get(recipe)
            made = methods.files()[wanted.method].fit(unit, seen, {**wanted.options, **options})
            cache[key] = (unit, seen, made)
        return cache[key]

    return fit


def unit_error(unit, drafts, calls) -> float:
    """Error of the unit's output, in units of its power."""
    module, clock = reconstruct.assembled(unit, drafts)
    return reconstruct.measure(module, clock, calls)


def plain(unit) -> dict:
    """Plain rounding in the same formats."""
    return {name: draft(unit.layer(name), row) for name, row in unit.layers.items()}


@torch.no_grad()
@every_recipe
@every_model
def test_drafts_are_whole_and_ship_as_they_are(name, recipe, fitted):
    unit, seen, made = fitted(name, recipe)
    assert set(made) == set(unit.layers)
    for layer, found in made.items():
        found.plan.check(layer)
        assert LayerPlan.from_dict(layer, found.plan.to_dict()) == found.plan, "the plan survives its JSON"
        assert found.plan.weight == unit.layers[layer].weight, "the weight format is the recipe's"
        packed, x = found.pack(torch.float32), seen.layers[layer].hat[:2]
        assert torch.allclose(packed(x), found(x), atol=1e-3 * float(found(x).abs().max()))


@every_recipe
@every_model
def test_a_unit_is_nearer_to_full_precision_than_by_plain_rounding(name, recipe, fitted, observed):
    unit, _, made = fitted(name, recipe)
    new = observed[name][2]
    assert unit_error(unit, made, new) < WORST.get(recipe, 0.5) * unit_error(unit, plain(unit), new)


@pytest.mark.parametrize("recipe", [recipe.name for recipe in svdquant.RECIPES])
@every_model
def test_the_low_rank_branch_takes_at_most_its_share_of_the_bytes(name, recipe, fitted):
    _, _, made = fitted(name, recipe)
    ranks, unit = [], cookbook.get(recipe).options["multiple"]
    for layer, found in made.items():
        sizes = {key: value.nbytes for key, value in found.pack(torch.float32).named_parameters() if key != "bias"}
        branch = sizes.get("proj_down", 0) + sizes.get("proj_up", 0)
        fewest = unit > 1 and found.plan.rank == unit  # of operators that take no fewer columns
        assert branch <= 0.15 * sum(sizes.values()) or fewest, layer
        assert found.plan.rank % unit == 0 or found.plan.kind != "linear"
        assert bool(found.plan.rank) == bool(branch)
        ranks.append(found.plan.rank)
    assert max(ranks) >= 1


@every_model
def test_the_branch_earns_its_bytes(name, fitted, observed):  # SVDQuant: smoothing alone leaves more
    unit, _, made = fitted(name, "svdquant-int4")
    _, _, without = fitted(name, "svdquant-int4", rank=0)
    assert all(found.plan.rank == 0 for found in without.values())
    new = observed[name][2]
    assert unit_error(unit, made, new) < unit_error(unit, without, new)


@pytest.mark.parametrize("recipe", ["svdquant-int4", "viditq-w8a8", "viditq-w4a8"])
@every_model
def test_the_transforms_that_were_chosen_change_nothing_by_themselves(name, recipe, fitted, observed):  # ViDiT-Q
    unit, _, made = fitted(name, recipe)
    exact, changed = {}, 0
    for layer, found in made.items():
        plan = replace(unit.layers[layer], weight=EXACT, act=None)
        vector = None if found.smooth is None else found.smooth.detach()
        exact[layer] = smooth.transformed(unit.layer(layer), plan, smooth.Transform(vector, rotate=found.plan.rotate))
        changed += found.smooth is not None or found.plan.rotate > 0
    assert changed
    assert unit_error(unit, exact, observed[name][2]) < 1e-9


@pytest.mark.parametrize("recipe", ["svdquant-int4", "svdquant-nvfp4", "viditq-w4a8"])
def test_queries_keys_and_values_are_transformed_once(recipe, fitted):
    _, _, made = fitted("tiny-pixart", recipe)
    block = UNITS["tiny-pixart"]
    for group in (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")):
        first, *others = (made[f"{block}.{key}"] for key in group)
        for other in others:
            assert (first.plan.rotate, first.plan.act, first.plan.smooth) == (
                other.plan.rotate,
                other.plan.act,
                other.plan.smooth,
            )
            assert first.smooth is None or torch.equal(first.smooth, other.smooth)


@torch.no_grad()
def test_transformed_inputs_are_more_even(fitted):  # ViDiT-Q: incoherence, the loudest channel over the mean
    _, seen, made = fitted("tiny-pixart", "viditq-w8a8")
    before, after = [], []
    for layer, found in made.items():
        if found.smooth is None and not found.plan.rotate:
            continue
        x = seen.layers[layer].x
        for value, into in ((x, before), (found.transform(x), after)):
            size = value.abs()
            into.append(float((size.amax(-1) / size.mean(-1)).mean()))
    assert len(after) >= 4 and sum(after) < 0.8 * sum(before)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["viditq-w8a8", "viditq-w4a8", "svdquant-int4", "svdquant-nvfp4", "gptq-w4a8"])
@every_model
def test_no_guidance_branch_depends_on_the_other(name, recipe, fitted, observed):  # ViDiT-Q: to the bit
    unit, _, made = fitted(name, recipe)
    packed = {id(unit.layer(layer)): found.pack(torch.float32) for layer, found in made.items()}
    module = copy.deepcopy(unit.module, packed).eval()
    assert any(isinstance(layer, layers.PackedLinear) for layer in module.modules())
    call = observed[name][2][0]
    whole = module(*call.args, **call.kwargs)
    assert whole.shape[0] == 2
    for kept in (0, 1):

        def louder(value, other=1 - kept):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape[0] % 2:
                return value
            changed = value.clone()
            half = value.shape[0] // 2
            changed[other * half : (other + 1) * half] *= 37.0
            return changed

        args = [louder(value) for value in call.args]
        changed = module(*args, **{key: louder(value) for key, value in call.kwargs.items()})
        assert torch.equal(changed[kept], whole[kept]) and not torch.equal(changed[1 - kept], whole[1 - kept])


@every_model
def test_weights_that_the_output_depends_on_are_nearer(name, fitted, observed):  # SqueezeLLM: weighted, plain, uniform
    unit, _, made = fitted(name, "squeezellm-w3")
    alike, new = fitted(name, "squeezellm-w3", count="")[2], observed[name][2]
    assert unit_error(unit, made, new) < 0.95 * unit_error(unit, alike, new)
    tabled = [layer for layer, row in unit.layers.items() if row.weight.spec.tabled]
    found = squeezellm.fisher(unit, observed[name][1], tabled)
    assert list(found) == tabled
    for layer, count in found.items():
        weight, plan = made[layer].unrounded().flatten(1), made[layer].plan
        even = [levels.stored(levels.uniform(levels.Rows(weight, count), plan.weight.spec.bits))]
        losses = [
            (rounding.on_grid(weight, plan, scales) - weight).square() @ count
            for scales in (made[layer].scales, alike[layer].scales, even)
        ]
        assert losses[0].sum() < losses[1].sum() < losses[2].sum(), layer


@every_model
def test_grids_of_logarithms_beat_even_ones(name, fitted, observed):  # LRQ-DiT: its grids switched off
    for recipe in ("lrqdit-w3a4", "lrqdit-w4a4"):
        unit, _, made = fitted(name, recipe)
        even, new = fitted(name, recipe, log=False)[2], observed[name][2]
        assert unit_error(unit, made, new) < unit_error(unit, even, new)
        for layer, found in made.items():
            if found.plan.weight.spec.tabled:
                assert not torch.equal(found.scales[0].table, even[layer].scales[0].table)


def salient(shared: smooth.Shared) -> smooth.Shared:
    """The same layers, 4 channels of their input 100 times louder, all so that its rms is 1.5 once smoothed."""
    found, times = shared, torch.ones(shared.plan.shape[1])
    times[:: len(times) // 4] = 100
    for _ in range(2):
        louder = replace(shared.seen, x=shared.seen.x * times, absmax=shared.seen.absmax * times)
        found = smooth.Shared(shared.plans, shared.modules, louder)
        times = times * (1.5 / lrqdit.rms(found)) ** 2  # smoothing takes the root of it
    return found


def test_salient_inputs_are_rotated_in_wider_blocks(fitted, observed):  # LRQ-DiT: its rule
    unit, seen, made = fitted("tiny-pixart", "lrqdit-w4a4")
    for shared in groups.shared(unit, seen):
        if not shared.plan.weight.spec.tabled:
            continue
        assert lrqdit.rms(shared) < lrqdit.SALIENT and all(made[name].plan.rotate == 128 for name in shared.plans)
        loud, width = salient(shared), shared.plan.shape[1]
        assert lrqdit.rms(loud) == pytest.approx(1.5, rel=1e-3)
        found = lrqdit.transform(loud, True)
        assert found.rotate == width > 128 and found.smooth is not None
        assert lrqdit.transform(shared, False).rotate == lrqdit.transform(loud, False).rotate == 0
    turned, still = made, fitted("tiny-pixart", "lrqdit-w4a4", rotate=False)[2]
    new = observed["tiny-pixart"][2]
    assert unit_error(unit, turned, new) < 0.8 * unit_error(unit, still, new)


@torch.no_grad()
def test_a_wide_rotation_spreads_salient_channels_further(fitted):  # LRQ-DiT: dual rotation, 4 channels at 100 times
    unit, seen, _ = fitted("tiny-pixart", "lrqdit-w4a4")
    shared = salient(next(each for each in groups.shared(unit, seen) if each.plan.shape[1] == 1024))
    (name,), x, change = shared.plans, shared.seen.x, lrqdit.transform(shared, True)
    y, errors, peaks = unit.layer(name)(x), [], []
    for order in (change.rotate, 128, 0):
        plan = replace(shared.plans[name], weight=EXACT)
        found = smooth.transformed(unit.layer(name), plan, replace(change, rotate=order))
        errors.append(float((found(x) - y).square().sum()))
        peaks.append(float(found.transform(x).abs().max()))
    assert errors[0] < errors[1] < 0.5 * errors[2] and peaks[0] < peaks[1] < peaks[2], (errors, peaks)


def test_one_wide_rotation_is_two_of_blocks_with_channels_dealt_between():
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    dealt = hadamard.rotate(x, 64).reshape(8, 16, 64).transpose(1, 2).flatten(1)
    twice = hadamard.rotate(dealt, 16).reshape(8, 64, 16).transpose(1, 2).flatten(1)
    assert torch.allclose(hadamard.rotate(x, 1024), twice, atol=1e-5)


def test_maxima_are_those_of_the_noisiest_quarter_of_steps():  # ViDiT-Q: where channels are least even
    x = torch.ones(4, 3)
    absmax = torch.ones(8, 2, 3)
    absmax[:, :, 0] = torch.arange(2.0, 10.0)[:, None]
    seen = LayerSeen(x, x, torch.zeros(4), torch.zeros(4), absmax=absmax)
    assert viditq._early(seen, rising=False).absmax[:, 0, 0].tolist() == [8, 9], "large timesteps are noisy ..."
    assert viditq._early(seen, rising=True).absmax[:, 0, 0].tolist() == [2, 3], "... unless they rise along the run"
    unseen = replace(seen, absmax=torch.cat([absmax[:6], torch.zeros(2, 2, 3)]))
    assert viditq._early(unseen, False).absmax[:, 0, 0].tolist() == [6, 7], "steps never recorded tell nothing"
    assert viditq._early(replace(seen, absmax=absmax[:1]), False).absmax.shape[0] == 1


@every_model
def test_coordinate_descent_beats_nearest_under_the_same_scales(name, fitted, observed):  # COMQ
    unit, _, made = fitted(name, "comq-w4a8")
    _, _, nearest = fitted(name, "comq-w4a8", sweeps=0)
    new = observed[name][2]
    assert unit_error(unit, made, new) < 0.8 * unit_error(unit, nearest, new)


def correlated(count, seed, spread):
    """(count, 64) rows; spread 0: channels are independent, 1: all lie near 8 directions."""
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(99))
    make = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, 8, generator=make) @ mix + (1.1 - spread) * torch.randn(
        count, 64, generator=make
    )


@torch.no_grad()
@pytest.mark.parametrize(("spread", "least", "most"), [(1.0, 0.0, 0.5), (0.0, 0.8, 1.2)])
def test_gptq_gains_where_inputs_are_correlated_and_only_there(spread, least, most):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    plan = LayerPlan("linear", (32, 64), TensorPlan.parse("int4/group:64"))
    x, new = correlated(2000, 1, spread), correlated(1000, 2, spread)
    gram = x.t() @ x / len(x)
    none = torch.zeros(len(x), dtype=torch.long)
    seen = Seen({"layer": LayerSeen(x, x, none, none, gram=gram)}, 1, (), lambda stream: iter(()))
    made = gptq.fit(Unit("layer", layer, {"layer": plan}), seen, {})["layer"]
    errors = [float((rounded(new) - layer(new)).square().mean()) for rounded in (made, draft(layer, plan))]
    assert least <= errors[0] / errors[1] <= most


def test_weight_only_layers_are_left_unsmoothed(fitted):
    """A transform at run time would cost time and gain nothing for activations that are never rounded."""
    for recipe in ("svdquant-int4", "viditq-w4a8", "gptq-int4-weight"):
        unit, _, made = fitted("tiny-sd", recipe)
        weight_only = [found for layer, found in made.items() if unit.layers[layer].act is None]
        assert weight_only
        assert all(found.smooth is None and not found.plan.rotate and not found.plan.rank for found in weight_only)


def test_layers_that_saw_nothing_are_left_to_the_walk(observed):
    unit, seen, _ = observed["tiny-pixart"]
    first = next(iter(unit.layers))
    unit = replace(unit, layers={first: unit.layers[first]})
    for method in (svdquant, gptq, comq, viditq):
        options = {"rank": 4, "share": 0.13}
        assert method.fit(unit, replace(seen, layers={}), options) == {}
        assert list(method.fit(unit, seen, options)) == [first]
