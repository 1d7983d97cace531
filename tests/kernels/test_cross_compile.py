"""The gate for GPU kernels on a machine without one: compile for each architecture and look at what came out.

A kernel passes when it has its matrix instruction, does not spill, is not empty and keeps within the memory of the
chip; or when `chips.missing` refuses it and it would not have passed. Here one kernel of each kind per architecture
that differs, about a second each, most of it in LLVM; what has not changed since comes from Triton's own cache. All
kernels with all shipped configurations, in ten minutes, and another release than the installed one:

    pip install --no-deps --target FOLDER triton==3.7.1
    python -m tests.kernels.cross_compile --triton FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/kernels/test_cross_compile.py
"""

from __future__ import annotations

import importlib.util
import re

import pytest

from dq.kernels.triton import chips, configs
from tests.kernels import cross_compile

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

GATE = {
    "sm_80": ("gemm_branch-i8", "w4a8_groups"),
    "sm_86": ("gemm_branch-i8",),
    "sm_89": ("gemm_branch-fp8e4nv",),
    "sm_90": (
        "quant_rows", "quant_rows-affine", "quant_groups", "quant_rows-fp8", "w4_to_s8", "w4_to_s8-two-level",
        "nvfp4_to_bf16",
        "few_rows-int8", "few_rows-int4", "w4_to_s8-rounded",
        "gemm_tma-i8", "gemm_tma_branch-fp8e4nv", "gemm_tma-fp8e4nv-exact", "w4a8", "w4a8_groups",
    ),
    "sm_100": ("nvfp4_quant", "gemm_tma-fp8e4nv", "gemm_tma_branch-i8", "nvfp4"),
    "sm_103": ("gemm_tma-fp8e4nv", "gemm_tma-i8", "nvfp4"),
    "sm_120": ("tile_scales", "gemm_tma-i8", "nvfp4"),
    "gfx942": ("gemm_branch-i8", "w4a8_groups"),
    "gfx950": ("gemm_branch-fp8e4nv",),
}  # fmt: skip

# What is of no use or does not compile on AMD, and why.
AMD_GAPS = {
    ("gfx942", "fp8"): "its fp8 units take another e4m3 (fnuz); Triton widens ours to fp16, at the rate of fp16",
    ("gfx942", "nvfp4"): "no block-scaled units: Triton widens both operands to bf16",
    ("gfx950", "nvfp4"): "fails: its block-scaled units take power-of-two scales per 32, and a pass stops",
    ("both", "ASM"): "w4a8 unpacks with shifts and masks: the inline assembly is PTX",
    ("both", "gemm_tma"): "compiles to plain loads; the pointer kernel does the same with one launch less",
}


@pytest.mark.parametrize("arch, name", [(arch, name) for arch, names in GATE.items() for name in names])
def test_kernel_compiles_as_it_should_or_is_refused(arch, name):
    every = cross_compile.specimens(arch, every=name.endswith("-exact"))  # those are of smaller tiles
    specimen = next(s for s in every if s.label == name)
    found = compiled(specimen, arch)
    wrong = cross_compile.judge(specimen, arch, found)
    refusal = chips.missing(specimen.unit, arch, cross_compile.release())
    assert bool(wrong) is bool(refusal), (refusal, wrong, found)


def compiled(specimen, arch):
    if arch.startswith("sm_") and not cross_compile.disassembler().exists():
        pytest.skip("this build of triton comes without cuobjdump")
    return cross_compile.build(specimen, arch)


def test_weights_unpacked_in_registers_are_not_shuffled_byte_by_byte():
    """Triton 3.9 repacks 8-bit operands by the byte in its prefetch pass on sm_80; these kernels escape it."""
    specimen = next(s for s in cross_compile.specimens("sm_80") if s.label == "w4a8")
    found = compiled(specimen, "sm_80").opcodes
    assert found["PRMT"] < 2 * found["IMMA"]


@pytest.mark.parametrize("place", [0, 1])
def test_int32_sums_stay_in_flight_on_hopper(place):
    """One product runs on while the next one starts; Triton's own waits for each, which the last line shows."""
    every = cross_compile.specimens("sm_90", every=True)
    flying = [specimen for specimen in every if specimen.label == "gemm_flight"]
    found = compiled(flying[place], "sm_90")
    assert cross_compile.judge(flying[place], "sm_90", found) == []
    assert pending(found) == [1, 0] and len(flying) == 2
    if place:  # two programs of a multiprocessor: registers and shared memory of both
        assert 2 * found.registers * 32 * flying[1].warps <= 65536
        assert 2 * (found.shared + 1024) <= 228 * 1024


