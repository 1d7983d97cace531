"""The gate of `tests.test_cross_compile` for the kernels of `eval.gpu`."""

from __future__ import annotations

from importlib.metadata import version

import pytest

pytest.importorskip("triton.language")

from dq.kernels.triton import configs
from tests.eval.gpu.specimens import specimens
from tests.kernels import cross_compile
from tests.kernels.test_cross_compile import compiled

pytestmark = pytest.mark.slow  # seconds a kernel, of kernels that no user runs

GATE = {
    "sm_80": ("attention_128", "gated_gemm-i8"),
    "sm_89": ("attention_64-pv8",),
    "sm_90": (
        "gelu_quant", "adaln_quant", "had_quant", "qk_norm_rope_quant", "k_sums", "v_fp8", "attention_128-pv8",
        "gated_gemm_tma-fp8e4nv",
    ),
    "sm_100": ("attention_128",),
    "sm_120": ("attention_128",),
    "gfx942": (),
    "gfx950": ("attention_128",),
}  # fmt: skip
OLDER = {("3.6", "sm_100", "attention_128"): ["no UTCIMMA"]}


@pytest.mark.parametrize("arch, name", [(arch, name) for arch, names in GATE.items() for name in names])
def test_kernel_compiles_as_it_should(arch, name):
    specimen = next(s for s in specimens(arch) if s.label == name)
    found = compiled(specimen, arch)
    release = ".".join(version("triton").split(".")[:2])
    assert cross_compile.judge(specimen, arch, found) == OLDER.get((release, arch, name), []), found


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_the_gate_names_kernels_that_exist(arch):
    labels = [specimen.label for specimen in specimens(arch)]
    assert set(GATE[arch]) <= set(labels) and len(labels) == len(set(labels))
