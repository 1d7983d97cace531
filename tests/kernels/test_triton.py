"""The Triton backend without a GPU: when it says no, what importing it costs, its configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from dq import kernels
from dq.errors import DQError
from dq.kernels import triton as backend
from dq.kernels.triton import chips, configs
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
kernels = [name for name in sys.modules if name.startswith("dq.kernels.triton.")]
assert set(kernels) <= {"dq.kernels.triton.routes", "dq.kernels.triton.chips"} and "triton" not in sys.modules, kernels
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


def test_tensors_that_are_not_on_one_gpu_are_refused_in_words():
    """An offloaded weight reaches the operator of a backend that was forced, or one chosen for another device."""
    pytest.importorskip("triton.language")
    from dq.kernels.triton import ops

    code, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16)
    with pytest.raises(DQError, match=r"dq::triton_w8a8_gemm: got tensors on cpu, expected all on one GPU"):
        torch.ops.dq.triton_w8a8_gemm(code, code, scale, scale, dtype=torch.float32)
    with pytest.raises(DQError, match=r"got tensors on cpu, meta, expected all on one GPU.*set_backend"):
        ops.on_one_gpu("dq::it", code, code.to("meta"))


def test_launches_are_made_on_the_card_of_the_tensors(monkeypatch):
    """cuda:1: Triton launches on the current card, and tile sizes and multiprocessors are asked of it."""
    pytest.importorskip("triton.language")
    from dq.kernels.triton import ops

    inside, seen = [], []
    monkeypatch.setattr(ops, "on_one_gpu", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: Guard(inside, tensor))
    monkeypatch.setattr(ops, "launch_gemm", lambda x, *rest, **more: seen.append(inside[:]) or x.q.new_empty(16, 16))
    code, scale = torch.zeros(16, 64, dtype=torch.int8), torch.ones(16)
    torch.ops.dq.triton_w8a8_gemm(code, code, scale, scale, dtype=torch.float32)
    assert len(seen) == 1 and [each.data_ptr() for each in seen[0]] == [code.data_ptr()] and inside == []


class Guard:
    def __init__(self, inside, tensor):
        self.inside, self.tensor = inside, tensor

    def __enter__(self):
        self.inside.append(self.tensor)

    def __exit__(self, *error):
        self.inside.pop()


UNITS = {"int8": ("int8/channel", "int8/token"), "fp8": ("fp8", "fp8/token"), "nvfp4": ("nvfp4", "nvfp4")}


@pytest.mark.parametrize(
    "arch, refused",
    [
        ("sm_75", "int8 fp8 nvfp4"),
        ("sm_80", "fp8 nvfp4"),
        ("sm_86", "fp8 nvfp4"),  # takes the tile sizes of sm_89 and has not its fp8 units
        ("sm_90", "nvfp4"),
        ("sm_100", ""),
        ("sm_103", "int8"),  # takes the tile sizes of sm_100 and has not its integer products
        ("sm_121", ""),
        ("gfx942", "fp8 nvfp4"),
        ("gfx950", "nvfp4"),
        ("gfx1100", "int8 fp8 nvfp4"),
    ],
)
def test_matrix_units_decide(arch, refused):
    plans = {name: plan("linear", (64, 64), *pair) for name, pair in UNITS.items()}
    with kernels.imagined(kernels.Machine(gpu=arch)):
        reasons = {name: backend.why_not("linear", each, "cuda") for name, each in plans.items()}
    assert [name for name, reason in reasons.items() if reason] == refused.split()
    assert all(arch in reason for reason in reasons.values() if reason)


@pytest.mark.parametrize(
    "version, refused", [("3.6.0", "int8"), ("3.7.1+gitd1f7", "int8"), ("3.8.0", ""), ("3.9.0", "")]
)
def test_a_release_of_triton_that_does_not_reach_a_unit_is_refused(monkeypatch, version, refused):
    """sm_100: it would multiply int8 with the instruction of sm_80, slower than bf16; weight-only layers need none."""
    monkeypatch.setattr(kernels, "architecture", lambda: "sm_100")
    monkeypatch.setattr(backend, "_missing_triton", lambda: None)
    monkeypatch.setattr(backend, "version", lambda: version)
    plans = {name: plan("linear", (64, 64), *pair) for name, pair in UNITS.items()}
    plans["decode"] = plan("linear", (64, 64), "int4/group:64", None)
    reasons = {name: backend.why_not("linear", each, "cuda") for name, each in plans.items()}
    assert [name for name, reason in reasons.items() if reason] == refused.split()
    assert not refused or "does not reach the int8 matrix unit of sm_100, 3.8 does" in reasons["int8"]


def test_weight_only_layers_run_where_int8_products_do_not():
    with kernels.imagined(kernels.Machine(gpu="sm_103")):
        assert backend.why_not("linear", plan("linear", (64, 64), "int4/group:64", None), "cuda") is None


@pytest.mark.parametrize(
    "version, numbers",
    [
        ("3.9.0", (3, 9)),
        ("3.7.1+gitd1f7a", (3, 7)),  # ROCm's wheels
        ("3.6.0.post25", (3, 6)),  # those for Windows
        ("v4.10", (4, 10)),
        ("main", (0, 0)),
    ],
)
def test_releases_are_read_from_versions_as_builds_write_them(version, numbers):
    assert chips.release(version) == numbers
    assert (chips.too_old(version) is None) is (numbers >= (3, 6))


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """`elsewhere(text)`: a triton module that is nothing but that text; None for no triton at all."""

    def put(text):
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            monkeypatch.delitem(sys.modules, name)
        if text is not None:
            (tmp_path / "triton").mkdir()
            (tmp_path / "triton/__init__.py").write_text(text)
        others = [path for path in sys.path if not (Path(path) / "triton").is_dir()]
        monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
        backend._missing_triton.cache_clear()
        backend.version.cache_clear()

    yield put
    backend._missing_triton.cache_clear()
    backend.version.cache_clear()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("__version__ = '3.7.1+git5f8c2b1'", None),  # found though no wheel of the name "triton" is installed
        ("__version__ = '3.5.1'", "triton 3.5.1 is older than 3.6"),
        ("raise ImportError('libcuda.so.1: no such file')", "triton does not load: libcuda.so.1: no such file"),
        ("", "triton is not installed"),
        (None, "triton is not installed"),
    ],
)
def test_triton_is_asked_for_its_version_whatever_its_wheel_is_called(elsewhere, text, reason):
    elsewhere(text)
    assert backend._missing_triton() == reason


def test_installing_dq_installs_no_triton_over_that_of_torch():
    """On ROCm another build of it has the same folder, and torch pins its own release elsewhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [line for line in project["dependencies"] if "triton" in line]
    assert [line for line in project["optional-dependencies"]["dev"] if line.startswith("triton")], (
        "CI compiles kernels"
    )


