"""VQ4DiT and VPTQ: the properties by which one knows that they work, on a small block and on a trained unit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dq
from dq import cookbook, families, methods, planning
from dq.fit import reconstruct
from dq.fit.drafts import draft
from dq.layers import packed_layers
from dq.methods import vptq, vq4dit
from dq.plan import LayerPlan, TensorPlan
from dq.trace import calibration, capture
from dq.trace.seen import LayerSeen, Seen, Unit, UnitCall
from dq.trace.walk import Trace
from pipelines import tiny

WIDTH, INNER = 48, 96
QUICK = {"steps": 120}
PUBLISHED = {"start": "nearest"}


class Block(nn.Module):
    """A norm and two linears around a residual: x (batch, tokens, WIDTH) -> the same."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return 0.1 * x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def block():
    """-> (unit of a random block under vq16x4, what it saw of correlated inputs in 10 calls)."""
    torch.manual_seed(0)
    module = Block().eval()
    shapes = {"block.up": (INNER, WIDTH), "block.down": (WIDTH, INNER)}
    form = TensorPlan.parse("vq16x4")
    unit = Unit("block", module, {name: LayerPlan("linear", shape, form) for name, shape in shapes.items()})
    mix = torch.randn(WIDTH, WIDTH) @ torch.diag(torch.rand(WIDTH) ** 2)
    inputs = [torch.randn(2, 32, WIDTH) @ mix for _ in range(10)]
    rows: dict[str, list] = {name: [] for name in shapes}
    hooks = [
        unit.layer(name).register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].flatten(0, 1)))
        for name in shapes
    ]
    with torch.no_grad():
        calls = [UnitCall((x,), {}, module(x), 0) for x in inputs]
    for hook in hooks:
        hook.remove()
    layers = {}
    for name, parts in rows.items():
        x = torch.cat(parts)
        nothing = torch.zeros(len(x), dtype=torch.int64)
        layers[name] = LayerSeen(x, x, nothing, nothing, gram=x.t() @ x / len(x), source=name)
    return unit, Seen(layers, 1, (), lambda stream: iter(calls))


def unit_error(unit, seen, drafts) -> float:
    """Error of the unit's output over all recorded calls, in units of its power."""
    module, clock = reconstruct.assembled(unit, drafts)
    return reconstruct.measure(module, clock, seen.calls("hat"))


def test_error_falls_from_kmeans_to_a_trained_codebook_to_candidates(block):
    unit, seen = block
    kmeans, book, both = (
        unit_error(unit, seen, vq4dit.fit(unit, seen, {**QUICK, **options}))
        for options in ({**PUBLISHED, "steps": 0}, {**PUBLISHED, "candidates": 1}, PUBLISHED)
    )
    assert both < 0.9 * book < 0.9 * kmeans


def test_vectors_that_make_up_for_others_are_the_better_start(block):
    unit, seen = block
    changes = (PUBLISHED, {"steps": 0}, {})
    near, start, trained = (unit_error(unit, seen, vq4dit.fit(unit, seen, {**QUICK, **each})) for each in changes)
    assert trained < near and trained < 0.7 * start


def test_the_entry_that_leads_is_a_candidate_once():
    codes = torch.tensor([[3, 5], [4, 6], [7, 8]])
    assert vq4dit._led(torch.tensor([3, 6, 9]), codes).tolist() == [[3, 5], [6, 4], [9, 7]]
    assert vq4dit._led(torch.tensor([3, 6, 9]), codes[:, :1]).tolist() == [[3], [6], [9]]


def test_one_candidate_is_left_without_a_jump(block, monkeypatch):
    unit, seen = block
    jumps, shares = [], []

    class Watched(vq4dit.Candidates):
        def penalty(self, progress):
            if progress < vq4dit.SETTLED or jumps:
                return super().penalty(progress)
            drafts = dict(zip(unit.layers, (each.made for each in self.blends), strict=True))
            before = unit_error(unit, seen, drafts)
            found = super().penalty(progress)
            jumps.append(unit_error(unit, seen, drafts) / before)
            return found

        def harden(self):
            shares.extend(self.decided)
            super().harden()

    monkeypatch.setattr(vq4dit, "Candidates", Watched)
    made = vq4dit.fit(unit, seen, {})
    assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == 1
    assert shares[int(vq4dit.SETTLED * len(shares)) - 1] > 0.9, "the penalty decides, not the end"
    assert jumps[0] < 1.05
    for found in made.values():
        assert found.soft is None
        assert torch.equal(found.pack(torch.float32).dense_weight(), found.weight)


