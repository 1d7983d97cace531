"""Products with every tile size that is timed or shipped, next to exact ones.

Codes are whole numbers whose sums every accumulator holds exactly, Hopper's of e4m3 with its 14 bits included; so sums
are equal to the bit, and after the epilogue a bf16 output is at most one unit of its last place off, two after GELU.
Problems end inside of a tile in each direction, or give a resident program several tiles; memory that a kernel leaves
unwritten holds NaN (`poisoned`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dq.formats import get
from dq.kernels.triton import configs, ops
from dq.kernels.triton.elements import INTERPRETED
from dq.kernels.triton.ops import E4M3, Blocks, Codes, Epilogue

FAST_GELU = 8 * 2**-11.98  # error of `gelu_tanh`'s fast form for inputs up to 8, beyond which its tanh is 1
RANK = 40  # of a low-rank branch: one chunk of 32 columns and a part of another
FLIGHT = "gemm_flight"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills memory that nobody wrote: NaN, in integers the largest number."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own products, which are not what is checked
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            torch.utils.deterministic.fill_uninitialized_memory = filling


def ulps(y: Tensor, truth: Tensor) -> float:
    """Largest distance of bf16 values from the rounded truth, in units of the last place of the truth.

    A result that cancels is as exact as its terms are: there the last place is that of the largest value.
    """
    truth, rounded = truth.double(), truth.bfloat16().double()
    unit = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=2.0**-126))) - 7)
    distance = (y.double() - rounded).abs()
    return torch.where(distance <= truth.abs().max() * 2**-20, 0.0, distance / unit).max().item()


def unequal(y: Tensor, truth: Tensor) -> str:
    """Where y is not the truth to the bit, "" where it is."""
    off = (y.double() != truth.double()).nonzero()
    if not len(off):
        return ""
    place = tuple(off[0].tolist())
    return f"{len(off)} of {y.numel()} differ, the first at {place}: {y[place].item()} for {truth[place].item()}"


def far(y: Tensor, truth: Tensor, most: int, room: float = 0.0) -> str:
    """By how much bf16 values are more than `most` units off, "" when they are not. room: that nobody asks after."""
    off = y.double() - truth.double()
    found = ulps(torch.where(off.abs() <= room, truth.double(), y.double() - room * off.sign()) if room else y, truth)
    return "" if found <= most else f"off by {found:.3g} units of the last place of bf16, at most {most} expected"


def split_order(k: int, block: int) -> Tensor:
    """Input column of each column that is stored with the even ones of every `block` first."""
    return torch.arange(k).reshape(-1, block // 2, 2).transpose(1, 2).reshape(-1)


# --- problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A product (m, k) x (n, k) with a kernel of a table of configurations, on a device. operands: "int8" or "fp8"."""

    kernel: str
    config: configs.Config
    shape: tuple[int, int, int]
    operands: str
    device: str

    @property
    def size(self) -> int:
        """Elements of a tile."""
        return self.config["BM"] * self.config["BN"]

    @cached_property
    def numbers(self) -> torch.Generator:
        """Whose draws follow one another: operands drawn alike would hide what is exchanged."""
        return torch.Generator(self.device).manual_seed(sum(self.shape))

    def __str__(self) -> str:
        tile = "x".join(str(self.config[key]) for key in ("BM", "BN", "BK") if key in self.config)
        return f"{self.kernel} {self.operands} {tile}, {'x'.join(map(str, self.shape))}"


UNITS = {"nvfp4": ("nvfp4",), "w4a8": ("int8",), "w4a8_groups": ("int8",), FLIGHT: ("int8",)}


def problems(arch: str, device: str, kernels: tuple[str, ...] | None = None) -> Iterator[Problem]:
    """Every tile of the kernels (None: of all) that an architecture has, with its operands and two shapes each.

    Without Gluon's in the interpreter, which has none.
    """
    for kernel in configs.shipped(arch)["candidates"]:
        if (kernels is not None and kernel not in kernels) or (kernel == FLIGHT and INTERPRETED.value):
            continue
        for config in configs.candidates(kernel, arch):
            for operands in UNITS.get(kernel, ("int8", "fp8")):
                for shape in shapes(kernel, config):
                    yield Problem(kernel, config, shape, operands, device)


