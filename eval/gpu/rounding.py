"""Kernels that round or unpack, next to the formats: their divisions are IEEE ones, so all is equal to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dq import layers
from dq.formats import get
from dq.kernels import Tensors, reference
from dq.kernels.triton import ops, stored
from dq.kernels.triton.ops import RowFormat
from dq.plan import LayerPlan, TensorPlan
from eval.gpu.tiles import poisoned, split_order, tiled, unequal

WIDTHS = (163, 3072, ops.LONGEST + 72)  # of rows: ragged, FLUX's, too long for registers
ROWS = {
    "int8": RowFormat(),
    "int8 with zero points": RowFormat(affine=True),
    "int8 with even columns first": RowFormat(split=128),
    "int8 with a stored scale": RowFormat(),
    "fp8": RowFormat(ops.FP8_TOP),
    "int4 in groups": RowFormat(7, group=64, split=64),
    "int4 with zero points in groups": RowFormat(7, affine=True, group=64, split=64, shift=0.171875),
    "int4 with zero points in groups, clipped": RowFormat(7, affine=True, group=64, split=64, clip=0.9),
    "int8 with even columns first, clipped": RowFormat(split=128, clip=0.9),
}
DECODED = ("int4/group:64", "int4/channel", "int4a/channel", "nvfp4", "mxfp4")


def cases() -> Iterator[tuple[str, int]]:
    """(name of ROWS, width)."""
    for name, rows in ROWS.items():
        for width in WIDTHS:
            if not (rows.group and width > ops.LONGEST):
                yield name, width


def rows_of(width: int, device: str) -> Tensor:
    """Random bf16 rows, one of zeros, one of large values, one with NaN, one with Inf."""
    x = torch.randn(37, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    x[0], x[1] = 0, x[1] * 1e30
    x[2, width // 2], x[3, width - 1] = torch.nan, torch.inf
    return x.to(device)


def check_rows(name: str, width: int, device: str) -> str:
    """Codes, scales, zero points and sums of `quant_rows`; "" when they are those of the format."""
    rows, x = ROWS[name], rows_of(width, device)
    stored = 0.02 if "stored" in name else None
    given = None if stored is None else torch.tensor([stored], device=device)
    with poisoned():
        found = ops.quant_rows(x, rows, given=given, sums=rows.top == ops.INT8_TOP and not rows.affine)
    bad = [2] if stored else [2, 3]  # a stored scale saturates at Inf
    nan = found.scale.isnan().reshape(len(x), -1).any(1).nonzero().flatten().tolist()
    if nan != bad:
        return f"rows {nan} have the scale NaN, expected {bad}"
    good = [i for i in range(len(x)) if i not in bad]
    codes, scale, zero = _expected(name, x.cpu(), rows, stored)
    codes = codes.view(ops.E4M3) if rows.top == ops.FP8_TOP else codes
    parts = {"codes": (found.q, codes), "scales": (found.scale, scale), "zero points": (found.zero, zero)}
    parts["sums"] = (found.sums, codes.double().sum(1))
    for what, (ours, truth) in parts.items():
        wrong = "" if ours is None else unequal(ours.cpu()[good], truth[good])
        if wrong:
            return f"{what}: {wrong}"
    return ""


def _expected(name: str, x: Tensor, rows: RowFormat, stored: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes as they are stored, scales and zero points of the format."""
    form = "fp8" if rows.top == ops.FP8_TOP else ("int8" if rows.top == ops.INT8_TOP else "int4") + "a" * rows.affine
    spec, (m, k) = get(form), x.shape
    z = (x if stored else x.nan_to_num(0, 0, 0)).float() + rows.shift  # rows without a scale are looked at apart
    how = "tensor" if stored else f"group:{rows.group}" if rows.group else "token"
    e = spec.encode(z, how, scale=stored) if stored else spec.encode(z, how, *spec.fit(z * rows.clip, how))
    codes, scale = e.codes, e.scale if e.scale.numel() > 1 else torch.full((m, 1), stored or 0.0)
    zero = torch.zeros(m) if e.zero is None or rows.group else e.zero.reshape(-1).int()
    if e.zero is not None and rows.group:  # codes of few bits are stored less their zero points
        codes = codes - e.zero.repeat_interleave(rows.group, 1)[:, :k]
    codes = F.pad(codes, (0, -k % max(rows.split, rows.group, 16)))
    return codes[:, split_order(codes.shape[1], rows.split)] if rows.split else codes, scale, zero


# --- weights ---------------------------------------------------------------------------------------------------------


