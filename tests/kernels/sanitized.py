"""Run by test_cpu_kernels under AddressSanitizer: every kernel on ragged shapes, through the library given."""

import itertools
import sys
from pathlib import Path

import torch

from dq.kernels.cpu import compile as source

source.LIBRARY = Path(sys.argv[1])

from dq import kernels, layers  # noqa: E402
from dq.kernels import Tensors  # noqa: E402
from dq.kernels.cpu import attention, library, ops  # noqa: E402
from dq.plan import LayerPlan, TensorPlan  # noqa: E402

assert library.missing() is None, library.missing()
ALL = library.LEVELS[: library.LEVELS.index(library.level()) + 1]
LEVELS = [name for i, name in enumerate(ALL) if i and library.library().dq_cpu_levels() >> i & 1]
PLAIN = kernels.Conv((1, 1), (0, 0), (1, 1), 1)


def run(kind, shape, weight, act, x, conv=None, rank=0):
    p = LayerPlan(kind, shape, TensorPlan.parse(weight), TensorPlan.parse(act) if act else None, rank=rank)
    packed = layers.encode(torch.randn(p.rows, p.columns), p)
    t = Tensors(
        packed["weight"],
        packed["scale"],
        packed.get("zero"),
        scale_global=packed.get("scale_global"),
        bias=torch.randn(shape[0]).to(x.dtype),
    )
    if rank:
        t = t._replace(down=torch.randn(rank, p.columns).to(x.dtype), up=torch.randn(shape[0], rank).to(x.dtype))
    op = "linear" if kind == "linear" else "conv"
    assert kernels.cpu.why_not(op, p, "cpu", conv) is None
    kernels.cpu.build(op, p, conv)(x, t)


torch.manual_seed(0)
for level, rows, columns, outputs in itertools.product(LEVELS, (1, 7, 40), (4, 61, 192), (1, 64, 77)):
    ops.level = lambda level=level: level
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(rows, columns).to(dtype)
        run("linear", (outputs, columns), "int8/channel", "int8a/token", x, rank=2)
        run("linear", (outputs, columns), "int4/group:64", "int4a/group:64", x)
        run("linear", (outputs, columns), "int4/group:32+channel", "int8/token", x)
        for weight in ("int3a/channel", "int5/group:64", "int8a/group:20"):
            run("linear", (outputs, columns), weight, "int8a/token", x)
        for weight in ("int4/group:64", "int4a/channel", "int5/group:20", "int8a/group:32", "int2/tensor"):
            run("linear", (outputs, columns), weight, None, x, rank=3)
        run("conv2d", (outputs, columns, 1, 1), "int6a/channel", None, x[..., None, None], PLAIN)
for level, channels, outputs, size, pad in itertools.product(LEVELS, (3, 70), (5, 66), (5, 17), (0, 2)):
    ops.level = lambda level=level: level
    conv = kernels.Conv((2, 1), (pad, pad), (1, 1), 1)
    for memory, weight in itertools.product((torch.contiguous_format, torch.channels_last), ("int4", "int8")):
        x = torch.randn(2, channels, size, size).contiguous(memory_format=memory)
        run("conv2d", (outputs, channels, 3, 3), f"{weight}/channel", "int8a/tensor", x, conv)
        run("conv2d", (outputs, channels, 1, 1), f"{weight}/channel", "int8a/token", x.half(), PLAIN)
attention.FEWEST_PRODUCTS, attention.FEWEST_ROWS = 0, {False: 0, True: 0}
for level, rows, keys, width in itertools.product(LEVELS, (1, 13), (1, 77, 130), (7, 40, 72)):
    attention.level = lambda level=level: level
    for dtype, int8 in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        q, k, v = (torch.randn(1, 2, tokens, width).to(dtype) for tokens in (rows, keys, keys))
        for mask in (None, torch.randn(rows, keys).bfloat16(), torch.rand(1, 1, 1, keys) < 0.5):
            assert attention.why_not(q, k, v, mask, int8=int8) is None
            attention.sdpa(q, k, v, mask, int8=int8)
print("clean")
