"""Rows of the table of methods: honest baselines, runs that go on where they stopped, no test prompt calibrated on."""

import argparse
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

import dq
from dq import cookbook, disk, planning
from dq.plan import LayerPlan, Plan, Recipe, TensorPlan
from eval.experiments import calibration_time, methods, rows, tables, versions
from pipelines import tiny

W4A4 = Recipe("stand-in", ("int4/group:64", "int4/group:64"), ("int4/group:64", "int8a/tensor"))
PARSE = TensorPlan.parse


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Results and work files in a temporary folder, short draws, a data-free recipe in place of a calibrated one."""
    monkeypatch.setattr(methods, "FILE", tmp_path / "methods.json")
    monkeypatch.setattr(methods, "WORK", tmp_path / "work")
    monkeypatch.setitem(cookbook.RECIPES, W4A4.name, W4A4)
    more = methods.Entry("more", W4A4.name, plain=True, weights=methods.INT4_MORE)
    monkeypatch.setattr(methods, "ENTRIES", (*methods.with_plain(W4A4.name), more))
    for name in tiny.NAMES:
        monkeypatch.setitem(tiny.CALL[name], "num_inference_steps", 3)
    return tmp_path


def options(**changes):
    given = {"models": ["tiny-pixart"], "rows": None, "prompts": 2, "seed": 1, "again": False, "list": False}
    return argparse.Namespace(**(given | changes))


def run():
    return methods.run(options(), methods.ENTRIES, methods.FILE, methods.measure)


def test_rows_are_measured_once_and_say_everything(place, monkeypatch):
    assert run() == {}
    found = {row["row"]: row for row in rows.read(methods.FILE)}
    assert list(found) == [W4A4.name, "plain of stand-in", "more"]
    row = found[W4A4.name]
    assert row["bits"] == "W4A4" and row["branch_share"] == 0 and row["noise_sqnr_early_db"] > 5
    assert found["plain of stand-in"]["psnr_db"] == row["psnr_db"], "the stand-in has nothing fitted"
    assert found["more"]["noise_sqnr_late_db"] > row["noise_sqnr_late_db"] and found["more"]["bytes"] >= row["bytes"]
    wanted = {
        "seed",
        "commit",
        "machine",
        "kernels",
        "seconds",
        "weights",
        "version",
        "feature_distance",
        "candidates",
    }
    assert wanted <= set(row)
    monkeypatch.setattr(methods, "measure", None)
    assert run() == {}, "nothing is left to measure"
    lines = tables.methods(list(found.values()))
    assert "does not beat plain of stand-in: no reason known" in lines[-1]


def test_an_entry_that_fails_leaves_the_others(place, monkeypatch):
    broken = methods.Entry("broken", "no-such-recipe")
    monkeypatch.setattr(methods, "ENTRIES", (broken, *methods.ENTRIES))
    monkeypatch.setattr(methods, "measure", lambda *args: {"psnr_db": 0.0, "caption_accuracy": 0.0})
    failed = run()
    assert list(failed) == ["tiny-pixart broken"] and "no-such-recipe" in failed["tiny-pixart broken"]
    assert len(rows.read(methods.FILE)) == 3


def test_a_row_taken_by_another_process_is_left_to_it(place):
    code = f"""
