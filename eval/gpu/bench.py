"""The Triton kernels on a GPU: right first, then how fast: `python -m eval.gpu.bench [--parts check tune ...]`.

1. check       every kernel next to the truth (`eval.gpu.checks`): what is wrong and what was skipped is told, and the
               exit code is 1 when something is wrong or nothing was checked
2. tune        all shipped tile sizes at the shapes below; the fastest that is right goes into the user's cache
               (`configs.cache_file`), int8 and fp8 apart
3. gemm        int8 and fp8, quantization apart and included, next to bf16 and `torch._scaled_mm` by rows
4. w4          4-bit weights unpacked in registers and to a workspace, in groups, and decoded for bf16
5. rows        quantization kernels: GB/s next to a copy
6. attention   int8 queries and keys, values in fp16 and fp8, next to torch's
7. block       a single and a double block of FLUX on fused kernels, next to compiled bf16 and torchao (`block`)
Contenders of a shape run in turn, each time is the median of its calls, from a CUDA graph where one can be captured,
because launches from Python take longer than small products; rows go to gpu_kernels.json in eval/results or --out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dq.errors import DQError
from eval.experiments import rows
from eval.gpu import checks
from eval.gpu.checks import layer, randn
from eval.gpu.lab import quantized_heads
from eval.gpu.tiles import far

FILE = "gpu_kernels.json"
KEYS = ("what", "contender", "shape", "machine")
PARTS = ("check", "tune", "gemm", "w4", "rows", "attention", "block")
TOKENS = 4608  # FLUX: 1024 x 1024 pixels and 512 tokens of text
# (outputs, inputs) of FLUX's linears: attention out, qkv, feed-forward up and down, single block in and out
FLUX = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
SHAPES = tuple((TOKENS, *sizes) for sizes in FLUX) + tuple((m, 3072, 3072) for m in (256, 1024, 2048, 8192, 16384))
HEADS = ((1, 24, TOKENS, 128), (2, 16, 4096, 64), (2, 16, 4096, 72), (1, 8, 16384, 64))
COMPARED = 512  # rows of a tile's output next to the first tile's
CLOCK_HZ = 2e9  # at most, of a GPU: how many cycles it sleeps for a second
AHEAD_CYCLES = 400_000  # a GPU sleeps at least so long before a call: launches are queued when the clock starts


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call; one that raises is left out and told."""
    alive = {}
    for name, run in runs.items():
        try:
            alive[name] = ready(name, run)
        except Exception as error:  # a contender that this chip or torch does not have
            print(f"  {name}: {type(error).__name__}: {first_line(error)}")
    times: dict[str, list[float]] = {name: [] for name in alive}
    spent = 0.0
    while alive and (spent < 1000 * seconds * len(alive) or len(next(iter(times.values()))) < 5):
        for name, (run, ahead) in alive.items():
            took = once_ms(run, ahead)
            spent += took
            times[name].append(took)
        if len(next(iter(times.values()))) >= 500:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


