"""The bench of GPU kernels, without a GPU: what it does with contenders that fail, wrong tiles and checks."""

from __future__ import annotations

import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton.language")

import torch

from dq.errors import DQError
from dq.kernels.triton import ops
from eval.gpu import bench

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = types.SimpleNamespace(seconds=0.01, recorded=lambda key: False, finish=lambda key: None)


@pytest.fixture
def clock(monkeypatch):
    """Calls that are made once and take the milliseconds that they return."""

    def ready(name, run):
        run()
        return run, 0

    monkeypatch.setattr(bench, "ready", ready)
    monkeypatch.setattr(bench, "once_ms", lambda run, ahead: run())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def recorded(runs):
    noted = {}

    def note(what, name, shape, ms, operations=0, **figures):
        noted[name] = figures | {"ms": ms}

    bench.record("gemm", (1, 1, 1), runs, 2, OPTIONS, note)
    return noted


@pytest.mark.usefixtures("clock")
def test_ratios_are_to_the_first_contender_and_to_no_other():
    fast, slow, broken = (lambda: 2.0), (lambda: 8.0), (lambda: 1 / 0)
    assert recorded({"bf16": slow, "int8": fast}) == {
        "bf16": {"ratio": 1.0, "ms": 8.0}, "int8": {"ratio": 4.0, "ms": 2.0}
    }  # fmt: skip
    error = {"error": "ZeroDivisionError: division by zero", "ms": None}
    found = recorded({"bf16": broken, "int8": fast, "fp8": slow})
    assert found == {"bf16": error, "int8": {"ms": 2.0}, "fp8": {"ms": 8.0}}
    assert recorded({"bf16": broken, "int8": broken}) == {"bf16": error, "int8": error}


def test_the_gpu_sleeps_until_a_slow_call_is_queued():
    assert bench.ahead_cycles(1e-6) == bench.AHEAD_CYCLES
    assert bench.ahead_cycles(1.6e-3) >= 2 * 1.6e-3 * bench.CLOCK_HZ, (
        "a block on fused kernels takes so long on the host"
    )


def test_calls_are_timed_from_a_graph_where_one_can_be_captured(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "captured", lambda run: "replay")
    assert bench.ready("it", lambda: calls.append(1)) == ("replay", bench.AHEAD_CYCLES)
    assert len(calls) == 4, "warm before it is captured"
    monkeypatch.setattr(bench, "captured", lambda run: 1 / 0)
    run = partial(calls.append, 1)
    assert bench.ready("it", run)[0] is run
    assert "it: no graph, division by zero" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        bench.ready("it", lambda: 1 / 0)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("kernel", ["gemm_tma", "gemm_branch:fp8", "w4a8", "w4a8_groups"])
def test_a_tile_whose_output_differs_is_not_the_fastest(monkeypatch, kernel):
    def launch(x, w, epilogue, *rest):
        config = rest[-1]
        y = torch.linspace(1, 2, x.q.shape[0] * w.q.shape[0]).reshape(x.q.shape[0], -1).bfloat16()
        return y * (1.02 if config == "wrong" else 1)

    monkeypatch.setattr(ops, "launch_w4a8" if kernel.startswith("w4") else "launch_gemm", launch)
    monkeypatch.setattr(bench, "in_turn", lambda runs, seconds: dict.fromkeys(runs, 3.0))
    time_ms = bench.timer(kernel, (40, 16, 128), 1.0, "cpu")
    assert time_ms("right") == time_ms("another") == 3.0
    with pytest.raises(DQError, match="output differs from that of another tile: off by"):
        time_ms("wrong")


def test_fp8_products_are_tuned_apart():
    names = bench.tuned()
    assert {"gemm", "gemm:fp8", "gemm_tma_branch:fp8", "w4a8"} <= set(names) and "w4a8:fp8" not in names


def test_attention_is_that_of_diffusers_backends_and_of_dqs_choice(monkeypatch):
    """What is not there has a row with the reason, and every figure a distance from attention in fp32."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    from dq.fusions import backends

    timed, noted = [], []
    there = {"native": None, "_native_math": None, "flash": None}
    monkeypatch.setattr(backends, "why_not", lambda name: there.get(name, f"{name} is not there"))
    monkeypatch.setattr(backends, "choose", lambda device: ("sage", ()))
    right = _AttentionBackendRegistry._backends[AttentionBackendName("native")]
    wrong = lambda query, key, value, **how: right(query, key, value) * 1.1  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName("flash"), wrong)
    monkeypatch.setattr(bench, "randn", partial(bench.randn, device="cpu"))
    monkeypatch.setattr(bench, "HEADS", ((1, 2, 48, 64), (1, 2, 48, 256)))
    monkeypatch.setattr(bench, "record", lambda *args: timed.append((args[2], args[-1])))
    bench.attention(OPTIONS, lambda what, name, shape, ms, **more: noted.append((name, more)))
    for runs, about in timed:
        alike = {"bf16 SDPA", "diffusers native", "diffusers _native_math", "dq"}
        assert set(runs) == alike | {"bf16 CUDNN_ATTENTION".lower(), "bf16 flash_attention", "diffusers flash"}
        assert all(about[name]["off"] < 0.01 for name in alike) and 0.05 < about["diffusers flash"]["off"] < 0.15
    assert [about["dq"]["kernel"] for _, about in timed] == ["sage", "native"], "heads of 256 are not sage's"
    assert ("diffusers sage", {"error": "sage is not there"}) in noted


def test_the_bench_starts_where_torch_and_triton_are_all_there_is():
    code = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "accelerate", "peft"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
import eval.gpu.visit, eval.gpu.bench, eval.gpu.block, eval.gpu.faults, eval.gpu.flux
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