import sys, pathlib
from eval.experiments import methods
methods.WORK = pathlib.Path({str(methods.WORK)!r})
with methods.claimed("tiny-pixart stand-in"):
    print("holding", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "holding\n"
        with methods.claimed("tiny-pixart stand-in", wait=False) as mine:
            assert not mine
        with methods.claimed("tiny-pixart more", wait=False) as mine:
            assert mine
        other.stdin.close()
    with methods.claimed("tiny-pixart stand-in", wait=False) as mine:
        assert mine, "free again when its process has ended"


LAYER = LayerPlan(
    "linear", (128, 128), PARSE("int4/group:64"), PARSE("int4/group:64"), smooth=True, rotate=64, rank=8, reason="x"
)
FINAL = Plan(
    {
        "a": LAYER,
        "table": replace(LAYER, act=PARSE("int8/tensor/table/0.5"), rotate=0, splits=(64,), steps=3),
        "conv": LayerPlan("conv2d", (64, 64, 3, 3), PARSE("int4/group:64"), PARSE("int8/tensor/static")),
        "weight-only": LayerPlan("linear", (128, 128), PARSE("int8/channel")),
    },
    kept={"edge": "final layer"},
    edges=(1.0, 2.0),
)


def test_a_derived_plan_keeps_formats_and_drops_all_that_is_fitted():
    plain = methods.derived(FINAL, "plain")
    assert plain.kept == FINAL.kept and plain.edges == () and list(plain.layers) == list(FINAL.layers)
    assert plain.layers["a"] == LayerPlan("linear", (128, 128), PARSE("int4/group:64"), PARSE("int4/group:64"))
    assert str(plain.layers["table"].act) == "int8/token" and plain.layers["table"].steps == 1
    assert str(plain.layers["conv"].act) == "int8/tensor" and plain.layers["weight-only"].act is None
    for name, layer in plain.layers.items():
        layer.check(name)


def test_a_derived_plan_takes_other_weights_for_four_bit_layers_only():
    wider = methods.derived(FINAL, "wider", "int5/group:64")
    assert [str(layer.weight) for layer in wider.layers.values()] == ["int5/group:64"] * 3 + ["int8/channel"]
    assert methods.packed_bytes(wider) > methods.packed_bytes(methods.derived(FINAL, "plain"))


def test_a_derived_plan_takes_other_formats_of_weights_and_activations():
    changed = methods.derived(FINAL, "changed", formats={"int4": "fp4", "int8": "fp8"}).layers
    assert [str(layer.weight) for layer in changed.values()] == ["fp4/group:64"] * 3 + ["fp8/channel"]
    assert [str(layer.act) for layer in changed.values()] == ["fp4/group:64", "fp8/token", "fp8/tensor", "None"]


def test_baselines_with_the_bytes_of_the_branch_take_at_least_those(place):
    model, entry = "tiny-pixart", methods.ENTRIES[-1]
    base = planning.make_plan(tiny.load(model).transformer, W4A4)
    for rank in (2, 8):
        final = replace(base, layers={k: replace(v, rank=rank if v.act else 0) for k, v in base.layers.items()})
        disk.write(methods.plan_file(model, entry), final.save)
        plan = methods.plain_plan(model, entry, options())
        assert methods.packed_bytes(plan) >= methods.packed_bytes(final) > methods.packed_bytes(base)


def test_bytes_of_a_plan_are_those_of_the_packed_layers():
    model = tiny.load("tiny-sd").unet
    plan = planning.make_plan(model, W4A4)
    plan.layers = {name: replace(layer, rank=2 if layer.act else 0) for name, layer in plan.layers.items()}
    dq.quantize(model, plan, progress=False)
    layers = dq.layers.packed_layers(model)
    named = [(name, p) for layer in layers.values() for name, p in layer.named_parameters(recurse=False)]
    assert methods.packed_bytes(plan) == sum(p.numel() * p.element_size() for name, p in named if name != "bias")
    branch = sum(p.numel() * p.element_size() for name, p in named if name.startswith("proj"))
    assert methods.branch_share(layers) == pytest.approx(branch / sum(p.numel() * p.element_size() for _, p in named))


def test_bits_name_convolutions_apart():
    assert methods.bits(FINAL.layers) == "W4A4, convolutions W4A8"
    assert methods.bits({"a": LAYER}) == "W4A4"
    assert methods.bits({"a": replace(LAYER, act=None)}) == "W4"


def test_calibration_prompts_are_none_of_the_evaluation(monkeypatch):
    monkeypatch.setattr(methods.dq, "Calibration", lambda **given: given, raising=False)
    given = methods.calibration(
        "tiny-pixart", methods.Entry("x", "x", calibration={"policy": "all"}), options(prompts=256)
    )
    asked = {caption for caption, _ in tiny.prompts(256, seed=1)}
    assert len(set(given["prompts"])) == methods.CALIBRATION_PROMPTS and not asked & set(given["prompts"])
    assert given["policy"] == "all" and given["samples"] == 128 and given["steps"] == 20
    assert "num_inference_steps" not in given["call_kwargs"] and given["call_kwargs"]["height"] == 64


def test_the_version_follows_code_and_options_but_not_comments(tmp_path):
    path, other = tmp_path / "x.py", tmp_path / "y.py"

    def version():
        return versions.crc(versions.code([path, other]))

    path.write_text(
        '"""Doc."""\nimport os\n\n\ndef f():\n    """Doc."""\n    import re\n\n    return 1  # one\n\n\nA = 1\n'
    )
    before = version()
    path.write_text("A = 1\n\n\ndef f():\n    return 1\n")
    assert version() == before and "Doc" not in versions.code([path])
    path.write_text("A: int = 1\n\n\ndef f() -> int:\n    return 1\n")
    assert version() != before, "a name became a field"
    path.write_text("A = 1\n\n\ndef f() -> int:\n    return 1\n")
    assert version() == before
    path.write_text("import sys\n\nA = 1\n")
    other.write_text("def f():\n    return 1\n")
    assert version() == before, "the file was cut in two"
    path.write_text("A = 2\n")
    assert version() != before
    entry = methods.Entry("int8", "int8")
    assert methods.version(entry) == methods.version(replace(entry, against="x"))
    assert methods.version(entry) != methods.version(replace(entry, options={"a": 1}))
    names = {path.name for path in versions.sources(methods.roots(""))}
    assert {"integer.py", "torchops.py", "packed.py", "plan.py"} <= names and "commands.py" not in names


@pytest.fixture(scope="module")
def wide():
    return calibration_time.build(1, torch.bfloat16, "cpu")


def test_every_linear_of_a_block_has_loud_input_channels(wide):
    loud = {}

    def look(name):
        def keep(module, args):
            most = args[0].float().flatten(0, -2).abs().amax(0)
            loud[name] = int((most > 5 * most.median()).sum())

        return keep

    block = wide.transformer_blocks[0]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    hooks = [module.register_forward_pre_hook(look(name)) for name, module in linears.items()]
    with torch.no_grad():
        out = calibration_time.Loop.call(
            wide, torch.randn(1, 4, 64, 64).bfloat16(), torch.randn(1, 300, 4096).bfloat16(), 500
        )
    for hook in hooks:
        hook.remove()
    assert len(loud) == 10 and out.isfinite().all()
    for name, count in loud.items():
        assert 1 <= count <= 0.02 * linears[name].in_features, (name, count)


def test_the_loop_makes_the_calls_it_promises_the_same_each_time():
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, latents, encoder_hidden_states, timestep, added_cond_kwargs):
            seen.append((latents, encoder_hidden_states, timestep.item()))
            return argparse.Namespace(sample=latents)

    for _ in range(2):
        calibration_time.Loop(2, 4)(Model(1, 1))
    assert len(seen) == 16 and [row[2] for row in seen[:4]] == [999, 749, 499, 249]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(seen[:8], seen[8:], strict=True))
    assert seen[0][0].shape == (1, 4, 64, 64) and seen[0][1].shape == (1, 300, 4096)