def shapes(kernel: str, config: configs.Config) -> list[tuple[int, int, int]]:
    """One that ends inside of tiles, one of whole tiles, more than there are multiprocessors."""
    bm, bn, bk = config["BM"], config["BN"], config.get("BK", 128)
    ragged = bk + {"gemm": 37, "gemm_branch": 37, "w4a8": 35, "w4a8_groups": 64, "nvfp4": 96}.get(kernel, 48)
    many = "tma" in kernel or kernel == "nvfp4"  # these have resident programs that walk the tiles
    rows = configs.multiprocessors() // 4 + 1 if many else 2
    return [(bm + 9, bn + 24, ragged), (rows * bm, 4 * bn, 2 * bk) if many else (2 * bm, 2 * bn, 2 * bk)]


def whole(p: Problem, rows: int, k: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, (rows, k), device=p.device, generator=p.numbers)


def real(p: Problem, *shape: int) -> Tensor:
    return torch.randn(*shape, device=p.device, generator=p.numbers)


def positive(p: Problem, *shape: int) -> Tensor:
    """In 0.5 .. 1.5."""
    return torch.rand(*shape, device=p.device, generator=p.numbers) + 0.5


def endings(p: Problem) -> Iterator[tuple[Epilogue, Callable[[Tensor], Tensor], tuple[int, float]]]:
    """(epilogue, what it makes of scaled sums, units of the last place and what else it may be off) in bf16."""
    m, n, _ = p.shape
    bias = real(p, n).bfloat16()
    if p.kernel.endswith("_branch") or p.kernel in ("w4a8", "w4a8_groups", "nvfp4"):
        down_x, up = real(p, m, RANK).bfloat16(), real(p, n, RANK).bfloat16() / 4
        branch = down_x.double() @ up.double().t()
        yield Epilogue(torch.bfloat16, bias, down_x, up), lambda y: y + branch + bias.double(), (1, 0.0)
    else:
        gelu = Epilogue(torch.bfloat16, bias, gelu=True)
        room = FAST_GELU if ops.gelu_kind(gelu) == 2 else 0.0
        yield gelu, lambda y: F.gelu(y + bias.double(), approximate="tanh"), (2, room)


# --- checks ----------------------------------------------------------------------------------------------------------


def check(p: Problem) -> str:
    """What is wrong with a tile, "" if nothing is."""
    if p.kernel == "nvfp4":
        return _check_blocks(p)
    if p.kernel == "w4a8_groups":
        return _check_groups(p)
    return _check_codes(p)


def _check_codes(p: Problem) -> str:
    """Sums of 8-bit or int4 codes, with zero points and all that follows."""
    (m, n, k), four = p.shape, p.kernel == "w4a8"
    bound = 3 if p.operands == "fp8" else 127
    q, w = whole(p, m, k, -bound, bound), whole(p, n, k, -8 if four else -bound, 7 if four else bound)
    sums, one, launch = q.double() @ w.double().t(), partial(torch.ones, device=p.device), partial(_launch, p)
    x, y = Codes(_stored(p, q), one(m)), Codes(_weight(p, w), one(n))
    wrong = unequal(launch(x, y, Epilogue(torch.float32)), sums)
    if wrong:
        return f"sums: {wrong}"
    sx, sw = positive(p, m), positive(p, n) / sums.std().float()  # as large as bias and branch are
    for epilogue, ending, most in endings(p):
        scaled = x._replace(scale=sx), y._replace(scale=sw)
        wrong = far(launch(*scaled, epilogue), ending(sums * sx[:, None].double() * sw.double()), *most)
        if wrong:
            return wrong
        if p.operands == "int8" and m < 2 * p.config["BM"]:
            wrong = _check_zeros(p, (q, w), scaled, (epilogue, ending, most))
    return wrong


def _check_zeros(p: Problem, codes: tuple, scaled: tuple, end: tuple) -> str:
    """Zero points of rows, then of columns. codes: whole numbers; scaled: operands; end: as of `endings`."""
    (q, w), (x, y), (epilogue, ending, most) = codes, scaled, end
    scales = x.scale[:, None].double() * y.scale.double()
    zx, zw = whole(p, len(q), 1, -90, 90)[:, 0], whole(p, len(w), 1, -7, 7)[:, 0]
    rows = _launch(p, x._replace(zero=zx.int()), y._replace(sums=w.sum(1).int()), epilogue)
    columns = _launch(p, x._replace(sums=q.sum(1).int()), y._replace(zero=zw.to(torch.int8)), epilogue)
    a, b = q.double() - zx[:, None].double(), w.double() - zw[:, None].double()
    return far(rows, ending(a @ w.double().t() * scales), *most) or far(
        columns, ending(q.double() @ b.t() * scales), *most
    )