def check_unpacking(k: int, device: str) -> str:
    """int4 weights to int8 codes, and sums of their rows."""
    w = torch.randint(-8, 8, (150, k), generator=torch.Generator().manual_seed(k)).to(torch.int8)
    packed, scale = get("int4").pack(w).to(device), (torch.rand(150, -(-k // 64)) + 0.5).to(device)
    with poisoned():
        wrong = unequal(ops.w4_to_s8(packed, k=k).cpu(), w)
        wrong = wrong or unequal(ops.weight_sums(packed, k=k, bits=4).cpu(), w.sum(1))
        wrong = wrong or unequal(ops.weight_sums(w.to(device), k=k, bits=8).cpu(), w.sum(1))
        sums = ops.weight_sums(packed, k=k, bits=4, scale=scale, group=64).cpu().double()
        again = stored.rerounded(packed, scale, k, 64)
    truth = (w.double() * scale.cpu().double().repeat_interleave(64, 1)[:, :k]).sum(1)
    off = (sums - truth).abs().max()
    row = scale.amax(1).cpu() * (8 / ops.INT8_TOP)
    times = (scale.cpu() / row[:, None]).repeat_interleave(64, 1)[:, :k]
    if not wrong and (again.q.cpu() - w * times).abs().max() > 0.5 + 1e-4:
        wrong = "codes that were rounded again are not the nearest"
    wrong = wrong or unequal(again.scale.cpu(), row) or check_few_rows(k, device)
    return wrong or ("" if off < 1e-3 else f"scaled sums are off by {off:.3g}")


def check_few_rows(k: int, device: str) -> str:
    """Products of few rows: one of each column in turn reads the weight itself, in bf16."""
    dice = torch.Generator().manual_seed(k)
    w, bias = torch.randint(-8, 8, (150, k), generator=dice).to(torch.int8), torch.zeros(150)
    scale, where = torch.rand(150, -(-k // 64), generator=dice) + 0.5, torch.randperm(k, generator=dice)[:16]
    x = F.one_hot(where, k).bfloat16().to(device)
    for bits, rows, step in ((8, w, scale[:, :1]), (4, get("int4").pack(w), scale)):
        truth = w.float() * step.repeat_interleave(64 if bits == 4 else k, 1)[:, :k]
        given = {"bias": bias.to(device), "bits": bits, "group": 64 if bits == 4 else 0}
        with poisoned():
            y = stored.few_rows(x, rows.to(device), step.to(device), **given)
        wrong = unequal(y.cpu(), truth.bfloat16()[:, where].t())
        if wrong:
            return f"few rows of {bits} bits: {wrong}"
    return ""


def check_decoding(weight: str, device: str) -> str:
    """4-bit weights in bf16, rounded once from fp32."""
    plan = LayerPlan("linear", (150, 96 if weight == "nvfp4" else 75), TensorPlan.parse(weight), None)
    packed = layers.encode(torch.randn(plan.shape, generator=torch.Generator().manual_seed(0)), plan)
    t = Tensors(packed["weight"], packed["scale"], packed.get("zero"), packed.get("scale_global"))
    there = Tensors(*(None if x is None else x.to(device) for x in t))
    form, size = weight.partition("/")[0].removesuffix("a"), plan.weight.grain.size or 0
    with poisoned():
        found = ops.w4_to_float(there, plan.columns, form, size, torch.bfloat16)
    return unequal(found.cpu(), reference.weight_decoder(plan)(t).bfloat16())


def check_blocks(k: int, device: str) -> str:
    """nvfp4 activations and the tiles of scales."""
    spec, x = get("nvfp4"), rows_of(k, "cpu").float()
    e = spec.encode(x.nan_to_num(0, 0, 0), scale_global=spec.fit_global(x.nan_to_num(0, 0, 0), per_row=True))
    good = [i for i in range(len(x)) if i not in (2, 3)]
    with poisoned():
        found = ops.nvfp4_quant(x.to(device))
        again = ops.tile_scales(e.scale.to(device))
    if found.whole.isnan().nonzero().flatten().tolist() != [2, 3]:
        return "other rows than those with NaN and Inf have the global scale NaN"
    wrong = unequal(found.whole.cpu()[good], e.scale_global.reshape(-1)[good])
    nothing = (e.scale == 0).repeat_interleave(16, 1)[good]  # codes of a block of step 0 stand for 0
    codes = torch.where(nothing, 0, spec.unpack(found.q.cpu().view(torch.int8), k)[good] & 15)
    wrong = wrong or unequal(codes, torch.where(nothing, 0, e.codes[good] & 15))
    if not wrong and unequal(again.cpu(), tiled(e.scale.view(torch.uint8))):
        wrong = "stored scales are not in their tiles"
    return wrong