def ready(name: str, run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """-> (what to time, cycles to sleep before it): the replay of a graph, or the call itself where capturing fails.

    What the call raises comes through.
    """
    for _ in range(3):  # compiles, and settles whatever a first call does
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    ahead = ahead_cycles(time.perf_counter() - began)
    torch.cuda.synchronize()
    try:
        return captured(run), AHEAD_CYCLES
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  {name}: no graph, {first_line(error)}")
        return run, ahead


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a graph of one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ahead_cycles(host_seconds: float) -> int:
    """How long the GPU has to sleep while the host queues a call, with room for a slow one."""
    return max(AHEAD_CYCLES, int(2 * CLOCK_HZ * host_seconds))


def once_ms(run: Callable[[], object], ahead: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(ahead)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- 1. right --------------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, note: Callable) -> None:
    """Print what is wrong and what was skipped; SystemExit(1) at the end of the bench unless all is sound."""
    found = []
    for outcome in checks.check_all(tuple(options.checks)):
        found.append(outcome)
        if outcome.wrong or outcome.skipped:
            word, why = ("WRONG", outcome.wrong) if outcome.wrong else ("skipped", outcome.skipped)
            print(f"{word} {outcome.what}: {why}", flush=True)
    print(checks.counted(found), flush=True)
    options.sound = checks.sound(found)


# --- 2. tile sizes ---------------------------------------------------------------------------------------------------


def tune(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import configs

    arch = configs.architecture()
    for m, n, k in SHAPES:
        for kernel in tuned():
            reason = checks.missing("fp8" if kernel.endswith(":fp8") else "int8", "cuda")
            if reason or not configs.candidates(kernel, arch):
                continue
            try:
                best, best_ms = configs.tune(kernel, m, n, k, timer(kernel, (m, n, k), options.seconds))
            except DQError as error:  # none of its tiles ran or was right
                print(f"  {first_line(error)}")
                continue
            note("tune", kernel, (m, n, k), best_ms, operations=2 * m * n * k, config=dict(best))


def tuned() -> list[str]:
    """Names of kernels as `configs` knows them, those of 8-bit products once for each type of operands."""
    products = ("gemm", "gemm_tma", "gemm_branch", "gemm_tma_branch")
    return [*products, *(f"{name}:fp8" for name in products), "w4a8", "w4a8_groups"]


def timer(
    kernel: str, shape: tuple[int, int, int], seconds: float, device: str = "cuda"
) -> Callable[[Mapping[str, int]], float]:
    """-> time_ms(configuration) of one kernel; DQError for a configuration whose output differs from the first one's.

    Codes of fp8 are whole numbers up to 3, whose sums are exact; so outputs of right tiles agree to a unit of the last
    place, and `checks` compares those of small shapes with the truth.
    """
    from dq.kernels.triton import ops

    (m, n, k), (name, _, kind) = shape, kernel.partition(":")
    bound, dtype = (3, ops.E4M3) if kind else (127, torch.int8)

    def codes(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-bound, bound + 1, (rows, columns), device=device).to(dtype)

    group, w4 = 64 if name.endswith("groups") else 0, name.startswith("w4")
    x = ops.Codes(codes(m, k), torch.rand(m, 1, device=device) / bound)
    scale = torch.rand(n, k // group if group else 1, device=device) / bound / k**0.5
    w = ops.Codes(codes(n, k // 2 if w4 else k), scale)
    branch = (randn(m, 32, device=device), randn(n, 32, device=device)) if name.endswith("_branch") else (None, None)
    epilogue, first = ops.Epilogue(torch.bfloat16, randn(n, device=device), *branch), []

    def time_ms(config: Mapping[str, int]) -> float:
        run = partial(ops.launch_gemm, x, w, epilogue, "tma" in name, config)
        if w4:
            run = partial(ops.launch_w4a8, x, w, epilogue, group, config)
        some = run()[:: -(-m // COMPARED)].double()
        first.append(some)
        wrong = far(some, first[0], 1)
        if wrong:
            raise DQError(f"its output differs from that of another tile: {wrong}")
        return in_turn({kernel: run}, seconds / 10)[kernel]

    return time_ms


# --- 3. - 6. timings -------------------------------------------------------------------------------------------------


def gemm(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import ops

    for m, n, k in SHAPES:
        runs = {"bf16 F.linear": partial(F.linear, randn(m, k), randn(n, k), randn(n))}
        for form in ("int8", "fp8"):
            plan, t, x = layer(f"{form}/channel", f"{form}/token", (m, n, k))
            runs |= whole(f"{form} layer", plan, t, x)
            eight = form == "fp8"
            try:
                codes = ops.quant_rows(x, ops.RowFormat(ops.FP8_TOP if eight else ops.INT8_TOP))
            except Exception as error:  # fp8 before sm_89
                print(f"  {form}: {str(error).splitlines()[0][:120]}")
                continue
            weight, epilogue = ops.Codes(t.weight.view(codes.q.dtype), t.scale), ops.Epilogue(torch.bfloat16, t.bias)
            runs[f"{form} gemm"] = partial(ops.w8a8_gemm, codes, weight, epilogue)
            runs[f"{form} gemm + gelu"] = partial(ops.w8a8_gemm, codes, weight, epilogue._replace(gelu=True))
            if eight:
                scales = {"scale_a": codes.scale, "scale_b": t.scale.reshape(1, -1), "out_dtype": torch.bfloat16}
                for fast in (True, False):
                    name = "_scaled_mm rows" + (", fast sums" if fast else "")
                    runs[name] = partial(torch._scaled_mm, codes.q, weight.q.t(), **scales, use_fast_accum=fast)
        record("gemm", (m, n, k), runs, 2 * m * n * k, options, note)


def whole(name: str, plan, t, x) -> dict[str, Callable[[], object]]:
    """The layer as a model runs it, if the backend takes it."""
    from dq.kernels import triton

    reason = triton.why_not("linear", plan, "cuda")
    if reason:
        print(f"  {name}: {reason}")
        return {}
    return {name: partial(triton.build("linear", plan, None), x, t)}


def w4(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import linear, ops

    for m, n, k in SHAPES:
        runs = {"bf16 F.linear": partial(F.linear, randn(m, k), randn(n, k), randn(n))}
        plan, t, x = layer("int4/channel", "int8/token", (m, n, k))
        build, usual = linear.build(plan), linear.REGISTER_ROWS

        def rows_from(rows: int, build=build, x=x, t=t) -> torch.Tensor:
            linear.REGISTER_ROWS = rows
            return build(x, t)

        runs["int4 channel, registers"] = partial(rows_from, 1 << 30)
        runs["int4 channel, workspace"] = partial(rows_from, 0)
        runs["unpack alone"] = partial(ops.w4_to_s8, t.weight, k=k)
        for act in ("int8/token", "int4/group:64", None):
            runs |= whole(f"int4 group:64 x {act}", *layer("int4/group:64", act, (m, n, k)))
        runs |= whole("svdquant int4 rank 32", *layer("int4/group:64", "int4/group:64", (m, n, k), rank=32))
        runs |= whole("nvfp4 x nvfp4", *layer("nvfp4", "nvfp4", (m, n, k)))
        record("w4", (m, n, k), runs, 2 * m * n * k, options, note)
        linear.REGISTER_ROWS = usual


def quantizers(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import ops
    from eval.gpu import launches

    for m, k in ((TOKENS, 3072), (TOKENS, 12288), (TOKENS, 15360), (1024, 1152)):
        x, scale, shift, copy = randn(m, k), randn(1, k), randn(1, k), torch.empty(m, k, device="cuda").bfloat16()
        modulation = launches.Modulation(scale, shift, m)
        signs = (torch.ones(128, 128, device="cuda").tril() * 2 - 1).bfloat16()
        runs = {
            "copy": partial(copy.copy_, x),
            "quant_rows": partial(ops.quant_rows, x, ops.RowFormat()),
            "gelu_quant": partial(launches.gelu_quant, x, shift=0.171875),
            "quant_groups": partial(ops.quant_rows, x, ops.RowFormat(7, group=64, split=64)),
            "adaln_quant": partial(launches.adaln_quant, x, launches.Norm(), modulation),
            "had_quant": partial(launches.had_quant, x, signs),
        }
        found = in_turn(runs, options.seconds)
        for name, ms in found.items():
            moved = x.numel() * (4 if name == "copy" else 3)
            note("rows", name, (m, k), ms, gb_s=round(moved / ms / 1e6, 1), **ratio(found, "copy", ms))


def attention(options: argparse.Namespace, note: Callable) -> None:
    from eval.gpu import launches

    for batch, count, length, size in HEADS:
        q, k, v = (randn(batch, length, count, size) for _ in range(3))
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        runs = {"bf16 SDPA": partial(F.scaled_dot_product_attention, *turned)}
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            runs[f"bf16 {backend.lower()}"] = partial(with_backend, backend, turned)
        for eight in (False, True):
            name = "attn_i8, " + ("fp8" if eight else "fp16") + " values"
            try:
                ready = quantized_heads(q, k, v, eight)
            except Exception as error:  # fp8 before sm_89
                print(f"  {name}: {str(error).splitlines()[0][:120]}")
                continue
            runs[name] = partial(launches.attn_i8, *ready, count, torch.bfloat16)
            runs[f"{name}, quantization included"] = partial(all_of_attention, q, k, v, eight)
        shape = (batch, count, length, size)
        record("attention", shape, runs, 4 * batch * count * length * length * size, options, note)


def with_backend(name: str, heads: list[torch.Tensor]) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(*heads)


def all_of_attention(q, k, v, eight: bool) -> torch.Tensor:
    from eval.gpu import launches

    return launches.attn_i8(*quantized_heads(q, k, v, eight), q.shape[2], torch.bfloat16)


def block(options: argparse.Namespace, note: Callable) -> None:
    from eval.gpu.block import contenders

    for name, shape, operations, runs in contenders():
        record(f"{name} block", shape, runs, operations, options, note)


def record(what: str, shape: tuple[int, ...], runs: Mapping, operations: int, options, note: Callable) -> None:
    """Time contenders in turn; ratios are to the first of `runs`, and there are none where that one did not run."""
    found = in_turn(runs, options.seconds)
    for name, ms in found.items():
        note(what, name, shape, ms, operations=operations, **ratio(found, next(iter(runs)), ms))


def ratio(found: Mapping[str, float], first: str, ms: float) -> dict[str, float]:
    """How many times faster than the first contender, {} without a time of it."""
    return {"ratio": round(found[first] / ms, 3)} if first in found else {}


def noting(file: Path) -> Callable:
    """-> note(what, contender, shape, ms, operations=0, **figures), which writes a row and prints it."""
    import triton

    stamp = rows.stamp("cuda")
    stamp["versions"]["triton"] = triton.__version__

    def note(what: str, contender: str, shape: tuple[int, ...], ms: float, operations: int = 0, **more) -> None:
        row = {"what": what, "contender": contender, "shape": list(shape), "ms": round(ms, 5), **more}
        row |= {"tera_ops": round(operations / ms / 1e9, 1)} if operations else {}
        rows.add(file, row | stamp, KEYS)
        figures = " ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "contender", "shape"))
        print(f"{what} {contender} {'x'.join(map(str, shape))}: {figures}", flush=True)

    return note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="of GPU time per contender and shape")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--checks", nargs="+", default=list(checks.CHECKS), choices=tuple(checks.CHECKS))
    parser.add_argument("--out", type=Path, default=rows.FOLDER, help=f"folder of {FILE}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("eval.gpu.bench: no CUDA device is visible; run it on a machine with a GPU", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    note, options.sound = noting(options.out / FILE), True
    run = {"check": check, "tune": tune, "gemm": gemm, "w4": w4, "rows": quantizers}
    run |= {"attention": attention, "block": block}
    for part in options.parts:
        run[part](options, note)
    raise SystemExit(0 if options.sound else 1)


if __name__ == "__main__":
    main()
