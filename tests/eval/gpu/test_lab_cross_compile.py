"""The gate of `tests.test_cross_compile` for the kernels of `eval.gpu`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton.language")

from dq.kernels.triton import chips
from tests.eval.gpu.specimens import specimens
from tests.kernels import cross_compile
from tests.kernels.test_cross_compile import compiled

pytestmark = pytest.mark.slow  # seconds a kernel, of kernels that no user runs

GATE = {
    "sm_80": ("gated_gemm-i8",),
    "sm_86": ("had_quant",),
    "sm_89": ("adaln_quant-fp8",),
    "sm_90": ("gelu_quant", "adaln_quant", "had_quant", "gated_gemm_tma-fp8e4nv"),
    "sm_100": ("gated_gemm_tma-fp8e4nv",),
    "sm_103": ("gated_gemm_tma-i8", "gated_gemm_tma-fp8e4nv"),
    "sm_120": ("gated_gemm-i8",),
    "gfx942": (),
    "gfx950": ("gated_gemm-i8",),
}  # fmt: skip


@pytest.mark.parametrize("arch, name", [(arch, name) for arch, names in GATE.items() for name in names])
def test_kernel_compiles_as_it_should_or_is_refused(arch, name):
    specimen = next(s for s in specimens(arch) if s.label == name)
    found = compiled(specimen, arch)
    wrong = cross_compile.judge(specimen, arch, found)
    refusal = chips.missing(specimen.unit, arch, cross_compile.release())
    assert bool(wrong) is bool(refusal), (refusal, wrong, found)


@pytest.mark.parametrize("arch", cross_compile.CHIPS)
def test_the_gate_names_kernels_that_exist(arch):
    labels = [specimen.label for specimen in specimens(arch)]
    assert set(GATE[arch]) <= set(labels) and len(labels) == len(set(labels))
