"""The checks of a GPU's kernels can fail: replayed in the interpreter on kernels with one fault each."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("triton.language")

import torch

from dq.kernels import triton as backend
from dq.kernels.triton import configs, ops, stored
from eval.gpu import checks, lab, launches, rounding, tiles
from eval.gpu.checks import Outcome

pytestmark = pytest.mark.interpreted

TILE = {"BM": 32, "BN": 32, "BK": 64, "GROUP": 2, "warps": 4, "stages": 2}
W4 = {"BM": 32, "BN": 32, "GROUP": 2, "ASM": 1, "SWAP": 0, "warps": 4, "stages": 2}
BLOCKS = {"BM": 128, "BN": 128, "BK": 256, "GROUP": 8, "warps": 4, "stages": 2}


def rolled(t):
    return None if t is None else t.roll(1, 0)


def with_bias(change):
    return lambda launch, x, w, end, *rest: launch(x, w, end._replace(bias=change(end.bias)), *rest)


def with_scale(change):
    """Of activations, or of blocks the whole rows'."""

    def run(launch, x, w, end, *rest):
        name = "whole" if hasattr(x, "whole") else "scale"
        return launch(x._replace(**{name: change(getattr(x, name))}), w, end, *rest)

    return run


def with_output(change):
    return lambda launch, *args: change(launch(*args))


def unwritten(y):
    """All but the last column, in memory that nobody else wrote."""
    out = torch.empty_like(y)
    out[:, :-1] = y[:, :-1]
    return out


FAULTS = {
    "the bias is left out": with_bias(lambda bias: None),
    "the bias is a column off": with_bias(rolled),
    "scales are 2 % off": with_scale(lambda scale: scale * 1.02),
    "scales are a row off": with_scale(rolled),
    "outputs are a column off": with_output(lambda y: y.roll(1, 1)),
    "the last column is not written": with_output(unwritten),
    "the branch is left out": lambda launch, x, w, end, *rest: launch(x, w, end._replace(down_x=None), *rest),
    "GELU is left out": lambda launch, x, w, end, *rest: launch(x, w, end._replace(gelu=False), *rest),
}
PROBLEMS = {
    "gemm": ("gemm", TILE, (41, 56, 101), "int8"),
    "gemm_tma": ("gemm_tma", TILE, (41, 56, 112), "fp8"),
    "gemm_branch": ("gemm_branch", TILE, (41, 56, 101), "int8"),
    "w4a8": ("w4a8", W4, (41, 56, 163), "int8"),
    "w4a8_groups": ("w4a8_groups", W4, (41, 56, 192), "int8"),
    "nvfp4": ("nvfp4", BLOCKS, (137, 152, 352), "nvfp4"),
}


def launcher(kernel):
    return {"w4a8": "launch_w4a8", "w4a8_groups": "launch_w4a8", "nvfp4": "launch_nvfp4"}.get(kernel, "launch_gemm")


def put(monkeypatch, kernel, fault):
    """Let every launch of a kernel have a fault."""
    name = launcher(kernel)
    launch = getattr(ops, name)

    monkeypatch.setattr(ops, name, lambda *args, **more: fault(partial(launch, **more), *args))


def applies(kernel, name):
    if "branch" in name:
        return kernel not in ("gemm", "gemm_tma")
    return kernel in ("gemm", "gemm_tma") if "GELU" in name else True


@pytest.mark.parametrize("kernel", PROBLEMS)
def test_a_right_product_passes(kernel):
    assert tiles.check(tiles.Problem(*PROBLEMS[kernel], "cpu")) == ""


@pytest.mark.parametrize("kernel, name", [(k, f) for k in PROBLEMS for f in FAULTS if applies(k, f)])
def test_a_fault_of_a_product_is_found(monkeypatch, kernel, name):
    put(monkeypatch, kernel, FAULTS[name])
    assert tiles.check(tiles.Problem(*PROBLEMS[kernel], "cpu"))


@pytest.mark.parametrize("zero, sums", [("zero", "sums"), ("sums", "zero")], ids=["of rows", "of columns"])
def test_zero_points_left_out_are_found(monkeypatch, zero, sums):
    def fault(launch, x, w, *rest):
        return launch(x._replace(**{zero: None}), w._replace(**{sums: None}), *rest)

    put(monkeypatch, "gemm", fault)
    assert tiles.check(tiles.Problem(*PROBLEMS["gemm"], "cpu"))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_shipped_tile_is_checked(monkeypatch, arch):
    """A fault of one tile alone is found, whichever it is."""
    monkeypatch.setattr(configs, "architecture", lambda: arch)
    shipped = [(k, str(dict(c))) for k, cs in configs.shipped(arch)["candidates"].items() for c in cs]
    seen = []
    monkeypatch.setattr(tiles, "check", lambda p: seen.append((p.kernel, str(dict(p.config)))) or "")
    assert checks.sound(list(checks.check_tiles("cpu")))
    assert set(seen) == {each for each in shipped if each[0] != tiles.FLIGHT}, "Gluon has no interpreter"
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.INTERPRETED.__class__(False))
    checks.sound(list(checks.check_tiles("cpu")))
    assert set(seen) == set(shipped)