@pytest.mark.parametrize(
    "pair, columns, said",
    [
        (("nvfp4", "nvfp4"), 16416, "at most 16384 columns, got 16416"),
        (("int8/channel", "int8/token"), 131088, "may not fit in an int32, got 131088"),
    ],
)
def test_rows_too_long_for_a_kernel_are_refused(pair, columns, said):
    with kernels.imagined(kernels.Machine(gpu="sm_100")):
        assert said in backend.why_not("linear", plan("linear", (16, columns), *pair), "cuda")
        assert backend.why_not("linear", plan("linear", (16, 16384), *pair), "cuda") is None


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
    configs._kept.cache_clear()

    def time_ms(config):
        if config["BN"] == 256:
            raise RuntimeError("out of shared memory")
        return float(config["BM"])

    best, best_ms = configs.tune("gemm", 1000, 3072, 3072, time_ms)
    assert best_ms == 64.0 and configs.pick("gemm", 513, 3072, 3072, "sm_90") == best
    assert configs.pick("gemm", 1025, 3072, 3072, "sm_90") != best or best in configs.candidates("gemm", "sm_90")
    configs.cache_file("sm_90").write_text("broken")
    configs._kept.cache_clear()
    assert configs.pick("gemm", 1000, 3072, 3072, "sm_90") in configs.candidates("gemm", "sm_90")
    with pytest.raises(DQError, match="no configuration ran on sm_90"):
        configs.tune("gemm", 1000, 3072, 3072, lambda config: 1 / 0)
    configs._kept.cache_clear()


def test_fp8_products_have_measured_tiles_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    best, _ = configs.tune("gemm_tma:fp8", 1000, 3072, 3072, lambda config: -config["BM"] * config["BN"])
    configs.tune("gemm_tma", 1000, 3072, 3072, lambda config: config["BM"] * config["BN"])
    assert configs.pick("gemm_tma:fp8", 1000, 3072, 3072) == best != configs.pick("gemm_tma", 1000, 3072, 3072)
    configs._kept.cache_clear()


def test_measured_tiles_are_kept_by_card_and_by_release_of_triton(monkeypatch, tmp_path):
    """An H20 has not the fastest tiles of an H100, nor has the next compiler."""
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    monkeypatch.setattr(configs, "multiprocessors", lambda: 4)
    choice = {"BM": 64, "BN": 64, "BK": 128, "GROUP": 8, "warps": 4, "stages": 4}
    files = []
    for card, release in (("nvidia-h100", "3.7.1"), ("nvidia-h20", "3.7.1"), ("nvidia-h100", "3.9.0")):
        monkeypatch.setattr(configs, "card", lambda card=card: card)
        monkeypatch.setattr("triton.__version__", release)
        assert configs.pick("gemm", 4096, 3072, 3072) != choice, "nobody timed it here"
        configs.keep("sm_90", {configs.problem("gemm", 4096, 3072, 3072): choice})
        assert configs.pick("gemm", 4096, 3072, 3072) == choice
        files.append(configs.cache_file("sm_90").name)
    assert files[0] == "triton_sm_90_nvidia-h100_3.7.json" and len(set(files)) == 3
    configs._kept.cache_clear()


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(DQError, match=r"no configurations for sm_75, expected one of sm_80"):
        configs.shipped("sm_75")


