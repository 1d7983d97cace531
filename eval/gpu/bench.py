"""What a visit to a card measures, a function a piece; `eval.gpu.visit` calls them: right first, then how fast.

Contenders of a shape run in turn, each time is the median of its calls, from a CUDA graph where one can be captured,
because launches from Python take longer than small products; before each call the GPU's L2 is overwritten. A contender
that raises is noted with its error and is the base of no ratio. Which layers' kernels compete is asked of the backends
of dq.kernels, so a new one is timed without an edit here. Under TRITON_INTERPRET=1 all of it runs on the CPU with tiny
sizes and the host's clock: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from dq import kernels
from dq.errors import DQError
from dq.kernels import reference
from eval.gpu import checks
from eval.gpu.checks import DEVICE, layer, randn
from eval.gpu.tiles import FLIGHT, far

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS = 48 if REHEARSAL else 4608  # FLUX: 1024 x 1024 pixels and 512 tokens of text
# (outputs, inputs) of FLUX's linears: attention out, qkv, feed-forward up and down, single block in and out
FLUX = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
SHAPES = tuple((TOKENS, *sizes) for sizes in FLUX) + tuple((m, 3072, 3072) for m in (256, 1024, 2048, 8192, 16384))
ROWS = ((TOKENS, 3072), (TOKENS, 12288), (TOKENS, 15360), (1024, 1152))
CEILINGS = ((8192, 8192, 8192), (TOKENS, 12288, 3072))
HEADS = ((1, 24, TOKENS, 128), (2, 16, 4096, 64), (2, 16, 4096, 72), (1, 8, 16384, 64))
FEW = (1, 4, 16, 256, 4096)  # rows of weight-only layers
if REHEARSAL:
    FLUX, SHAPES, CEILINGS = ((64, 128),), ((TOKENS, 64, 128),), ((64, 64, 64),)
    ROWS, HEADS, FEW = ((TOKENS, 128),), ((1, 2, TOKENS, 64),), (1, 16)
L2_BYTES = 256 << 20  # more than the L2 of any card
COMPARED = 512  # rows of a tile's output next to the first tile's
CLOCK_HZ = 2e9  # at most, of a GPU: how many cycles it sleeps for a second
AHEAD_CYCLES = 400_000  # a GPU sleeps at least so long before a call: launches are queued when the clock starts


def in_turn(
    runs: Mapping[str, Callable[[], object]], seconds: float, failed: dict[str, str] | None = None
) -> dict[str, float]:
    """Median milliseconds of each call; one that raises is left out, told, and its error put into `failed`."""
    alive, failed = {}, {} if failed is None else failed
    for name, run in runs.items():
        try:
            alive[name] = ready(name, run)
        except Exception as error:  # a contender that this chip or torch does not have
            failed[name] = f"{type(error).__name__}: {first_line(error)}"
            print(f"  {name}: {failed[name]}")
    times: dict[str, list[float]] = {name: [] for name in alive}
    spent = 0.0
    least = 1 if REHEARSAL else 5
    while alive and (spent < 1000 * seconds * len(alive) or len(next(iter(times.values()))) < least):
        for name, (run, ahead) in alive.items():
            took = once_ms(run, ahead)
            spent += took
            times[name].append(took)
        if len(next(iter(times.values()))) >= 500:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]


@dataclass(frozen=True)
class Uncaptured:
    """A call that is timed as Python launches it, not from a graph."""

    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()


def ready(name: str, run: Callable[[], object]) -> tuple[Callable[[], object], int]:
    """-> (what to time, cycles to sleep before it): the replay of a graph, or the call itself where capturing fails.

    What the call raises comes through.
    """
    if REHEARSAL:
        run()
        return run, 0
    for _ in range(3):  # compiles, and settles whatever a first call does
        run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    ahead = ahead_cycles(time.perf_counter() - began)
    torch.cuda.synchronize()
    if isinstance(run, Uncaptured):
        return run, AHEAD_CYCLES  # what the host takes is a part of it
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


@cache
def flushed() -> torch.Tensor:
    """Memory that is written before a timed call, so that it finds nothing of the last one in the GPU's L2."""
    return torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")


