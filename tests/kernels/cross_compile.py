"""Compile a Triton kernel for a GPU that is not there, and read what came out: registers, stack, opcodes, memory.

`specimens(arch)` are the kernels with the argument types of real calls and the tile sizes of the shipped
configurations; `build` compiles one, `judge` says what is wrong with it.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dq.kernels.triton import chips, configs

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_103": 232448}
SHARED |= {"sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
NEWEST = (3, 9)  # release whose kernels spill nothing
SPILLED = 40  # bytes that others may: a few registers once a tile, right and hardly slower
TENSOR_COLUMNS = 512  # of tensor memory, sm_100
FEWEST = 100  # opcodes of a kernel that does something; a failed compilation can leave an empty one behind
INT8 = {"sm_80": "IMMA", "sm_86": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_120": "IMMA"}
INT8 |= {"sm_100": "UTCIMMA", "sm_103": "UTCIMMA"}
FP8 = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "sm_103": "UTCQMMA", "sm_120": "QMMA"}
FP4 = {"sm_100": "UTCOMMA", "sm_103": "UTCOMMA", "sm_120": "OMMA"}
INT8 |= {"gfx942": "v_mfma_i32", "gfx950": "v_mfma_i32"}
FP8 |= {"gfx950": "v_mfma_f32_32x32x64_f8f6f4"}
BARE = {"bias_p": "*bf16", "xd_p": None, "up_p": None, "out_p": "*bf16", "GELU": 1, "CHUNKS": 0, "CHUNK": 16}
WHOLE = BARE | {"xd_p": "*bf16", "up_p": "*bf16", "GELU": 0, "CHUNKS": 1, "CHUNK": 32}
PLAIN = {"zx_p": None, "wsum_p": None, "zw_p": None, "qsum_p": None}
SIZES = ("M", "N", "K", "R", "tokens", "gate_pitch", "pitch", "KP", "KB", "V", "W", "WP", "L", "LK", "LP", "groups")
SIZES += ("blocks", "quads", "H", "G", "batch_pitch", "token_pitch")
REALS = ("shift", "part", "eps", "norm", "factor")


@dataclass(frozen=True)
class Specimen:
    """One kernel to compile. values: argument -> type of a tensor or descriptor, None, or a compile-time constant.

    label: name without tile sizes, tile: those. opcode: what must appear, None where there is no matrix product.
    unit: matrix unit of the product, as `chips.missing` knows it, "" without one.
    """

    label: str
    kernel: object
    values: dict = field(hash=False)
    opcode: str | None
    warps: int = 4
    stages: int = 3
    tile: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Found:
    """What a compilation gave. opcodes: counts of the disassembly, {} on AMD. text: assembly of AMD, PTX of NVIDIA."""

    registers: int
    stack: int
    shared: int
    tensor_columns: int
    opcodes: dict[str, int]
    text: str


def target(arch: str):
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def build(specimen: Specimen, arch: str) -> Found:
    """Compile for `arch`; whatever the compiler raises comes through."""
    import triton

    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(specimen.kernel.arg_names):
        value = specimen.values[name] if name in specimen.values else _size(name)
        if isinstance(value, str):
            signature[name] = value
            if value[0] == "*" or value == "i32":
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(i,)] = "constexpr", value
    source = _source(specimen.kernel)(specimen.kernel, signature, constants, hints)
    options = {"num_warps": specimen.warps, "enable_fp_fusion": True}
    options |= {"num_stages": specimen.stages} if specimen.stages else {}
    compiled = triton.compile(source, target=target(arch), options=options)
    return _read_nvidia(compiled) if arch.startswith("sm_") else _read_amd(compiled)


def _source(kernel) -> type:
    """What the compiler takes, of Triton or of Gluon."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    return GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource


def _size(name: str) -> str:
    if name in SIZES:
        return "i32"
    assert name in REALS, f"say what {name} is"
    return "fp32"


def release() -> chips.Release:
    """Of the Triton that compiles."""
    import triton

    return chips.release(triton.__version__)


def disassembler() -> Path:
    """Triton's own cuobjdump; with several releases on the path that of the last, which knows the newest chips."""
    import triton

    inside = "backends/nvidia/bin/cuobjdump"
    found = [path for path in (Path(place) / "triton" / inside for place in sys.path) if path.exists()]
    return found[-1] if found else Path(triton.__file__).parent / inside