def test_triton_waits_for_each_product_of_int8():
    """Why `flight` exists; one that no longer does makes it superfluous."""
    specimen = next(s for s in cross_compile.specimens("sm_90") if s.label == "gemm_tma-i8")
    assert set(pending(compiled(specimen, "sm_90"))) == {0}


def pending(found):
    """Products that may go on at each wait, in the order of the code."""
    return [int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", found.text)]


@pytest.mark.parametrize("arch, fast", [("sm_80", True), ("sm_90", True), ("gfx942", False)])
def test_gelu_is_one_slow_instruction_of_nvidia(arch, fast):
    found = compiled(next(s for s in cross_compile.specimens(arch) if s.label == "gemm-i8"), arch)
    assert ("tanh.approx.f32" in found.text) is fast


@pytest.mark.parametrize("arch", cross_compile.CHIPS)
def test_the_gate_names_kernels_that_exist(arch):
    labels = {specimen.label for specimen in cross_compile.specimens(arch)}
    assert {name for name in GATE[arch] if not name.endswith("-exact")} <= labels
    assert len(labels) == len(cross_compile.specimens(arch))


def test_the_gate_notices_what_it_is_there_for(monkeypatch):
    monkeypatch.setattr(cross_compile, "release", lambda: cross_compile.NEWEST)
    specimen = cross_compile.specimens("sm_90")[-1]
    good = cross_compile.Found(128, 0, 1000, 0, {specimen.opcode: 4, "FADD": 200}, "")
    assert cross_compile.judge(specimen, "sm_90", good) == []
    for change, said in (
        ({"stack": 64}, "spill"),
        ({"shared": 300_000}, "shared memory"),
        ({"tensor_columns": 576}, "tensor memory"),
        ({"opcodes": {"FADD": 200}}, f"no {specimen.opcode}"),
        ({"opcodes": {specimen.opcode: 1, "EXIT": 1}}, "empty"),
        ({"opcodes": {specimen.opcode: 1, "FADD": 200, "STL": 1}}, "spill"),
    ):
        found = cross_compile.Found(**(vars(good) | change))
        assert any(said in line for line in cross_compile.judge(specimen, "sm_90", found)), change


def test_releases_before_the_newest_may_spill_a_few_registers(monkeypatch):
    specimen = cross_compile.specimens("sm_90")[-1]
    found = cross_compile.Found(128, 8, 1000, 0, {specimen.opcode: 4, "FADD": 200, "STL": 2}, "")
    for release, wrong in (((3, 7), False), (cross_compile.NEWEST, True)):
        monkeypatch.setattr(cross_compile, "release", lambda release=release: release)
        assert bool(cross_compile.judge(specimen, "sm_90", found)) is wrong


def test_a_kernel_is_told_as_right_wrong_or_refused(monkeypatch):
    """A refusal of a kernel that would pass is wrong, too."""
    specimen = next(s for s in cross_compile.specimens("sm_100") if s.label == "gemm-i8")
    good = cross_compile.Found(128, 0, 1000, 0, {"UTCIMMA": 4, "FADD": 200}, "")
    bad = cross_compile.Found(128, 0, 1000, 0, {"IMMA": 4, "FADD": 200}, "")
    words = {}
    for found in (good, bad):
        monkeypatch.setattr(cross_compile, "build", lambda *args, found=found: found)
        for release in ((3, 7), (3, 8)):
            monkeypatch.setattr(cross_compile, "release", lambda release=release: release)
            words[found is good, release] = cross_compile.outcome(specimen, "sm_100")[0]
    assert words == {
        (True, (3, 7)): "WRONG",
        (True, (3, 8)): "ok",
        (False, (3, 7)): "refused",
        (False, (3, 8)): "WRONG",
    }
    monkeypatch.setattr(cross_compile, "build", lambda *args: 1 / 0)
    assert cross_compile.outcome(specimen, "sm_100") == (
        "WRONG",
        "not compiled: ZeroDivisionError: 'division by zero'",
    )


def test_the_kernels_of_each_chip_are_those_of_its_units():
    """So that a unit that a table grants or denies is compiled for."""
    for arch in cross_compile.CHIPS:
        units = {specimen.unit for specimen in cross_compile.specimens(arch)} - {""}
        assert units == {unit for unit in chips.WITHOUT if chips.missing(unit, arch) is None} | {"int8"}


def test_gaps_on_amd_are_those_that_are_written_down():
    """fp8 operands and block-scaled products are offered only where the list does not say that they are no use."""
    assert ("gfx942", "fp8") in AMD_GAPS and "gfx942" not in cross_compile.FP8
    for arch in ("gfx942", "gfx950"):
        assert (arch, "nvfp4") in AMD_GAPS and "nvfp4" not in configs.shipped(arch)["candidates"]
        assert not any(config["ASM"] for config in configs.candidates("w4a8", arch))
        assert not configs.candidates("gemm_tma", arch)