def test_the_fast_gelu_may_be_off_by_its_bound_and_no_more():
    truth, off = torch.tensor([-0.004, 0.5, 3.0]), tiles.FAST_GELU
    assert tiles.far(truth + off, truth, 2, off) == tiles.far(truth - off, truth, 2, off) == ""
    assert tiles.far(truth + off, truth, 2) and tiles.far(truth + 1.1 * off, truth, 2, off)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_shipped_tile_is_right(monkeypatch, arch):
    monkeypatch.setattr(configs, "architecture", lambda: arch)
    assert [each for each in checks.check_tiles("cpu") if each.wrong or each.skipped] == []


# --- layers ----------------------------------------------------------------------------------------------------------

LAYER_FAULTS = [name for name in FAULTS if "GELU" not in name]


@pytest.mark.parametrize("name", [None, *LAYER_FAULTS])
@pytest.mark.parametrize("pair", [("int8/channel", "int8/token"), ("int4/group:64", "int4/group:64")], ids=str)
def test_a_fault_of_a_layer_is_found(monkeypatch, pair, name):
    torch.manual_seed(0)
    made = checks.layer(*pair, (40, 48, 128), 16, "cpu")
    if name:
        put(monkeypatch, "w4a8_groups" if "group" in pair[0] else "gemm", FAULTS[name])
    assert bool(checks.check_linear(*made)) is bool(name)


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rounding.ROWS)
@pytest.mark.parametrize("fault", ["none", "codes", "scale"])
def test_a_fault_of_rounding_is_found(monkeypatch, name, fault):
    quantize = ops.quant_rows

    def faulty(x, *args, **more):
        found = quantize(x, *args, **more)
        if fault == "codes":
            found.q.view(torch.int8)[5, 7] ^= 1
        return found._replace(scale=found.scale * 1.0001) if fault == "scale" else found

    monkeypatch.setattr(ops, "quant_rows", faulty)
    assert bool(rounding.check_rows(name, 163, "cpu")) is (fault != "none")


def test_faults_of_unpacking_are_found(monkeypatch):
    assert rounding.check_unpacking(255, "cpu") == rounding.check_decoding("nvfp4", "cpu") == ""
    assert rounding.check_blocks(160, "cpu") == ""
    for name, check in (
        ("w4_to_s8", lambda: rounding.check_unpacking(255, "cpu")),
        ("weight_sums", lambda: rounding.check_unpacking(255, "cpu")),
        ("w4_to_float", lambda: rounding.check_decoding("nvfp4", "cpu")),
        ("tile_scales", lambda: rounding.check_blocks(160, "cpu")),
        ("few_rows", lambda: rounding.check_unpacking(255, "cpu")),
    ):
        where = stored if name == "few_rows" else ops
        with monkeypatch.context() as patch:
            right = getattr(where, name)
            patch.setattr(where, name, lambda *args, right=right, **more: right(*args, **more).roll(1, 0))
            assert check(), name


# --- the kernels of eval.gpu -----------------------------------------------------------------------------------------


def test_faults_of_gates_are_found(monkeypatch):
    about, right = ("gemm_tma_branch", TILE, (41, 56, 112), "int8"), launches.gated_gemm
    assert lab.check_gate(about, "cpu") == ""
    for name, fault in {
        "bias": lambda x, w, bias, end, *rest: right(x, w, None, end, *rest),
        "scales": lambda x, w, bias, end, *rest: right(x._replace(scale=x.scale * 1.02), w, bias, end, *rest),
        "gate": lambda x, w, bias, end, *rest: right(x, w, bias, end._replace(gate=end.gate.roll(1, 1)), *rest),
        "tokens": lambda x, w, bias, end, *rest: right(x, w, bias, end._replace(tokens=end.tokens + 1), *rest),
    }.items():
        monkeypatch.setattr(launches, "gated_gemm", fault)
        assert lab.check_gate(about, "cpu"), name


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_what_was_skipped_is_not_right():
    right, wrong, skipped = Outcome("a"), Outcome("b", wrong="off"), Outcome("c", skipped="no unit")
    assert checks.counted([right, skipped, skipped]) == "1 checks are right, 0 wrong, 2 skipped"
    assert checks.sound([right, skipped]) and not checks.sound([right, wrong])
    assert not checks.sound([skipped]) and not checks.sound([]), "nothing was checked"


def test_a_check_that_raises_is_wrong():
    assert checks.told("it", lambda: 1 / 0) == Outcome("it", wrong="ZeroDivisionError: division by zero")
    assert checks.told("it", lambda: "off") == Outcome("it", wrong="off")


def test_a_unit_that_a_card_lacks_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(checks.kernels, "architecture", lambda: "sm_103")
    monkeypatch.setattr(configs, "architecture", lambda: "sm_100")
    monkeypatch.setattr(tiles, "check", lambda problem: "")
    found = list(checks.check_tiles("cuda"))
    assert {each.skipped for each in found} == {"", "sm_103 has no int8 matrix unit"}


def test_memory_that_nobody_wrote_holds_nan():
    with tiles.poisoned():
        assert torch.zeros(8).new_empty(4).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(3, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_pair_of_the_checks_has_a_kernel():
    for weight, act in checks.PAIRS:
        plan = checks.layer(weight, act, (1, 64, 64), 0, "cpu")[0]
        assert backend.why_not("linear", plan, "cpu") is None