def _read_nvidia(compiled) -> Found:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [disassembler(), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text, re.MULTILINE)
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    opcodes = dict(collections.Counter(names))
    ptx = compiled.asm["ptx"]
    return Found(int(registers), int(stack), compiled.metadata.shared, columns, opcodes, ptx)


def _read_amd(compiled) -> Found:
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Found(int(registers[1]), int(spilled[1]) if spilled else 0, compiled.metadata.shared, 0, {}, text)


def judge(specimen: Specimen, arch: str, found: Found) -> list[str]:
    """What is wrong with a compiled kernel, [] if nothing is."""
    wrong, some = [], release() < NEWEST and found.stack <= SPILLED
    if (found.stack or any(found.opcodes.get(name) for name in ("LDL", "STL"))) and not some:
        wrong.append(f"registers spill: {found.stack} bytes of stack")
    if found.shared > SHARED[arch]:
        wrong.append(f"{found.shared} bytes of shared memory, {SHARED[arch]} are there")
    if found.tensor_columns > TENSOR_COLUMNS:
        wrong.append(f"{found.tensor_columns} columns of tensor memory, {TENSOR_COLUMNS} are there")
    length = sum(found.opcodes.values()) if found.opcodes else len(found.text.splitlines())
    if length <= FEWEST:
        wrong.append(f"{length} instructions: an empty kernel")
    seen = found.opcodes if found.opcodes else found.text
    if specimen.opcode and specimen.opcode not in seen:
        wrong.append(f"no {specimen.opcode}")
    return wrong


# --- what is compiled ------------------------------------------------------------------------------------------------


def specimens(arch: str, every: bool = False) -> list[Specimen]:
    """The kernels as an architecture runs them; with `every`, each of its shipped configurations, else the first."""
    made, tiles = [*_elementwise(arch), *_unpacking()], configs.nearest(arch)
    for name in configs.shipped(tiles)["candidates"]:
        for config in configs.candidates(name, tiles)[: None if every else 1]:
            made += _products(name, config, arch)
    return made


def _products(name: str, config: configs.Config, arch: str) -> list[Specimen]:
    """The kernel of a table of configurations, with int8 and where the chip has it fp8 operands."""
    if name == "gemm_flight":
        return [_flight(config)]
    if name.startswith("gemm"):
        made = [_gemm(name, config, arch, kind) for kind in (["i8", "fp8e4nv"] if arch in FP8 else ["i8"])]
        return made + _promoted(made[-1], config, arch)
    return [_w4a8(name, config, arch) if name.startswith("w4a8") else _nvfp4(config, arch)]


def launched(config: configs.Config) -> tuple[int, int, str]:
    """Warps, stages and tile of a configuration, as a specimen takes them."""
    tile = "x".join(str(config[key]) for key in ("BM", "BN", "BK") if key in config)
    return config["warps"], config["stages"], f"{tile}, {config['warps']} warps, {config['stages']} stages"


def tiled(name: str, config: configs.Config, arch: str, kind: str) -> tuple[dict, str, str]:
    """Operands and tiles of an 8-bit product (named gemm_tma... or gemm...), its instruction and its label."""
    values = {key: config[key] for key in ("BM", "BN", "BK", "GROUP")} | {"FP8": kind != "i8", "SHORT": None}
    if "_tma" in name:
        a, b = (f"tensordesc<{kind}[{config[rows]}, {config['BK']}]>" for rows in ("BM", "BN"))
        values |= {"a": a, "b": b, "PROGRAMS": 132}
    else:
        values |= {"a_p": f"*{kind}", "b_p": f"*{kind}", "RAGGED": False}
    return values | {"sx_p": "*fp32", "sw_p": "*fp32"}, (INT8 if kind == "i8" else FP8)[arch], f"{name}-{kind}"


def unit(kind: str) -> str:
    """The matrix unit that multiplies operands of a type."""
    return "int8" if kind == "i8" else "fp8"


def _gemm(name: str, config: configs.Config, arch: str, kind: str) -> Specimen:
    from dq.kernels.triton import gemm

    values, opcode, label = tiled(name, config, arch, kind)
    values |= {**PLAIN, **(WHOLE if name.endswith("_branch") else BARE)}
    values["GELU"] = 2 if values["GELU"] and arch.startswith("sm_") else values["GELU"]
    kernel = gemm.gemm_tma if "_tma" in name else gemm.gemm
    return Specimen(label, kernel, values, opcode, *launched(config), unit(kind))