@pytest.mark.parametrize("method", [vq4dit, vptq], ids=lambda method: method.__name__)
def test_what_was_fitted_depends_on_the_seed_alone(block, method):
    unit, seen = block
    options = {"steps": 5} if method is vq4dit else {}
    first, same, other = (method.fit(unit, each, options) for each in (seen, seen, replace(seen, seed=1)))
    for name, found in first.items():
        assert torch.equal(found.weight, same[name].weight) and not torch.equal(found.weight, other[name].weight)


def test_training_that_does_not_help_leaves_kmeans(block, monkeypatch):
    unit, seen = block
    wild = lambda self, lr: [{"params": [each.book], "lr": 1.0} for each in self.blends]  # noqa: E731
    monkeypatch.setattr(vq4dit.Candidates, "parameters", wild)
    made, start = vq4dit.fit(unit, seen, {"steps": 3}), vq4dit.fit(unit, seen, {"steps": 0})
    for name, found in made.items():
        assert torch.equal(found.weight, start[name].weight) and found.soft is None
        assert torch.equal(found.scales[0].table, start[name].scales[0].table)


def test_compensation_beats_the_nearest_entries(block):
    unit, seen = block
    made, plain = (vptq.fit(unit, seen, options) for options in ({}, {"compensate": False}))
    assert unit_error(unit, seen, made) < 0.8 * unit_error(unit, seen, plain)


def test_layers_of_other_formats_are_left_out(block):
    unit, seen = block
    plans = {**unit.layers, "block.up": replace(unit.layers["block.up"], weight=TensorPlan.parse("int8/channel"))}
    for method, options in ((vq4dit, {"steps": 0}), (vptq, {})):
        assert set(method.fit(replace(unit, layers=plans), seen, options)) == {"block.down"}


@pytest.mark.parametrize("recipe", ["vq4dit-w2", "vq4dit-w3", "vptq-w2"])
def test_a_quantized_model_comes_back_to_the_bit(recipe, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    fresh, x, wanted = copy.deepcopy(model), torch.randn(64, 64), cookbook.get(recipe)
    wanted = replace(wanted, options={"steps": 2}) if wanted.method == "vq4dit" else wanted
    report = dq.quantize(model, wanted, calibration=lambda each: each(x), progress=False)
    assert {layer.plan.weight.spec.span for layer in packed_layers(model).values()} == {2 if "w3" in recipe else 4}
    assert report.bytes_after == sum(value.nbytes for value in model.parameters())
    dq.save(model, tmp_path / "saved")
    dq.load(tmp_path / "saved", fresh)
    assert torch.equal(fresh(x), model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-pixart", "tiny-sd"])
def test_each_part_of_both_systems_helps_on_a_trained_unit(name, tmp_path):
    """VQ4DiT: int2 to nearest, k-means, a trained codebook, candidates. VPTQ: without and with compensation."""
    pipe, wish = tiny.load(name), cookbook.get("vq4dit-w2")
    model = getattr(pipe, "unet", None) or pipe.transformer
    call = {key: value for key, value in tiny.CALL[name].items() if key != "num_inference_steps"}
    prompts = [caption for caption, _ in tiny.prompts(4)]
    wanted = calibration.Calibration(prompts=prompts, steps=4, samples=16, policy="all", call_kwargs=call)
    capture.capture(pipe, {"model": model}, wanted, tmp_path, progress=False)
    plan = methods.prepared(model, planning.make_plan(model, wish), wish)
    home = {"tiny-pixart": "transformer_blocks.5.", "tiny-sd": "up_blocks.2.resnets.0."}[name]
    plan.layers = {each: row for each, row in plan.layers.items() if each.startswith(home) and row.weight.spec.tabled}
    trace = Trace(model, plan, families.of(model), tmp_path / "model")
    for unit in trace.units:
        seen = trace.observe(unit, vq4dit.NEEDS)
        if unit.layers:
            break
        trace.skip(unit)
    seen = replace(seen, calls={stream: list(seen.calls(stream)) for stream in ("full", "hat")}.__getitem__)
    int2 = TensorPlan.parse("int2/channel")
    plain = {each: draft(unit.layer(each), replace(row, weight=int2)) for each, row in unit.layers.items()}
    changes = ({**PUBLISHED, "steps": 0}, {**PUBLISHED, "candidates": 1}, PUBLISHED, {})
    stages = [vq4dit.fit(unit, seen, options) for options in changes]
    errors = [unit_error(unit, seen, made) for made in (plain, *stages)]
    assert errors == sorted(errors, reverse=True), errors
    nearest, second = (unit_error(unit, seen, vptq.fit(unit, seen, {"compensate": on})) for on in (False, True))
    assert second < 0.8 * nearest, (second, nearest)
    print(name, errors, nearest, second)
