"""Whether the Triton kernels of a GPU are right: each next to the truth, before anything is timed.

    tiles   products with every tile size that is timed or shipped       (`eval.gpu.tiles`)
    rows    kernels that round or unpack                                 (`eval.gpu.rounding`)
    layers  linears as a model runs them
    lab     kernels of this folder
    faults  the same checks with a fault put into the kernels, which they have to see   (`eval.gpu.faults`)
Nothing counts as right that was not run: each check ends as right, wrong or skipped, with a reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dq import kernels, layers
from dq.kernels import Tensors, dense, reference, triton
from dq.kernels.triton import chips, configs, linear
from dq.kernels.triton.routes import rounds_again
from dq.plan import LayerPlan, TensorPlan
from eval.gpu import rounding, tiles
from eval.gpu.tiles import poisoned

PAIRS = (
    ("int8/channel", "int8/token"), ("int8/channel", "int8a/token"), ("int8a/channel", "int8/token"),
    ("int8/channel", "int8/tensor/static"), ("int4/channel", "int8/token"), ("int4a/channel", "int8/token"),
    ("int4/channel", "int8a/token/dynamic/0.171875"), ("int4/group:64", "int8/token"),
    ("int4/group:64", "int4/group:64"), ("int4/group:64", "int4a/group:64/dynamic/0.171875"),
    ("fp8/channel", "fp8/token"), ("nvfp4", "nvfp4"), ("int4/group:64", None), ("nvfp4", None), ("mxfp4", None),
)  # fmt: skip
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # of a rehearsal and of a visit
SHAPES = ((257, 200, 288), (33, 1152, 1024), (1024, 384, 320))


@dataclass(frozen=True)
class Outcome:
    """Of one check. wrong: what is; skipped: why it was not made; both "": right."""

    what: str
    wrong: str = ""
    skipped: str = ""


OUT_OF_TIME = "out of time"
known: dict[str, Outcome] = {}  # outcomes of a visit that goes on
until = [float("inf")]  # when, by time.monotonic, no check begins any more


def told(what: str, check: Callable[..., str], *args) -> Outcome:
    """Run a check that returns what is wrong; one that raises is wrong, too. One of `known` is not made again."""
    if what in known:
        return known[what]
    if time.monotonic() > until[0]:
        return Outcome(what, skipped=OUT_OF_TIME)
    try:
        return Outcome(what, wrong=check(*args))
    except Exception as error:
        return Outcome(what, wrong=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def counted(outcomes: list[Outcome]) -> str:
    """One line for all of them."""
    wrong, skipped = sum(bool(each.wrong) for each in outcomes), sum(bool(each.skipped) for each in outcomes)
    return f"{len(outcomes) - wrong - skipped} checks are right, {wrong} wrong, {skipped} skipped"


def sound(outcomes: list[Outcome]) -> bool:
    """Whether something was checked and nothing is wrong."""
    return any(not each.skipped for each in outcomes) and not any(each.wrong for each in outcomes)


def missing(unit: str, device: str) -> str:
    """Why products of a kind are not checked on a device, "" when they are; the interpreter has them all."""
    if device == "cpu":
        return ""
    import triton as compiler

    return chips.missing(unit, kernels.architecture(), chips.release(compiler.__version__)) or ""


# --- what is checked -------------------------------------------------------------------------------------------------


def check_tiles(device: str = DEVICE) -> Iterator[Outcome]:
    for problem in tiles.problems(configs.architecture(), device):
        reason = missing(problem.operands, device)
        yield Outcome(str(problem), skipped=reason) if reason else told(str(problem), tiles.check, problem)


def check_rows(device: str = DEVICE) -> Iterator[Outcome]:
    for name, width in rounding.cases():
        what, reason = f"rows to {name}, {width} columns", missing("fp8", device) if name == "fp8" else ""
        yield Outcome(what, skipped=reason) if reason else told(what, rounding.check_rows, name, width, device)
    for k in (64, 255, 3072):
        yield told(f"unpacking of int4, {k} columns", rounding.check_unpacking, k, device)
    for weight in rounding.DECODED:
        yield told(f"decoding of {weight}", rounding.check_decoding, weight, device)
    for k in (160, 3072):
        yield told(f"rows to nvfp4, {k} columns", rounding.check_blocks, k, device)


def check_layers(device: str = DEVICE) -> Iterator[Outcome]:
    for weight, act in PAIRS:
        for m, n, k in SHAPES:
            what, made = f"linear {weight} x {act}, {m}x{n}x{k}", layer(weight, act, (m, n, k), 16, device)
            reason = triton.why_not("linear", made[0], device)
            yield Outcome(what, skipped=reason) if reason else told(what, check_linear, *made)


def check_lab(device: str = DEVICE) -> Iterator[Outcome]:
    from eval.gpu import lab

    for what, unit, check, *args in lab.checks():
        reason = missing(unit, device)
        yield Outcome(what, skipped=reason) if reason else told(what, check, *args, device)


def check_faults(device: str = DEVICE) -> Iterator[Outcome]:
    from eval.gpu import faults

    for what, unit, check, *args in faults.checks(device):
        reason = missing(unit, device)
        yield Outcome(what, skipped=reason) if reason else told(what, check, *args)


CHECKS = {"tiles": check_tiles, "rows": check_rows, "layers": check_layers, "lab": check_lab, "faults": check_faults}


# --- layers ----------------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def layer(weight: str, act: str | None, shape: tuple[int, int, int], rank: int = 0, device: str = DEVICE):
    """-> (plan, tensors, x) of a random linear with m rows of k columns, n outputs."""
    m, n, k = shape
    plan = LayerPlan("linear", (n, k), TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, rank=rank)
    packed = layers.encode(randn(n, k, dtype=torch.float32, device=device), plan)
    down, up = (randn(rank, k, device=device) / k**0.5, randn(n, rank, device=device)) if rank else (None, None)
    stored = torch.full((1,), 0.02, device=device) if act and "static" in act else None
    extra = (packed.get("zero"), packed.get("scale_global"), randn(n, device=device) * k**0.5, stored, down, up)
    return plan, Tensors(packed["weight"], packed["scale"], *extra), randn(m, k, device=device)


def check_linear(plan: LayerPlan, t: Tensors, x: Tensor) -> str:
    """Relative error over all outputs at most 1.5 times that of torch in bf16 on the same rounded operands.

    That is 0.2 %, where a bias left out is 70 %, scales 2 % off are 2 %, and columns exchanged are 140 %. The largest
    single error is held to twice torch's.
    """
    with poisoned():
        ours = triton.build("linear", plan, None)(x, t)
    if rounds_again(plan) and len(x) > linear.REGISTER_ROWS:  # what such a layer is said to multiply
        plan, t = reference.rerounded(plan, t)
    truth = reference.build("linear", plan, None)(x.float(), t).double()
    rounded = reference.input_rounder(plan, -1)(x.float(), t.act_scale).to(x.dtype)
    theirs = F.linear(rounded, reference.weight_decoder(plan)(t).to(x.dtype), t.bias)
    theirs = theirs + dense.low_rank(x, t, plan, None)
    mine, other = ours.double() - truth, theirs.double() - truth
    error, room = mine.norm() / truth.norm(), 1.5 * other.norm() / truth.norm()
    most = 2 * other.abs().max()
    if not error <= room:
        return f"relative error {error:.3g}, at most {room:.3g} expected"
    return "" if mine.abs().max() <= most else f"off by {mine.abs().max():.3g}, at most {most:.3g} expected"
