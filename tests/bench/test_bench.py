"""Benchmarks do what they say: turns, roofline arithmetic, missing peers, rows and tables. No test of a speed."""

import argparse
import json
import sys
from dataclasses import replace

import pytest
import torch

import dq
from dq import cli, cookbook, kernels, layers
from dq.bench import layers as bench
from dq.bench import peers, race, roofline, widths
from dq.errors import DQError
from dq.fusions import attention
from dq.kernels.cpu import attention as cpu
from dq.plan import LayerPlan, TensorPlan
from eval.experiments import peers as eval_peers
from eval.experiments import rows, tables
from eval.experiments import speed as eval_bench

PARSE = TensorPlan.parse
W8A8 = LayerPlan("linear", (64, 128), PARSE("int8/channel"), PARSE("int8/token"))
LINEAR = "linear 8 x 64 -> 64"
FULL = "AVX512 with VNNI and bf16"
SMALL = ("small-pixart", "small-flux", "small-unet")


times_int8 = pytest.mark.skipif(not kernels.vnni(), reason="int8 x int8 is emulated here, which is not timed")


def setting(**changes):
    given = {"seconds": 0.0, "rounds": 3, "threads": 1, "say": lambda text: None}
    return race.Setting(**(given | changes))


class Here:
    """A lane in this process that writes down what it was asked. `lost`: orders at which it dies."""

    log: list = []  # noqa: RUF012 - one log for all lanes of a test
    lost: tuple = ()

    def __init__(self, environment, setting):
        self.runner, self.environment = peers.Contestant(setting.threads), environment

    def ask(self, order, *arguments, patience=None):
        self.log.append((order, arguments))
        if (order, *arguments[:1]) in self.lost:
            raise race.LaneLost("its process ended with -9")
        return getattr(self.runner, order)(*arguments)

    def close(self):
        self.log.append(("close", ()))