def test_the_visit_refuses_without_a_gpu():
    done = python("-m", "eval.gpu.visit", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert "no CUDA device is visible; run it on a machine with a GPU" in told_by("eval.gpu.visit", done.stderr)


# --- tiles by estimate -----------------------------------------------------------------------------------------------


def test_tiles_are_chosen_by_waves_and_not_by_size():
    """4608 x 3072 on the 132 multiprocessors of an H100: 432 wide tiles take 3.27 waves, 864 square 6.55."""
    wide, square = ({"BM": 128, "BN": n, "BK": 128} for n in (256, 128))
    shape = (4608, 3072, 3072)
    assert configs.suited([wide, square], shape, 132) is square
    assert configs.suited([wide, square], (4608, 11264, 3072), 132) is wide, "12 waves of 132 tiles without a rest"
    assert configs.estimate(wide, shape, 132) == 4 * 128 * 256 * (3072 + 512)
    assert configs.estimate(square, shape, 132) == 7 * 128 * 128 * (3072 + 512)


def test_small_tiles_pay_for_reading_their_operands_again():
    """64 x 64 takes 27 waves where 128 x 128 takes 7: fewer products, but each byte serves half as many."""
    small, square = ({"BM": n, "BN": n, "BK": 128} for n in (64, 128))
    assert configs.suited([square, small], (4608, 3072, 3072), 132) is square
    assert configs.suited([square, small], (64, 3072, 3072), 132) is small, "few rows: both take one wave"


def test_a_second_program_of_a_multiprocessor_hides_the_ends_of_a_tile():
    one = {"BM": 128, "BN": 128, "BK": 128}
    two = one | {"resident": 2}
    assert configs.suited([one, two], (4608, 3072, 3072), 132) is two
    assert configs.estimate(two, (4608, 3072, 3072), 132) < configs.estimate(one, (4608, 3072, 3072), 132)


def test_the_two_programs_fit_on_hopper():
    for name in ("gemm_tma", "gemm_tma_branch", "gemm_flight"):
        shared = [c for c in configs.candidates(name, "sm_90") if c.get("resident") == 2]
        assert len(shared) == 1 and all(2 * c["stages"] * (c["BM"] + c["BN"]) * c["BK"] <= 226 * 1024 for c in shared)


def test_the_fast_gelu_is_finer_than_rounding_its_input_to_bf16():
    """By arithmetic, with tanh off by all that NVIDIA's instruction may be (PTX ISA), in either direction."""
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    tanh = torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))
    truth = torch.nn.functional.gelu(x, approximate="tanh")
    bound = 2**-11.98 * x.abs()
    for sign in (-1, 1):
        off = (0.5 * x * (1 + tanh * (1 + sign * 2**-10.987)) - truth).abs()
        assert (off <= bound + 1e-12).all() and off.max() > 0.9 * bound.max()
    half_a_unit = 2**-9 * x.abs()  # of the input in bf16, at most
    assert (bound <= half_a_unit / 7.8).all()


def test_the_gluon_product_is_a_candidate_beside_tritons_and_never_first():
    int8 = plan("linear", (64, 64))
    with kernels.imagined(kernels.Machine(gpu="sm_90")):
        said = kernels.asked("linear", int8, "cuda")
        assert said["gluon"] is None and said["triton"] is None
        assert list(said).index("triton") < list(said).index("gluon")
        assert kernels.chosen("linear", int8, "cuda")[0] == "triton"
        for other, word in (
            (plan("linear", (64, 64), rank=2), "no low-rank branch"),
            (plan("linear", (64, 72)), "multiples of 16"),
            (plan("linear", (64, 64), "int4/group:64", "int8/token"), "int8 weights and activations"),
            (plan("linear", (64, 64), "int8/channel", None), "int8 weights and activations"),
        ):
            assert word in kernels.backends()["gluon"].why_not("linear", other, "cuda")
    with kernels.imagined(kernels.Machine(gpu="sm_89")):
        assert "of sm_90" in kernels.backends()["gluon"].why_not("linear", int8, "cuda")


@pytest.mark.parametrize("version, tried", [("3.5.1", False), ("3.6.0", True), ("3.9.0", True), ("3.10.0", False)])
def test_gluon_of_a_release_that_nobody_compiled_with_is_refused(monkeypatch, version, tried):
    gluon = kernels.backends()["gluon"]
    monkeypatch.setattr(kernels, "architecture", lambda: "sm_90")
    monkeypatch.setattr(backend, "_missing_triton", lambda: None)
    monkeypatch.setattr(backend, "version", lambda: version)
    reason = gluon.why_not("linear", plan("linear", (64, 64)), "cuda")
    assert (reason is None) is tried and (tried or "was not tried" in reason)