def _promoted(fp8: Specimen, config: configs.Config, arch: str) -> list[Specimen]:
    """With exact sums, where they take a second accumulator."""
    from dq.kernels.triton import ops

    if arch != "sm_90" or config["BM"] * config["BN"] > ops.PROMOTED_TILE:
        return []
    return [replace(fp8, label=f"{fp8.label}-exact", values=fp8.values | {"SHORT": ops.PROMOTED})]


def _flight(config: configs.Config) -> Specimen:
    from dq.kernels.triton import flight

    values = {key: config[key] for key in ("BM", "BN", "BK", "GROUP")} | {"S": config["stages"], "W": config["warps"]}
    for name, rows in (("a", config["BM"]), ("b", config["BN"])):
        values[name] = f"tensordesc<i8[{rows}, {config['BK']}],{flight.shared(rows, config['BK'])!r}>"
    values |= {"sx_p": "*fp32", "sw_p": "*fp32", **PLAIN, "bias_p": "*bf16", "out_p": "*bf16", "GELU": 2}
    warps, _, tile = launched(config)
    return Specimen("gemm_flight", flight.gemm_flight, values, "IGMMA", warps, 0, tile, "int8")


def _w4a8(name: str, config: configs.Config, arch: str) -> Specimen:
    from dq.kernels.triton import packed

    values = {"a_p": "*i8", "b_p": "*i8", "sx_p": "*fp32", "sw_p": "*fp32", **PLAIN, **WHOLE, "RAGGED": False}
    values |= {key: bool(config[key]) if key in ("ASM", "SWAP") else config[key] for key in config}
    if name == "w4a8_groups":
        kernel, values = packed.w4a8_groups, values | {"G": 64, "TOKEN": True}
    else:
        kernel = packed.w4a8
    return Specimen(name, kernel, values, INT8[arch], *launched(config), "int8")