@pytest.fixture
def here(monkeypatch):
    """A new log; peaks take a moment."""
    monkeypatch.setattr(roofline, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(roofline, "STREAM", 1 << 16)
    monkeypatch.setattr(race, "TURN_MS", 0.01)
    monkeypatch.setattr(race, "PREPARING", 1)  # one process profiles one thing at a time
    return type("Here", (Here,), {"log": []})


def test_calls_alternate():
    order = []
    times = bench.in_turn({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0, least=3)
    assert order == list("abc" * 4), "one round unmeasured, then three"
    assert {name: len(spent) for name, spent in times.items()} == dict.fromkeys("abc", 3)


def test_work_of_a_linear_is_counted_by_hand():
    work = roofline.linear(W8A8, rows=10, unit="int8")
    assert work.operations == 2 * 10 * 128 * 64
    assert work.moved_bytes == 2 * 10 * (128 + 64) + (64 * 128 + 4 * 64) + 2 * 64, "x, y; codes, scales; bias"
    branch = roofline.linear(replace(W8A8, rank=16), rows=10, unit="int8")
    assert branch.operations - work.operations == 2 * 10 * 16 * (128 + 64)
    four = replace(W8A8, weight=PARSE("int4/group:64"))
    assert roofline.linear(four, 10, "int8").moved_bytes == work.moved_bytes - 64 * 64 + 4 * 64


def test_work_of_a_convolution_attention_and_full_precision():
    plan = LayerPlan("conv2d", (6, 4, 3, 3), PARSE("int8/channel"), PARSE("int8a/tensor"))
    work = roofline.convolution(plan, torch.Size((2, 4, 8, 8)), torch.Size((2, 6, 8, 8)), "int8", bias=False)
    assert work.operations == 2 * 2 * 64 * 6 * 4 * 9
    assert work.moved_bytes == 2 * (2 * 4 * 64 + 2 * 6 * 64) + 6 * 36 + 4 * 6
    assert roofline.attention(2, 3, 10, 20, 8, "bf16") == roofline.Work(
        2 * 2 * 3 * 8 * 60, 4 * 2 * 3 * 200 * 8, "bf16"
    )
    assert roofline.dense(10, 128, 64, torch.float32).moved_bytes == 4 * (10 * 192 + 129 * 64)


def test_share_is_of_what_bounds_the_work():
    peaks = roofline.Peaks({"int8": 2e12}, 50e9)
    heavy = roofline.Work(1_000_000, 4_000_000_000, "int8")
    assert peaks.bound_ms(heavy) == pytest.approx(2.0)
    assert peaks.share(roofline.Line("k", 1, 4.0, heavy)) == pytest.approx(0.5)
    light = roofline.Work(100_000_000, 1000, "int8")
    assert peaks.bound_ms(light) == pytest.approx(2.0)
    assert peaks.bound_ms(replace(light, unit="nvfp4")) == pytest.approx(2.0), "a unit without a peak does not bound"


def test_a_kernel_that_beats_the_peak_is_the_peak():
    line = roofline.Line("k", 1, 1.0, roofline.Work(1000, 3_000_000_000, "int8"))
    peaks = roofline.Peaks({"int8": 2e12, "bf16": 1e12}, 50e9).raised([line])
    assert peaks.rates == {"int8": 3e12, "bf16": 1e12} and peaks.share(line) == pytest.approx(1.0)


def test_emulated_and_weight_only_layers_run_on_the_floating_point_unit():
    only = replace(W8A8, act=None)
    assert roofline.unit_of(W8A8, False, torch.bfloat16) == "int8"
    assert roofline.unit_of(W8A8, True, torch.bfloat16) == "bf16"
    assert roofline.unit_of(only, False, torch.float32) == "fp32"


def test_every_kernel_of_a_model_has_a_line_with_its_calls_and_work():
    model, given = widths.build("small-pixart"), widths.inputs("small-pixart")
    dq.quantize(model, "int8", progress=False)
    with torch.no_grad():
        lines = {line.kernel: line for line in bench.kernel_lines(model, lambda: widths.run(model, given), 2)}
    packed = layers.packed_layers(model).values()
    served = [layer for layer in packed if hasattr(layer, "op")]
    watched = lines.pop(next(kernel for kernel in lines if "attention" in kernel))
    assert watched.calls == 4 and watched.work.operations == 4 * 2 * 4 * 16 * (16 + 5) * 64 * 2
    assert sum(line.calls for line in lines.values()) == len(served)
    assert set(lines) == {layer.choice.label for layer in served} and all(line.ms > 0 for line in lines.values())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in packed), "nothing stays behind"


@pytest.mark.parametrize("name", [*SMALL, LINEAR])
def test_models_are_the_same_in_every_build_and_run(name):
    first, second = widths.build(name), widths.build(name)
    given = widths.inputs(name)
    with torch.no_grad():
        y = widths.run(first, given)
        assert y.isfinite().all() and y.float().std() > 0 and torch.equal(y, widths.run(second, given))
    assert all(value.dtype == torch.bfloat16 and not value.is_meta for value in first.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_small_models_are_quantized_like_large_ones(name):
    chosen = peers.targets(widths.build(name), ("linear", "conv2d"))
    large = peers.targets(widths.width(name.removeprefix("small-")).model(), ("linear", "conv2d"))
    assert chosen and {path.rpartition(".")[2] for path in chosen} <= {path.rpartition(".")[2] for path in large}


def test_unknown_names_say_what_is_known():
    with pytest.raises(DQError, match="Did you mean 'pixart'"):
        race.models(["pixartt"])
    with pytest.raises(DQError, match="Did you mean 'torchao-int8'"):
        race.contenders(["torchao-int"])
    assert race.models(["linears", "flux"]) == [*race.LINEARS, "flux"]
    assert [each.name for each in race.contenders(["dq-int8", "sdnq-int8"], ["sdnq-int8"])] == ["dq-int8"]


@times_int8
def test_lanes_and_their_contenders_take_turns(here):
    """Two lanes: each round is a turn of every contender of the first, then of the second, the base before both."""
    other = replace(peers.get("dq-int8"), name="other", lane="other lane")
    entries = [(LINEAR, [peers.get("dq-int8"), other])]
    [found] = list(race.race(entries, setting(), here))
    turns = [arguments[0] for order, arguments in here.log if order == "turn"]
    assert turns == ["bf16", "dq-int8", "bf16", "other"] * 3
    assert [row.contender for row in found.results] == ["bf16", "dq-int8", "other"]
    for row in found.results:
        assert row.ms > 0 and row.base_ms > 0 and row.calls >= 3 and row.times_base == row.base_ms / row.ms
    assert found.results[1].error_db > 30 and "int8" in found.results[1].kernel
    assert found.lines[0].work.unit == "int8" and found.peaks.share(found.lines[0]) > 0
    assert [order for order, _ in here.log].count("close") == 2


@times_int8
def test_peers_that_are_not_installed_say_how_to_get_them(here):
    absent = replace(peers.get("torchao-int8"), needs="no_such_package")
    [found] = list(race.race([(LINEAR, [peers.get("dq-int8"), absent])], setting(rounds=1), here))
    assert (
        "no_such_package is not installed" in found.results[-1].skipped and peers.PINS[0] in found.results[-1].skipped
    )
    assert found.results[0].ms > 0 and found.results[1].ms > 0


@times_int8
def test_a_contender_that_fails_or_dies_leaves_the_others(here, monkeypatch):
    def broken(model):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(peers.SCHEMES, "broken", broken)
    here.lost = (("turn", "mortal"),)
    entered = [peers.get("dq-int8"), peers.Contender("broken", "dq", "broken")]
    entered += [replace(entered[0], name="mortal", lane="short")]
    first, second = race.race([(LINEAR, entered), (LINEAR, entered[:1])], setting(rounds=1), here)
    reasons = {row.contender: row.skipped for row in first.results}
    assert reasons == {
        "bf16": "",
        "dq-int8": "",
        "broken": "RuntimeError: no kernel for this",
        "mortal": reasons["mortal"],
    }
    assert "-9" in reasons["mortal"] and second.results[1].ms > 0


def test_emulated_arithmetic_is_not_timed(here, monkeypatch):
    monkeypatch.setitem(peers.SCHEMES, "fp8", peers._dq(cookbook.RECIPES["fp8"]))
    [found] = list(race.race([(LINEAR, [peers.Contender("dq-fp8", "dq", "fp8")])], setting(), here))
    assert "emulated" in found.results[-1].skipped and not found.results[-1].ms


def test_contenders_are_for_the_models_they_fit(here):
    assert not peers.get("sdnq-int8-conv").fits("pixart") and peers.get("sdnq-int8-conv").fits("unet")
    assert not peers.get("dq-int8-attention-int8").fits(LINEAR) and peers.get("dq-int8-attention-int8").fits("flux")
    assert list(race.race([(LINEAR, [peers.get("sdnq-int8-conv")])], setting(), here)) == []


@pytest.mark.skipif(attention.why_not() is not None, reason="no CPU kernels here")
def test_attention_is_changed_inside_the_block_only(monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(cpu, "FEWEST_ROWS", {False: 0, True: 0})
    model, given = widths.build("small-pixart"), widths.inputs("small-pixart")
    dq.quantize(model, "int8", progress=False)
    before = attention.attached(model)

    def served():
        with torch.no_grad():
            lines = bench.kernel_lines(model, lambda: widths.run(model, given), 1)
        return {line.kernel for line in lines if "attention" in line.kernel}

    for kind, seen in {"torch": "F.scaled_dot_product_attention", "int8": "dq attention int8"}.items():
        with peers.attended(model, kind):
            assert served() == {seen}
        assert attention.attached(model) == before
    with peers.attended(model, ""):
        assert attention.attached(model) == before


def test_lanes_are_processes_with_their_own_environment():
    """One real process: what it inherits, an order that fails, and one that dies."""
    lane = race.Lane({"SDNQ_USE_TORCH_COMPILE": "1"}, setting())
    try:
        assert lane.ask("load", LINEAR, patience=120)["weight_bytes"] == 2 * (64 * 64 + 64)
        assert len(lane.ask("turn", "bf16", 0.0, patience=60)) == 1
        with pytest.raises(race.LaneLost, match="KeyError"):
            lane.ask("turn", "nobody", 0.0, patience=60)
        lane.process.kill()
        with pytest.raises(race.LaneLost, match="its process ended"):
            lane.ask("drop", patience=60)
    finally:
        lane.close()
    assert not lane.process.is_alive()


def test_memory_compares_processes_that_load_and_run(here):
    found = list(race.memory("small-pixart", setting(), here))
    orders = [order for order, _ in here.log]
    assert orders == ["save", "close", "peak", "close"] * 2 + ["peak", "close"], "each in a process of its own"
    assert [row.contender for row in found] == [name for name, _, _ in race.MEMORY]
    for row in found:
        assert row.peak_bytes >= row.before_bytes > row.weight_bytes > 0
    assert found[0].kernel == "torch" and all("int4" in row.kernel for row in found[1:])


def options(tmp_path, **changes):
    given = vars(eval_bench.arguments().parse_args(["--dtypes", "bf16"])) | {
        "models": ["small-pixart"],
        "seconds": 0.0,
        "rounds": 1,
    }
    return argparse.Namespace(**(given | {"out": tmp_path / "kernels.json", "contenders": ["dq-int8"]} | changes))


@times_int8
def test_rows_are_written_and_not_measured_twice_at_a_commit(tmp_path, here, monkeypatch):
    stamp = {"commit": "abc", "versions": {"torch": "2"}, "machine": "m"}
    monkeypatch.setattr(rows, "stamp", lambda: dict(stamp))
    started = race.race
    monkeypatch.setattr(race, "race", lambda entries, setting: started(entries, setting, here))
    chosen = options(tmp_path)
    eval_peers.speeds(chosen)
    written = rows.read(chosen.out)
    assert {(row["kind"], row["contender"]) for row in written} == {
        ("speed", "bf16"),
        ("speed", "dq-int8"),
        ("roofline", "dq-int8"),
    }
    eval_peers.speeds(chosen)
    assert rows.read(chosen.out) == written
    stamp["commit"] = "abc+"
    eval_peers.speeds(chosen)
    eval_peers.speeds(chosen)
    assert len([order for order, _ in here.log if order == "load"]) == 3, "a changed tree is measured every time"


def speed(**changes):
    row = {"kind": "speed", "model": "flux", "shown": "FLUX width", "contender": "dq-int8", "ms": 50.0}
    stamp = {"commit": "abc", "versions": {"torch": "2.13.0"}, "machine": "m", "threads": 2}
    return row | {"times_base": 2.0, "base": "bf16", "level": FULL, "kernel": "dq int8 x int8"} | stamp | changes


def test_the_table_of_kernels_shows_no_emulated_execution(tmp_path, monkeypatch):
    base = speed(contender="bf16", ms=100.0, times_base=1.0, kernel="aten::addmm")
    slow = speed(contender="dq-w4a8", kernel="slow one", emulated=True)
    saved = {"peak_bytes": 2**30, "weight_bytes": 2**31, "saved_share": 0.7}
    more = [speed(kind="memory", contender="dq-w4a8", **saved), speed(kind="roofline", contender="dq-int8")]
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    (tmp_path / "kernels.json").write_text(json.dumps({"rows": [speed(), base, slow, *more]}))
    text = tables.tables()["peers"][1]().splitlines()
    assert text[0] == f"{FULL}, beside bf16:"
    assert text[4] == "| FLUX width | `bf16` | 100.00 | 1.00 |  | aten::addmm |"
    assert text[5] == "| FLUX width | `dq-int8` | 50.00 | 2.00 |  | dq int8 x int8 |"
    assert not any("slow one" in line for line in text)
    text = tables.tables()["memory"][1]()
    assert "| FLUX width | `dq-w4a8` | 1.00 GiB | 70 % of the weights' 2.00 GiB |" in text


def test_dq_bench_prints_contenders_and_rooflines(here, monkeypatch, capsys):
    started = race.race
    monkeypatch.setattr(race, "race", lambda entries, setting: started(entries, setting, here))
    words = ["dq", "bench", "--peers", "--model", LINEAR, "--contender", "dq-int8", "--seconds", "0", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out
    assert left.value.code == 0 and "times bf16" in out and "dq-int8" in out and "share of the" in out


@times_int8
def test_dq_bench_prints_a_roofline_line_per_kernel(here, monkeypatch, capsys):
    monkeypatch.setattr("dq.bench.layers.SHAPES", ((8, 64, 64),))
    monkeypatch.setattr(sys, "argv", ["dq", "bench", "--seconds", "0", "--device", "cpu"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out
    assert left.value.code == 0 and "Roofline" in out and "peaks measured now: int8" in out
