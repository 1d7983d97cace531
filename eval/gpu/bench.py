"""The Triton kernels on a GPU: right first, then how fast: `python -m eval.gpu.bench [--seconds 0.3] [--parts ...]`.

1. correct     every kernel against the reference; one that is wrong is told, and the exit code is 1
2. tune        all shipped tile sizes at the shapes below; the fastest go into the user's cache (`configs.cache_file`)
3. gemm        int8 and fp8, quantization apart and included, next to bf16 and `torch._scaled_mm` by rows
4. w4          4-bit weights unpacked in registers and to a workspace, in groups, and decoded for bf16
5. rows        quantization kernels: GB/s next to a copy
6. attention   int8 queries and keys, values in fp16 and fp8, next to torch's
7. block       a single and a double block of FLUX on fused kernels, next to compiled bf16 and torchao (`block`)
Contenders of a shape run in turn, each time is the median of its calls; rows go to eval/results/gpu_kernels.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version

import torch
import torch.nn.functional as F

from eval.experiments import rows
from eval.gpu.checks import check_all, layer, quantized_heads, randn

FILE = rows.FOLDER / "gpu_kernels.json"
KEYS = ("what", "contender", "shape", "machine")
PARTS = ("tune", "gemm", "w4", "rows", "attention", "block")
TOKENS = 4608  # FLUX: 1024 x 1024 pixels and 512 tokens of text
# (outputs, inputs) of FLUX's linears: attention out, qkv, feed-forward up and down, single block in and out
FLUX = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
SHAPES = tuple((TOKENS, *sizes) for sizes in FLUX) + tuple((m, 3072, 3072) for m in (256, 1024, 2048, 8192, 16384))
HEADS = ((1, 24, TOKENS, 128), (2, 16, 4096, 64), (2, 16, 4096, 72), (1, 8, 16384, 64))
AHEAD_CYCLES = 400_000  # the GPU sleeps so long before a call, that the launches are queued when the clock starts


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each call; one that raises is left out and told."""
    alive = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
            alive[name] = run
        except Exception as error:  # a contender that this chip or torch does not have
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    times: dict[str, list[float]] = {name: [] for name in alive}
    spent = 0.0
    while alive and (spent < 1000 * seconds * len(alive) or len(next(iter(times.values()))) < 5):
        for name, run in alive.items():
            took = once_ms(run)
            spent += took
            times[name].append(took)
        if len(next(iter(times.values()))) >= 500:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def once_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- 2. tile sizes ---------------------------------------------------------------------------------------------------


def tune(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import configs

    arch = configs.architecture()
    for m, n, k in SHAPES:
        for kernel in ("gemm", "gemm_tma", "gemm_branch", "gemm_tma_branch", "w4a8", "w4a8_groups"):
            if not configs.candidates(kernel, arch):
                continue
            best, best_ms = configs.tune(kernel, m, n, k, timer(kernel, m, n, k, options.seconds))
            note("tune", kernel, (m, n, k), best_ms, operations=2 * m * n * k, config=dict(best))


def timer(kernel: str, m: int, n: int, k: int, seconds: float) -> Callable[[Mapping[str, int]], float]:
    """-> time_ms(configuration) of one kernel on int8 operands."""
    from dq.kernels.triton import ops

    def codes(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-127, 128, (rows, columns), device="cuda").to(torch.int8)

    group = 64 if kernel.endswith("groups") else 0
    x = ops.Codes(codes(m, k), torch.rand(m, 1, device="cuda"))
    scale = torch.rand(n, k // group if group else 1, device="cuda")
    w = ops.Codes(codes(n, k // 2 if kernel.startswith("w4") else k), scale)
    branch = (randn(m, 32), randn(n, 32)) if kernel.endswith("_branch") else (None, None)
    epilogue = ops.Epilogue(torch.bfloat16, randn(n), *branch)

    def time_ms(config: Mapping[str, int]) -> float:
        if kernel.startswith("w4"):
            run = partial(ops.launch_w4a8, x, w, epilogue, group, config)
        else:
            run = partial(ops.launch_gemm, x, w, epilogue, "tma" in kernel, config)
        run()
        return in_turn({"it": run}, seconds / 10)["it"]

    return time_ms


# --- 3. - 6. timings -------------------------------------------------------------------------------------------------


def gemm(options: argparse.Namespace, note: Callable) -> None:
    from dq.kernels.triton import ops

    for m, n, k in SHAPES:
        runs = {"bf16 F.linear": partial(F.linear, randn(m, k), randn(n, k), randn(n))}
        for form in ("int8", "fp8"):
            plan, t, x = layer(f"{form}/channel", f"{form}/token", m, n, k)
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
        plan, t, x = layer("int4/channel", "int8/token", m, n, k)
        build, usual = linear.build(plan), linear.REGISTER_ROWS

        def rows_from(rows: int, build=build, x=x, t=t) -> torch.Tensor:
            linear.REGISTER_ROWS = rows
            return build(x, t)

        runs["int4 channel, registers"] = partial(rows_from, 1 << 30)
        runs["int4 channel, workspace"] = partial(rows_from, 0)
        runs["unpack alone"] = partial(ops.w4_to_s8, t.weight, k=k)
        for act in ("int8/token", "int4/group:64", None):
            runs |= whole(f"int4 group:64 x {act}", *layer("int4/group:64", act, m, n, k))
        runs |= whole("svdquant int4 rank 32", *layer("int4/group:64", "int4/group:64", m, n, k, rank=32))
        runs |= whole("nvfp4 x nvfp4", *layer("nvfp4", "nvfp4", m, n, k))
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
            note("rows", name, (m, k), ms, gb_s=round(moved / ms / 1e6, 1), ratio=round(found["copy"] / ms, 3))


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
    """Time contenders in turn; ratios are to the first one."""
    found = in_turn(runs, options.seconds)
    first = next(iter(found.values()))
    for name, ms in found.items():
        note(what, name, shape, ms, operations=operations, ratio=round(first / ms, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="of GPU time per contender and shape")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("eval.gpu.bench: no CUDA device is visible; run it on a machine with a GPU", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    stamp = rows.stamp("cuda")
    stamp["versions"]["triton"] = version("triton")

    def note(what: str, contender: str, shape: tuple[int, ...], ms: float, operations: int = 0, **more) -> None:
        row = {"what": what, "contender": contender, "shape": list(shape), "ms": round(ms, 5), **more}
        row |= {"tera_ops": round(operations / ms / 1e9, 1)} if operations else {}
        rows.add(FILE, row | stamp, KEYS)
        figures = " ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "contender", "shape"))
        print(f"{what} {contender} {'x'.join(map(str, shape))}: {figures}", flush=True)

    wrong = [(what, problem) for what, problem in check_all() if problem]
    for what, problem in wrong:
        print(f"WRONG {what}: {problem}", flush=True)
    print(f"{len(wrong)} kernels are wrong" if wrong else "every kernel agrees with the reference", flush=True)
    run = {"tune": tune, "gemm": gemm, "w4": w4, "rows": quantizers, "attention": attention, "block": block}
    for part in options.parts:
        run[part](options, note)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