def _nvfp4(config: configs.Config, arch: str) -> Specimen:
    from dq.kernels.triton import nvfp4

    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    values = {"gx_p": "*fp32", "gw_p": "*fp32", **WHOLE, "BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "PROGRAMS": 148}
    values |= {"a": f"tensordesc<u8[{bm}, {bk // 2}]>", "b": f"tensordesc<u8[{bn}, {bk // 2}]>"}
    values |= {f"{x}_scale": f"tensordesc<u8[1, {b // 128}, {bk // 64}, 2, 256]>" for x, b in (("a", bm), ("b", bn))}
    return Specimen("nvfp4", nvfp4.nvfp4_gemm, values, FP4[arch], *launched(config), "nvfp4")


def _elementwise(arch: str) -> list[Specimen]:
    """Kernels without tile sizes of their own, at the width of FLUX (3072)."""
    from dq.kernels.triton import mxfp8, nvfp4, quantize

    rows = {"x_p": "*bf16", "s_p": "*fp32", "TOP": 127.0, "FP8": False, "SPLIT": 0, "q_p": "*i8", "z_p": None}
    rows |= {"sum_p": None, "given_p": None, "AFFINE": False, "BM": 1, "BK": 4096, "K": "i32", "G": 1}
    affine, long = rows | {"AFFINE": True, "z_p": "*i32"}, rows | {"BK": 16384}
    groups = rows | {"G": "i32", "BM": 32, "BK": 64, "SPLIT": 64}
    made = [
        Specimen("quant_rows", quantize.quant_rows, rows, None, 8, 1),
        Specimen("quant_rows-affine", quantize.quant_rows, affine, None, 8, 1),
        Specimen("quant_groups", quantize.quant_rows, groups, None, 4, 1),
        Specimen("quant_long_rows", quantize.quant_long_rows, long, None, 16, 1),
    ]
    if arch in FP8:
        eight = {"q_p": "*fp8e4nv", "TOP": 448.0, "FP8": True}
        made += [Specimen("quant_rows-fp8", quantize.quant_rows, rows | eight, None, 8, 1)]
    if arch in FP4:
        four = {"x_p": "*bf16", "q_p": "*u8", "scale_p": "*u8", "g_p": "*fp32", "BM": 1, "BK": 4096}
        eights = {"x_p": "*bf16", "q_p": "*fp8e4nv", "scale_p": "*u8", "BV": mxfp8.TILE["BV"]}
        tiles = {"s_p": "*u8", "out_p": "*u8", "BN": 128, "BB": 32}
        made += [
            Specimen("nvfp4_quant", nvfp4.nvfp4_quant, four, None, 8, 1),
            Specimen("tile_scales", nvfp4.tile_scales, tiles, None, 4, 1),
            Specimen("mxfp8_blocks", mxfp8.mxfp8_blocks, eights, None, mxfp8.TILE["warps"], mxfp8.TILE["stages"]),
        ]
    return made


def _unpacking() -> list[Specimen]:
    from dq.kernels.triton import packed

    block = {"b_p": "*i8", "scale_p": "*fp32", "BN": 16, "BB": 128, "G": 64}
    code = {"b_p": "*i8", "times_p": None, "out_p": "*i8", "G": 1, "BN": 16, "BB": 128}
    few = {"x_p": "*bf16", "b_p": "*i8", "scale_p": "*fp32", "zero_p": None, "bias_p": "*bf16", "out_p": "*bf16"}
    few |= {"BITS": 8, "G": 0, "BM": 16, "BN": 16, "BK": 256}
    real = block | {"zero_p": None, "global_p": None, "out_p": "*bf16", "FORMAT": 0}
    fp4 = real | {"scale_p": "*i8", "global_p": "*fp32", "FORMAT": 1, "G": 16}
    return [
        Specimen("w4_to_s8", packed.w4_to_s8, code, None, 4, 1),
        Specimen("w4_to_s8-two-level", packed.w4_to_s8, code | {"times_p": "*i8", "G": 64}, None, 4, 1),
        Specimen("w4_to_s8-rounded", packed.w4_to_s8, code | {"times_p": "*fp32", "G": 64}, None, 4, 1),
        Specimen("few_rows-int8", packed.few_rows, few, None, 4, 3),
        Specimen("few_rows-int4", packed.few_rows, few | {"BITS": 4, "G": 64}, None, 4, 3),
        Specimen("w4_to_bf16", packed.w4_to_float, real, None, 4, 1),
        Specimen("nvfp4_to_bf16", packed.w4_to_float, fp4, None, 4, 1),
        Specimen("weight_sums", packed.weight_sums, block | {"out_p": "*fp32", "BITS": 4}, None, 4, 1),
    ]


def outcome(specimen: Specimen, arch: str) -> tuple[str, str]:
    """-> ("ok" | "refused" | "WRONG", what there is to say) of one kernel.

    A kernel whose unit `chips.missing` refuses is compiled all the same: one that would pass is refused for nothing.
    """
    refusal = chips.missing(specimen.unit, arch, release())
    try:
        found = build(specimen, arch)
        wrong = "; ".join(judge(specimen, arch, found))
        size = f"{found.registers} registers, {found.stack} B stack, {found.shared} B shared"
    except Exception as error:  # whatever the compiler raises is a finding
        wrong, size = f"{type(error).__name__}: {str(error)[:200]!r}", "not compiled"
    if refusal:
        return ("refused", f"{refusal} ({wrong})") if wrong else ("WRONG", f"{size}: refused, and it would pass")
    return ("WRONG", f"{size}: {wrong}") if wrong else ("ok", size)


def listed(arch: str, lab: bool, first: bool) -> Iterator[Specimen]:
    yield from specimens(arch, every=not first)
    if lab:
        from tests.eval.gpu import specimens as more

        yield from more.specimens(arch, every=not first)


def main() -> None:
    """Compile everything and print a line each; the exit code is 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.cross_compile", description=main.__doc__)
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(CHIPS)}; without any: all")
    parser.add_argument(
        "--triton", help="folder of another release: pip install --no-deps --target FOLDER triton==3.7.1"
    )
    parser.add_argument("--lab", action="store_true", help="the kernels of eval.gpu, too")
    parser.add_argument("--first", action="store_true", help="the first configuration of each kernel alone")
    options = parser.parse_args()
    if options.triton:
        sys.path.insert(0, options.triton)  # before triton is imported
    began, counts = time.monotonic(), collections.Counter()
    for arch in options.chips or CHIPS:
        for specimen in listed(arch, options.lab, options.first):
            word, said = outcome(specimen, arch)
            counts[word] += 1
            print(f"{word} {arch} {specimen.label} {specimen.tile}: {said}", flush=True)
    seconds = time.monotonic() - began
    print(f"triton {chips.dotted(release())}: {dict(counts)} in {seconds:.0f} s", flush=True)
    raise SystemExit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
