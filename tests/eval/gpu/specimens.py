"""The kernels of `eval.gpu` to compile, see `tests.kernels.cross_compile`."""

from __future__ import annotations

from dq.kernels.triton import configs
from tests.kernels.cross_compile import FP8, Specimen, launched, tiled, unit

HADAMARD = {"gfx942": "v_mfma_f32", "gfx950": "v_mfma_f32"}  # NVIDIA: HMMA, tiles of 32 rows are below wgmma's 64
GATED = {"bias_p": "*bf16", "gate_p": "*bf16", "res_p": "*bf16", "out_p": "*bf16"}


def specimens(arch: str, every: bool = False) -> list[Specimen]:
    """The kernels as an architecture runs them; with `every`, each configuration, else the first."""
    made, kinds = _rows(arch), ["i8", "fp8e4nv"] if arch in FP8 else ["i8"]
    tiles = configs.nearest(arch)
    for name in ("gemm_branch", "gemm_tma_branch"):
        for config in configs.candidates(name, tiles)[: None if every else 1]:
            made += [_gated(name, config, arch, kind) for kind in kinds]
    return made


def _gated(name: str, config: configs.Config, arch: str, kind: str) -> Specimen:
    from eval.gpu import kernels

    name = name.replace("gemm", "gated_gemm").removesuffix("_branch")
    values, opcode, label = tiled(name, config, arch, kind)
    return Specimen(label, getattr(kernels, name), values | GATED, opcode, *launched(config), unit(kind))


def _rows(arch: str) -> list[Specimen]:
    """At the width of FLUX (3072)."""
    from eval.gpu import kernels

    rows = {"x_p": "*bf16", "smooth_p": "*fp32", "q_p": "*i8", "s_p": "*fp32", "TOP": 127.0, "FP8": False}
    rows |= {"BM": 1, "BK": 4096}
    norm = rows | {"weight_p": None, "bias_p": None, "scale_p": "*bf16", "shift_p": "*bf16", "y_p": "*bf16"}
    norm |= {"RMS": False}
    turned = rows | {"h_p": "*bf16", "H": 128, "BM": 32}
    made = [
        Specimen("gelu_quant", kernels.gelu_quant, rows, None, 8, 1),
        Specimen("adaln_quant", kernels.adaln_quant, norm, None, 8, 1),
        Specimen("had_quant", kernels.had_quant, turned, HADAMARD.get(arch, "HMMA"), 4, 2),
    ]
    eight = {"q_p": "*fp8e4nv", "TOP": 448.0, "FP8": True}
    return [*made, Specimen("adaln_quant-fp8", kernels.adaln_quant, norm | eight, None, 8, 1)] if arch in FP8 else made