def _stored(p: Problem, q: Tensor) -> Tensor:
    """Codes of activations in the order and type that the kernel reads."""
    if p.kernel == "w4a8":
        width = ops.up_to(q.shape[1], 128)
        return F.pad(q, (0, width - q.shape[1]))[:, split_order(width, 128)].to(torch.int8)
    return q.to(E4M3) if p.operands == "fp8" else q.to(torch.int8)


def _weight(p: Problem, w: Tensor) -> Tensor:
    if p.kernel == "w4a8":
        return get("int4").pack(w.to(torch.int8))
    return w.to(E4M3) if p.operands == "fp8" else w.to(torch.int8)


def _launch(p: Problem, x: Codes, w: Codes, epilogue: Epilogue) -> Tensor:
    with poisoned():
        if p.kernel == "w4a8":
            return ops.launch_w4a8(x, w, epilogue, 0, p.config)
        if p.kernel == FLIGHT:
            from dq.kernels.triton import flight  # here: Gluon does not load everywhere

            return flight.launch(x, w, epilogue, p.config)
        return ops.launch_gemm(x, w, epilogue, "tma" in p.kernel, p.config)


def _check_groups(p: Problem) -> str:
    """int4 weights with a scale a group, activations with one a row or the same groups."""
    (m, n, k), group = p.shape, 64
    width, groups = ops.up_to(k, group), -(-k // group)
    q, w = whole(p, m, k, -127, 127), whole(p, n, k, -8, 7)
    stored = F.pad(q, (0, width - k))[:, split_order(width, group)].to(torch.int8)
    packed, size = get("int4").pack(w.to(torch.int8)), (q.double() @ w.double().t()).std().float()
    sw = positive(p, n, groups) / size
    for sx in (positive(p, m, 1), positive(p, m, groups)):
        a = q.double() * sx.double().repeat_interleave(k if sx.shape[1] == 1 else group, 1)[:, :k]
        truth = a @ (w.double() * sw.double().repeat_interleave(group, 1)[:, :k]).t()
        for epilogue, ending, most in endings(p):
            with poisoned():
                y = ops.launch_w4a8(Codes(stored, sx), Codes(packed, sw), epilogue, group, p.config)
            wrong = far(y, ending(truth), *most)
            if wrong:
                return wrong
    return ""


def tiled(scale: Tensor) -> Tensor:
    """Scale bytes (rows, blocks) in the tiles of 128 rows x 4 blocks that block-scaled units read."""
    rows, blocks = scale.shape
    padded = F.pad(scale, (0, -blocks % 4, 0, -rows % 128))
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).contiguous()


def _blocks(p: Problem, rows: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random e2m1 codes and powers of two as their scales -> (bytes, tiles of scale bytes, values fp64)."""
    code, power = whole(p, rows, k, 0, 15), whole(p, rows, k // 16, -2, 2)
    value = torch.tensor(E2M1, device=p.device, dtype=torch.float64)[code & 7] * (1.0 - 2.0 * (code >> 3))
    bytes_ = (code[:, ::2] | (code[:, 1::2] << 4)).to(torch.uint8)
    step = torch.exp2(power.float())
    return bytes_, tiled(step.to(E4M3).view(torch.uint8)), value * step.double().repeat_interleave(16, 1)


def _check_blocks(p: Problem) -> str:
    m, n, k = p.shape
    (q, sx, x), (w, sw, y) = _blocks(p, m, k), _blocks(replace(p, shape=(n, m, k)), n, k)
    gx, gw = positive(p, m), (1 / (x @ y.t()).std()).float().reshape(1)
    truth = x @ y.t() * gx[:, None].double() * gw.double()
    for epilogue, ending, most in endings(p):
        with poisoned():
            found = ops.launch_nvfp4(Blocks(q, sx, gx), Blocks(w.view(torch.int8), sw, gw), epilogue, p.config)
        wrong = far(found, ending(truth), *most)
        if wrong:
            return wrong
    return ""
