"""An int8 product for Hopper whose sums stay in flight, in Gluon; it never ran on a card, only compilers saw it.

Triton waits for every product of int8 before the next one begins: it leaves only sums in fp32 in flight (its pass
`WGMMAPipeline`, rule 2.1). Here step k multiplies while step k - 1 ends, and while the operands of the
two to four steps after it (STAGES - 2) arrive:

    wait until operands k are there;  wait for product k - 2;  start product k;  all warps meet;  refill slot k - 2

All warps meet because a slot is read by two groups of warps and filled again by one thread. One tile a program; no
low-rank branch, the rest of the epilogue is that of `gemm`. Gluon's names move between releases of Triton: those that
differ are looked up here by what is there.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from dq.kernels.triton import configs, ops
from dq.kernels.triton.elements import grouped
from dq.kernels.triton.ops import Codes, Epilogue

arrive = hopper.tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # 3.9; before
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # 3.7; 3.6
KERNEL = "gemm_flight"  # its table of tile sizes


@gluon.jit
def _tanh(u):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [u], gl.float32, True, 1)


@gluon.jit
def _fill(a, b, pm, pn, k, bar, a_slot, b_slot, there, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr):
    """Start both copies of step k, which `bar` counts."""
    mbarrier.expect(bar, BM * BK + BN * BK, pred=there)
    arrive(a, [pm * BM, k * BK], bar, a_slot, pred=there)
    arrive(b, [pn * BN, k * BK], bar, b_slot, pred=there)


@gluon.jit
def _sums(a, b, pm, pn, K, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, S: gl.constexpr, L: gl.constexpr):
    """int32 sums (BM, BN) of one tile in the layout L, through S slots."""
    a_s = gl.allocate_shared_memory(gl.int8, [S, BM, BK], a.layout)
    b_s = gl.allocate_shared_memory(gl.int8, [S, BN, BK], b.layout)
    bars = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(bars.index(i), count=1)
    hopper.fence_async_shared()
    meet()
    steps = gl.cdiv(K, BK)
    for i in gl.static_range(S - 2):
        _fill(a, b, pm, pn, i, bars.index(i), a_s.index(i), b_s.index(i), i < steps, BM, BN, BK)
    acc = warpgroup_mma_init(gl.zeros((BM, BN), dtype=gl.int32, layout=L))
    for k in range(steps):
        slot, late = k % S, k + S - 2
        free = late % S
        mbarrier.wait(bars.index(slot), (k // S) & 1)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        acc = warpgroup_mma(a_s.index(slot), b_s.index(slot).permute((1, 0)), acc, is_async=True)
        meet()
        _fill(a, b, pm, pn, late, bars.index(free), a_s.index(free), b_s.index(free), late < steps, BM, BN, BK)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    meet()
    for i in gl.static_range(S):
        mbarrier.invalidate(bars.index(i))
    return acc


@gluon.jit
def gemm_flight(
    a, b, sx_p, sw_p, zx_p, wsum_p, zw_p, qsum_p, bias_p, out_p, M, N, K,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr, S: gl.constexpr, W: gl.constexpr,
    GELU: gl.constexpr,
):  # fmt: skip
    """a, b: descriptors of q and w with blocks (BM, BK) and (BN, BK); see `gemm.gemm` for the rest."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[W, 1], instr_shape=[16, 128, 32])
    pm, pn = grouped(gl.program_id(0), gl.cdiv(M, BM), gl.cdiv(N, BN), GROUP)
    acc = _sums(a, b, pm, pn, K, BM, BN, BK, S, L)
    m = pm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, L))
    n = pn * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    if zx_p is not None:
        zx, wsum = gl.load(zx_p + m, mask=m < M, other=0), gl.load(wsum_p + n, mask=n < N, other=0)
        acc -= zx[:, None] * wsum[None, :]
    if zw_p is not None:
        qsum, zw = gl.load(qsum_p + m, mask=m < M, other=0), gl.load(zw_p + n, mask=n < N, other=0).to(gl.int32)
        acc -= qsum[:, None] * zw[None, :]
    sx, sw = gl.load(sx_p + m, mask=m < M, other=0.0), gl.load(sw_p + n, mask=n < N, other=0.0)
    y = acc.to(gl.float32) * sx[:, None] * sw[None, :]
    if bias_p is not None:
        y += gl.load(bias_p + n, mask=n < N, other=0.0).to(gl.float32)[None, :]
    if GELU > 0:
        u = 0.7978845608028654 * y * (1.0 + 0.044715 * y * y)
        if GELU == 2:
            y = 0.5 * y * _tanh(u) + 0.5 * y
        else:
            y = y / (1.0 + gl.exp(-2.0 * u))
    place = (m.to(gl.int64) * N)[:, None] + n[None, :]
    gl.store(out_p + place, y.to(out_p.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def shared(rows: int, columns: int) -> gl.NVMMASharedLayout:
    """The layout in which units read a block (rows, columns) of 8-bit codes; columns 64 or a multiple of 128."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(columns, 128), element_bitwidth=8, rank=2)


def descriptor(t: Tensor, shape: list[int], block: list[int]):
    """Host descriptor of the first `shape` of a row-major tensor."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(t, shape, [t.stride(0), 1], block, shared(*block))


def launch(x: Codes, w: Codes, epilogue: Epilogue, config: configs.Config | None = None) -> Tensor:
    """`ops.w8a8_gemm` of int8 codes without a branch; tile sizes may be fixed by the caller."""
    x, w = x._replace(q=ops.rowed(x.q)), w._replace(q=w.q.contiguous())
    if not ops.takes_tma(x.q, w.q, "sm_90"):
        return ops.launch_gemm(x, w, epilogue)  # a weight that begins anywhere, as in a file that is mapped
    (n, k), m = w.q.shape, x.q.shape[0]
    out = x.q.new_empty(m, n, dtype=epilogue.dtype)
    if m == 0:
        return out
    config = config or configs.pick(KERNEL, m, n, k)
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    ends = ops.flat(x.scale, w.scale, x.zero, w.sums, w.zero, x.sums, epilogue.bias)
    gemm_flight[(-(-m // bm) * -(-n // bn),)](
        descriptor(x.q, [m, k], [bm, bk]), descriptor(w.q, [n, k], [bn, bk]), *ends, out, m, n, k,
        bm, bn, bk, config["GROUP"], config["stages"], config["warps"], ops.gelu_kind(epilogue),
        num_warps=config["warps"],
    )  # fmt: skip
    return out


@ops.operator(ops.fake_gemm)
def _flight_gemm(
    q: Tensor,
    w: Tensor,
    sx: Tensor,
    sw: Tensor,
    *,
    zx: Tensor | None = None,
    wsum: Tensor | None = None,
    zw: Tensor | None = None,
    qsum: Tensor | None = None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    return launch(Codes(q, sx, zx, qsum), Codes(w, sw, zw, wsum), Epilogue(dtype, bias, None, None, gelu))


def flight_gemm(x: Codes, w: Codes, epilogue: Epilogue) -> Tensor:
    """x (M, >= K), w (N, K) int8, K and rows of x in multiples of 16 bytes -> (M, N). See `ops.w8a8_gemm`."""
    end = {"dtype": epilogue.dtype, "bias": epilogue.bias, "gelu": epilogue.gelu}
    return _flight_gemm(x.q, w.q, x.scale, w.scale, **ops.zero_points(x, w), **end)