def test_the_watch_charges_the_innermost_function_of_dq(monkeypatch):
    def wait_in_dq(seconds):
        time.sleep(seconds)

    code = wait_in_dq.__code__.replace(co_filename=f"{calibration_time.DQ}/fit/lowrank.py", co_qualname="factors")
    wait_in_dq.__code__ = code
    with calibration_time.Watch(0.005) as watch:
        wait_in_dq(0.3)
        time.sleep(0.1)
    shares = watch.seconds(0.4)
    assert 0.2 < shares["fit.lowrank.factors"] < 0.4 and shares["outside of dq"] > 0
    assert not watch.thread.is_alive() and threading.active_count() >= 1
    assert watch.passes(0.4)["fit.lowrank.factors"] == shares["fit.lowrank.factors"]


def test_the_table_of_budgets_has_means_ranges_and_gains():
    def row(way, seed, decibels):
        return {"model": "m", "budget": "int4", "way": way, "calibration_seed": seed, "psnr_db": decibels} | {
            "bytes": 99,
            "limit": 100,
        }

    found = [row("one format", 0, 30.0), row("mixed", 0, 32.0), row("mixed", 1, 33.0), row("random", 0, 25.0)]
    found += [row("one format, GPTQ", 0, 35.0), row("mixed, GPTQ", 0, 36.0)]
    text = tables.budgets(found)[-1]
    nearest = "30.0 dB | 32.5 dB, 32.0 to 33.0 (+2.5) |  | 25.0 dB (-5.0)"
    assert text == f"| m | int4 | {nearest} | 35.0 dB | 36.0 dB (+1.0) | 99.0 % |"