def once_ms(run: Callable[[], object], ahead: int) -> float:
    if REHEARSAL:
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed().zero_()
    torch.cuda._sleep(ahead)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- 2. tile sizes ---------------------------------------------------------------------------------------------------


def tune(options: SimpleNamespace, note: Callable, eight: bool) -> None:
    """Tile sizes of fp8 products, or of those of integers: the fastest right ones go into the user's cache."""
    from dq.kernels.triton import configs

    arch = configs.architecture()
    for m, n, k in SHAPES:
        for kernel in (name for name in tuned() if name.endswith(":fp8") == eight):
            reason = checks.missing("fp8" if eight else "int8", DEVICE)
            if kernel == FLIGHT and REHEARSAL:
                reason = "the interpreter has no Gluon"
            if reason or not configs.candidates(kernel, arch):
                note("tune", kernel, (m, n, k), None, error=reason or f"no tile sizes on {arch}")
                continue
            if options.recorded(f"tune {kernel} {(m, n, k)}"):
                continue
            try:
                best, best_ms = configs.tune(kernel, m, n, k, timer(kernel, (m, n, k), options.seconds))
            except DQError as error:  # none of its tiles ran or was right
                note("tune", kernel, (m, n, k), None, error=first_line(error))
                continue
            note("tune", kernel, (m, n, k), best_ms, operations=2 * m * n * k, config=dict(best))
            options.finish(f"tune {kernel} {(m, n, k)}")


def tuned() -> list[str]:
    """Names of kernels as `configs` knows them, those of 8-bit products once for each type of operands."""
    products = ("gemm", "gemm_tma", "gemm_branch", "gemm_tma_branch")
    return [*products, *(f"{name}:fp8" for name in products), "w4a8", "w4a8_groups", FLIGHT]


