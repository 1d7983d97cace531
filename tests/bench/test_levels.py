"""Races beside fp32, limited levels, OpenVINO, and the tables of formats and recipes. No test of a speed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dq
from dq import cookbook, kernels
from dq.bench import levels, openvino, peers, race, roofline, widths
from dq.errors import DQError
from eval.experiments import rows, speed_layers, speed_pipelines, tables
from eval.experiments import speed as eval_speed

LINEAR = "linear 8 x 64 -> 64"
FITTED = [name for name in dq.recipes() if cookbook.get(name).needs_calibration]
HIDDEN = "AVX2 (higher levels hidden, torch limited to AVX2)"


class Here:
    """A lane in this process."""

    def __init__(self, environment, setting):
        self.runner = peers.Contestant(setting.threads)

    def ask(self, order, *arguments, patience=None):
        return getattr(self.runner, order)(*arguments)

    def close(self):
        pass


def test_a_race_beside_fp32_computes_in_it_and_has_bf16_as_a_contender(monkeypatch):
    monkeypatch.setattr(roofline, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(roofline, "STREAM", 1 << 16)
    monkeypatch.setattr(race, "TURN_MS", 0.01)
    monkeypatch.setattr(race, "PREPARING", 1)  # lanes share this process, and torch's profiler is of one thread
    names = ["bf16", "bf16-compiled", *(["dq-int8"] if kernels.vnni() else [])]
    setting = race.Setting(0.0, 1, 1, say=lambda text: None, dtype="fp32")
    [found] = race.race([(LINEAR, race.contenders(names))], setting, Here)
    assert [row.contender for row in found.results] == ["fp32", "bf16", *names[2:]], "compiled bf16 is of another race"
    assert {row.base for row in found.results} == {"fp32"} and all(row.base_ms > 0 for row in found.results)
    assert 30 < found.results[1].error_db < 70, "the rounding of bf16"
    assert {row.level for row in found.results} == {levels.shown()}


def test_a_lane_is_limited_and_says_so():
    """One real process."""
    lane = race.Lane({}, race.Setting(threads=1, level="avx2"))
    try:
        level = lane.ask("load", LINEAR, "fp32", patience=120)["level"]
    finally:
        lane.close()
    assert "torch limited to" in level
    assert level == HIDDEN or not torch.cpu._is_avx512_supported() or not kernels.vnni()


def test_levels_are_known_and_decide_the_base():
    assert levels.environment("") == {} and levels.environment("avx2")["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    with pytest.raises(DQError, match="Did you mean 'avx2'"):
        levels.environment("avx3")
    assert [levels.base(level) for level in levels.LIMITS] == ["fp32"] * 3
    assert levels.base() == ("bf16" if levels.has_bf16() else "fp32")


def test_the_command_starts_again_at_a_level(tmp_path):
    words = ["--layers", "--level", "avx2", "--recipes", "int8-weight", "--seconds", "0", "--threads", "1"]
    code = (
        "import sys; from eval.experiments import speed, speed_layers as one; one.ROWS, one.SIZES = (2,), ((64, 64),)"
    )
    file = tmp_path / "rows.json"
    script = f"{code}; sys.argv[1:] = {[*words, '--out', str(file)]}; speed.main()"
    environment = {**os.environ, **levels.environment("avx2")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, timeout=300)
    [row] = rows.read(file)
    assert (row["what"], row["dtype"], row["recipe"]) == ("linear 2 x 64 -> 64", "float32", "int8-weight")
    assert "torch limited to" in row["level"] and row["threads"] == 1 and row["full_ms"] > 0


def test_a_level_is_set_before_torch_is_imported(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["speed", "--level", "avxvnni"])
    monkeypatch.delenv("DQ_CPU_LEVEL", raising=False)
    with pytest.raises(SystemExit):
        eval_speed.main()
    [(_, words, environment)] = started
    assert words[-2:] == ["--level", "avxvnni"] and environment["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"


def node(kind, made):
    told = {
        "layerType": SimpleNamespace(astype=lambda _: kind),
        "primitiveType": SimpleNamespace(astype=lambda _: made),
    }
    return SimpleNamespace(get_rt_info=lambda: told)


def test_openvino_says_what_runs_and_what_a_limit_does_not_bind(monkeypatch):
    nodes = [node("FullyConnected", "brgemm_avx2_f32")] * 3 + [node("FullyConnected", "gemm_mlas_f32")]
    nodes += [node("MVN", "jit_avx512_f32"), node("Reshape", "unknown_f32")]
    compiled = SimpleNamespace(get_runtime_model=lambda: SimpleNamespace(get_ops=lambda: nodes))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert openvino.kernel(compiled) == "OpenVINO brgemm_avx2_f32 (3), gemm_mlas_f32 (1)"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert openvino.kernel(compiled).endswith("; not limited: gemm_mlas_f32, jit_avx512_f32")


def test_sdnq_does_not_multiply_with_openvino():
    lanes = [each for each in peers.CONTENDERS if each.needs == "sdnq"]
    assert lanes and all(each.environment["SDNQ_USE_OPENVINO_MM"] == "0" for each in lanes)


@pytest.mark.parametrize("name", FITTED)
def test_calibrated_recipes_run_unfitted(name):
    model, given = widths.build("small-pixart", torch.float32), widths.inputs("small-pixart", torch.float32)
    plan = speed_pipelines.quantize_unfitted(model, cookbook.get(name))
    planned = {str(layer.weight) for layer in plan.layers.values()}
    assert cookbook.get(name).linear[0].partition("/")[0] in {text.partition("/")[0] for text in planned}
    assert ("rank" in cookbook.get(name).options) == any(layer.rank for layer in plan.layers.values())
    with torch.no_grad():
        assert widths.run(model, given).isfinite().all()


def timed(**changes):
    row = {
        "what": "linear 4 x 8 -> 8",
        "model": "tiny-sd",
        "dtype": "float32",
        "level": "AVX2",
        "recipe": "int8-weight",
    }
    row |= {"full_ms": 3.0, "quantized_ms": 6.0, "emulated": False, "said": [], "machine": "m", "commit": "abc"}
    return row | {"device": "cpu", "threads": 2, "kernel": "k"} | changes


def test_tables_have_each_level_and_dtype_by_itself():
    lines = speed_layers.tables([timed(), timed(level=HIDDEN), timed(recipe="int8", quantized_ms=1.0)])
    assert lines[0] == "| AVX2, fp32 | full, ms | `int8` | `int8-weight` |"
    assert lines[2] == "| linear 4 x 8 -> 8 | 3.00 | 3.00 | 0.50 |"
    assert lines[4] == f"| {HIDDEN}, fp32 | full, ms | `int8-weight` |"
    lines = speed_pipelines.tables([timed(said=["slow"]), timed(recipe="fp8", emulated=True), timed(dtype="bfloat16")])
    assert lines[0] == "| recipe | tiny-sd, AVX2, fp32 | tiny-sd, AVX2, bf16 |"
    assert lines[2:] == ["| `int8-weight` | 0.50 (said) | 0.50 |", "", "Emulated here, and not timed: `fp8`."]


def test_slow_recipes_that_explain_passes_over_are_found():
    found = [timed(), timed(said=["said"]), timed(recipe="int8", quantized_ms=3.5)]
    assert speed_pipelines.silent(found) == ["int8-weight on tiny-sd in float32 on AVX2"]


def test_rows_of_limited_levels_stand_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FOLDER", tmp_path)
    stamp = {"commit": "abc", "machine": "m", "level": "AVX2", "threads": 2}
    (tmp_path / "layers.json").write_text(json.dumps({"rows": [timed(), timed(level=HIDDEN)]}))
    assert rows.there(tmp_path / "layers.json", {"recipe": "int8-weight"}, stamp)
    assert not rows.there(tmp_path / "layers.json", {"recipe": "int8-weight"}, stamp | {"threads": 1})
    assert not rows.there(tmp_path / "layers.json", {"recipe": "int8-weight"}, stamp | {"commit": "abc+"})
    assert [rows.limited(row) for row in rows.read(tmp_path / "layers.json")] == [False, True]
    assert HIDDEN in tables.tables()["layers"][1]() and tables.tables()["pipelines"][1]() == tables.NOT_YET
