"""The Triton backend without a GPU: when it says no, what importing it costs, its configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dq import kernels
from dq.errors import DQError
from dq.kernels import triton as backend
from dq.kernels.triton import configs
from tests.kernels.test_kernels import plan
from tests.lines import told_by

ROOT = Path(__file__).resolve().parents[2]


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_a_cpu_is_refused_without_importing_any_kernel():
    code = """
import sys
from dq import kernels
from dq.plan import LayerPlan, TensorPlan
plan = LayerPlan("linear", (8, 8), TensorPlan.parse("int8/channel"), TensorPlan.parse("int8/token"))
reason = kernels.backends()["triton"].why_not("linear", plan, "cpu")
assert reason == "Triton kernels run on GPUs, this is cpu", reason
assert not [name for name in sys.modules if name.startswith("dq.kernels.triton.") and name[18:] != "routes"]
"""
    done = python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_refusals_are_one_line_each(monkeypatch):
    ours = plan("linear", (8, 8))
    assert backend.why_not("linear", ours, "meta") == "Triton kernels run on GPUs, this is meta"
    with kernels.imagined(kernels.Machine()):
        assert backend.why_not("linear", ours, "cuda") == "no CUDA device is visible"
    monkeypatch.setattr(kernels, "architecture", lambda: "sm_90")
    monkeypatch.setattr(backend, "_missing_triton", lambda: "triton is not installed")
    assert backend.why_not("linear", ours, "cuda") == "triton is not installed"


UNITS = {"int8": ("int8/channel", "int8/token"), "fp8": ("fp8", "fp8/token"), "nvfp4": ("nvfp4", "nvfp4")}


@pytest.mark.parametrize(
    "arch, refused",
    [
        ("sm_75", "int8 fp8 nvfp4"),
        ("sm_80", "fp8 nvfp4"),
        ("sm_86", "fp8 nvfp4"),  # takes the tile sizes of sm_89 and has not its fp8 units
        ("sm_90", "nvfp4"),
        ("sm_100", ""),
        ("sm_121", ""),
        ("gfx950", "nvfp4"),
    ],
)
def test_matrix_units_decide(arch, refused):
    plans = {name: plan("linear", (64, 64), *pair) for name, pair in UNITS.items()}
    with kernels.imagined(kernels.Machine(gpu=arch)):
        reasons = {name: backend.why_not("linear", each, "cuda") for name, each in plans.items()}
    assert [name for name, reason in reasons.items() if reason] == refused.split()
    assert all(arch in reason for reason in reasons.values() if reason)


def test_it_stands_before_torchs_ops():
    order = list(kernels.backends())
    assert order.index("triton") < order.index("torchops")


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_shipped_configurations_say_that_nobody_measured_them(arch):
    data = json.loads((configs.FOLDER / f"{arch}.json").read_text())
    assert data["arch"] == arch and configs.measured(arch) is (data["best"] != {})
    assert ("Unmeasured" in data["note"]) is not configs.measured(arch)
    for name, found in data["candidates"].items():
        assert found, f"{name} has no configuration"
        tiles = [config["BM"] * config["BN"] for config in found]
        assert tiles == sorted(tiles, reverse=True), f"{name}: largest tile first"


def test_an_architecture_counts_as_measured_when_its_file_says_so(monkeypatch):
    monkeypatch.setattr(configs, "shipped", lambda arch: {"measured": arch == "sm_89"})
    assert configs.measured("sm_89") is True and configs.measured("sm_80") is False
    assert configs.measured("sm_86") is False, "it runs with the tile sizes of sm_89"
    assert configs.measured("sm_75") is False, "it has none"


def test_small_problems_get_small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda: 132)
    monkeypatch.setattr(configs, "kept", lambda arch: {})
    large, small = (configs.pick("gemm", m, 3072, 3072, "sm_90") for m in (16384, 64))
    assert large["BM"] * large["BN"] > small["BM"] * small["BN"]


def test_tuning_keeps_the_fastest_configuration_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    configs.kept.cache_clear()

    def time_ms(config):
        if config["BN"] == 256:
            raise RuntimeError("out of shared memory")
        return float(config["BM"])

    best, best_ms = configs.tune("gemm", 1000, 3072, 3072, time_ms)
    assert best_ms == 64.0 and configs.pick("gemm", 513, 3072, 3072, "sm_90") == best
    assert configs.pick("gemm", 1025, 3072, 3072, "sm_90") != best or best in configs.candidates("gemm", "sm_90")
    (tmp_path / "triton_sm_90.json").write_text("broken")
    configs.kept.cache_clear()
    assert configs.pick("gemm", 1000, 3072, 3072, "sm_90") in configs.candidates("gemm", "sm_90")
    with pytest.raises(DQError, match="no configuration ran on sm_90"):
        configs.tune("gemm", 1000, 3072, 3072, lambda config: 1 / 0)
    configs.kept.cache_clear()


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(DQError, match=r"no configurations for sm_75, expected one of sm_80"):
        configs.shipped("sm_75")


def test_the_bench_refuses_without_a_gpu():
    done = python("-m", "eval.gpu.bench", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA device is visible; run it on a machine with a GPU" in told_by("eval.gpu.bench", done.stderr)