def timer(
    kernel: str, shape: tuple[int, int, int], seconds: float, device: str = DEVICE
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
        if name == FLIGHT:
            from dq.kernels.triton import flight  # here: Gluon does not load everywhere

            run = partial(flight.launch, x, w, epilogue, config)
        some = run()[:: -(-m // COMPARED)].double()
        first.append(some)
        wrong = far(some, first[0], 1)
        if wrong:
            raise DQError(f"its output differs from that of another tile: {wrong}")
        return in_turn({kernel: run}, seconds / 10)[kernel]

    return time_ms


# --- timings ---------------------------------------------------------------------------------------------------------


def ceilings(options: SimpleNamespace, note: Callable) -> None:
    """What the card does at most: a copy, and products of torch's libraries on ready operands."""
    size = (64 if REHEARSAL else 1 << 15), 4096
    x, y = (torch.empty(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    record("copy", size, {"copy": partial(y.copy_, x)}, 0, options, note, moved=4 * x.numel())
    for m, n, k in CEILINGS:
        a, b, one = randn(m, k), randn(n, k), partial(torch.ones, device=DEVICE)
        runs: dict[str, Callable[[], object]] = {"bf16 F.linear": partial(F.linear, a, b)}
        qa, qb = (each.clamp(-3, 3).to(torch.float8_e4m3fn) for each in (a, b))
        for name, scales in {"tensor": (one(()), one(())), "rows": (one(m, 1), one(1, n))}.items():
            runs[f"_scaled_mm {name}"] = partial(
                torch._scaled_mm, qa, qb.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        runs["_int_mm"] = partial(torch._int_mm, a.to(torch.int8), b.to(torch.int8).t())
        record("ceiling", (m, n, k), runs, 2 * m * n * k, options, note)


def gemm(options: SimpleNamespace, note: Callable) -> None:
    """8-bit products on ready codes, beside torch's."""
    from dq.kernels.triton import ops

    for m, n, k in SHAPES:
        runs = {"bf16 F.linear": partial(F.linear, randn(m, k), randn(n, k), randn(n))}
        for form in ("int8", "fp8"):
            _, t, x = layer(f"{form}/channel", f"{form}/token", (m, n, k))
            eight = form == "fp8"
            try:
                codes = ops.quant_rows(x, ops.RowFormat(ops.FP8_TOP if eight else ops.INT8_TOP))
            except Exception as error:  # fp8 before sm_89
                note("gemm", f"{form} gemm", (m, n, k), None, error=first_line(error))
                continue
            weight, epilogue = ops.Codes(t.weight.view(codes.q.dtype), t.scale), ops.Epilogue(torch.bfloat16, t.bias)
            runs[f"{form} gemm"] = partial(ops.w8a8_gemm, codes, weight, epilogue)
            runs[f"{form} gemm + gelu"] = partial(ops.w8a8_gemm, codes, weight, epilogue._replace(gelu=True))
            if eight:
                scales = {"scale_a": codes.scale, "scale_b": t.scale.reshape(1, -1), "out_dtype": torch.bfloat16}
                for fast in (True, False):
                    name = "_scaled_mm rows" + (", fast sums" if fast else "")
                    runs[name] = partial(torch._scaled_mm, codes.q, weight.q.t(), **scales, use_fast_accum=fast)
            else:
                runs["_int_mm"] = partial(torch._int_mm, codes.q, weight.q.t())
        record("gemm", (m, n, k), runs, 2 * m * n * k, options, note)


LAYERS = (
    ("int8/channel", "int8/token", 0), ("fp8/channel", "fp8/token", 0), ("int4/channel", "int8/token", 0),
    ("int4/group:64", "int8/token", 0), ("int4/group:64", "int4/group:64", 32), ("nvfp4", "nvfp4", 0),
    ("mxfp8", "mxfp8", 0),
)  # fmt: skip
WEIGHT_ONLY = (("int8/channel", None, 0), ("int4/group:64", None, 0), ("nvfp4", None, 0), ("mxfp4", None, 0))


def linears(options: SimpleNamespace, note: Callable) -> None:
    """Layers as a model runs them, rounding included, on every backend that takes them."""
    compared(LAYERS, SHAPES, options, note)


def weight_only(options: SimpleNamespace, note: Callable) -> None:
    """Few and many rows of weight-only layers at FLUX's widths."""
    compared(WEIGHT_ONLY, [(m, *sizes) for sizes in FLUX[:3] for m in FEW], options, note)


def compared(formats, shapes, options: SimpleNamespace, note: Callable) -> None:
    for m, n, k in shapes:
        for weight, act, rank in formats:
            what = f"linear {weight} x {act or 'floating point'}" + f", rank {rank}" * bool(rank)
            try:
                plan, t, x = layer(weight, act, (m, n, k), rank)
            except Exception as error:  # a format that this dq does not have
                note(what, "dq", (m, n, k), None, error=first_line(error))
                continue
            runs: dict[str, Callable[[], object]] = {"bf16 F.linear": partial(F.linear, x, randn(n, k), randn(n))}
            about, truth = {}, reference.build("linear", plan, None)(x[:COMPARED].float(), t).double()
            for name, reason in kernels.asked("linear", plan, DEVICE, backend="auto").items():
                if reason:
                    note(what, name, (m, n, k), None, error=reason)
                    continue
                module = kernels.backends()[name]
                runs[name] = later(partial(module.build, "linear", plan, None), x, t)
                about[name] = {
                    "kernel": module.label("linear", plan),
                    "emulated": kernels.emulates(name, "linear", plan),
                }
                about[name] |= off(runs[name], truth)
            record(what, (m, n, k), runs, 2 * m * n * k, options, note, about)


def off(run: Callable[[], Any], truth: torch.Tensor) -> dict[str, float]:
    """Distance of the first rows from the reference's, relative; {} of a contender that raises, whose row says why."""
    try:
        y = run()[: len(truth)].double()
    except Exception:
        return {}
    return {"off": ((y - truth).norm() / truth.norm()).item()}


def later(make: Callable[[], Callable], *args) -> Callable[[], object]:
    """A call that builds what it runs the first time, so that one that fails stops no other."""
    made = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0](*args)

    return run


def quantizers(options: SimpleNamespace, note: Callable) -> None:
    """Kernels that round, beside a copy: GB/s."""
    from dq.kernels.triton import ops
    from eval.gpu import launches

    for m, k in ROWS:
        x, scale, shift, copy = randn(m, k), randn(1, k), randn(1, k), torch.empty(m, k, device=DEVICE).bfloat16()
        modulation = launches.Modulation(scale, shift, m)
        signs = (torch.ones(128, 128, device=DEVICE).tril() * 2 - 1).bfloat16()
        runs = {
            "copy": partial(copy.copy_, x),
            "quant_rows": partial(ops.quant_rows, x, ops.RowFormat()),
            "gelu_quant": partial(launches.gelu_quant, x, shift=0.171875),
            "quant_groups": partial(ops.quant_rows, x, ops.RowFormat(7, group=64, split=64)),
            "adaln_quant": partial(launches.adaln_quant, x, launches.Norm(), modulation),
            "had_quant": partial(launches.had_quant, x, signs),
            "nvfp4_quant": partial(ops.nvfp4_quant, x),
        }
        record("rows", (m, k), runs, 0, options, note, moved=3 * x.numel())


def attention(options: SimpleNamespace, note: Callable) -> None:
    """torch's attention, every backend of diffusers, and what `dq.fusions.backends` chooses on this card."""
    for heads in HEADS:
        batch, count, length, size = heads
        q, k, v = (randn(batch, length, count, size) for _ in range(3))
        runs: dict[str, Callable[[], Any]] = {"bf16 SDPA": partial(by_torch, q, k, v)}
        for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            runs[f"bf16 {backend.lower()}"] = partial(by_torch, q, k, v, backend)
        truth, more, about = by_torch(q.float(), k.float(), v.float()).double(), *dispatched(heads, (q, k, v), note)
        runs |= more
        for name, run in runs.items():
            about[name] = about.get(name, {}) | off(run, truth)
        record("attention", heads, runs, 4 * batch * count * length * length * size, options, note, about)


def dispatched(heads: tuple[int, ...], ready: tuple[torch.Tensor, ...], note: Callable) -> tuple[dict, dict]:
    """-> (runs, fields of their rows): diffusers' attention backends that are there and dq's choice among them.

    Those that are not there have a row with the reason. Without diffusers there are none.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
    except ImportError as error:
        note("attention", "diffusers", heads, None, error=first_line(error))
        return {}, {}
    from dq.fusions import backends

    runs, wanted = {}, backends.choose(DEVICE)[0]
    for each in AttentionBackendName:
        reason = backends.why_not(each.value)
        if reason:
            note("attention", f"diffusers {each.value}", heads, None, error=reason)
            continue
        runs[f"diffusers {each.value}"] = partial(dispatch_attention_fn, *ready, backend=each)
    runs["dq"] = partial(dispatch_attention_fn, *ready, backend=backends.entry(None))
    return runs, {"dq": {"kernel": wanted if backends.takes(wanted, *ready) else backends.NATIVE}}


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Heads (batch, rows, heads, channels) as diffusers has them -> the same; backend: None leaves it to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
        return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def block(options: SimpleNamespace, note: Callable) -> None:
    """A FLUX block of own arithmetic on fused kernels, beside bf16."""
    from eval.gpu.block import Size, contenders

    size = Size(heads=1, head=64, picture=16, text=16, device=DEVICE) if REHEARSAL else Size()
    for name, shape, operations, runs in contenders(size):
        record(f"{name} block", shape, runs, operations, options, note)


def record(
    what: str, shape: tuple[int, ...], runs: Mapping, operations: int, options, note: Callable, about=None, moved=0
) -> None:
    """Time contenders in turn; ratios are to the first of `runs`, and there are none where that one did not run.

    about  more fields by contender; moved: bytes that a call reads and writes
    """
    if options.recorded(f"{what} {shape}"):
        return
    failed: dict[str, str] = {}
    found, about = in_turn(runs, options.seconds, failed), about or {}
    for name in runs:
        more = dict(about.get(name, {}))
        if name not in found:
            note(what, name, shape, None, error=failed.get(name, "not timed"), **more)
            continue
        ms = found[name]
        more |= {"gb_s": round(moved / ms / 1e6, 1)} if moved else {}
        note(what, name, shape, ms, operations=operations, **more, **ratio(found, next(iter(runs)), ms))
    options.finish(f"{what} {shape}")


def ratio(found: Mapping[str, float], first: str, ms: float) -> dict[str, float]:
    """How many times faster than the first contender, {} without a time of it."""
    return {"ratio": round(found[first] / ms, 3)} if first in found else {}
