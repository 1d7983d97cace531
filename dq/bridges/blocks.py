"""GGUF's block types as dq's formats: the same codes, no second rounding. ggml (MIT), gguf-py's decoders.

    Q8_0        q · d                            int8/group:32
    Q4_0, Q5_0  (q − 2^(b-1)) · d                int4a, int5a/group:32     d < 0 turns the codes over: zero −1
    Q3_K, Q6_K  (q − 2^(b-1)) · (d · s)          int3a, int6a/group:16     s: 6 and 8 bits, signed
    Q4_1, Q5_1  q · d + m                        int4m, int5m/group:32
    Q2_K        q · (d · s) − dmin · t           int2m/group:16            s, t: 4 bits
    Q4_K, Q5_K  q · (d · s) − dmin · t           int4m, int5m/group:32     s, t: 6 bits
    MXFP4       e2m1 · 2^(e − 127)               mxfp4

d, m, dmin: 16 bits a block of 32 or 256. Products of 16 bits and at most 8 are exact in fp32, so that every decoded
value has the bits that ggml gives it. All other types (IQ..., TQ..., NVFP4) are decoded by the library and rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from dq import formats
from dq.bridges.stored import ANEW, checked_scale
from dq.errors import DQError
from dq.formats.base import SCALE_FLOOR
from dq.plan import TensorPlan


class Blocks(NamedTuple):
    """What blocks hold, before signs. codes: int16 (n, width), counted from the type's smallest; scale: fp32 (n,
    groups); least: fp32 (n, groups), the value of code 0, None where it is −2^(bits-1) scales."""

    codes: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor | None = None


NAN = 255  # of an exponent byte
MOST_BYTES = 2**22  # of blocks that are sorted at once
KEPT = {
    "Q8_0": "int8/group:32",
    "Q4_0": "int4a/group:32",
    "Q5_0": "int5a/group:32",
    "Q4_1": "int4m/group:32",
    "Q5_1": "int5m/group:32",
    "Q2_K": "int2m/group:16",
    "Q3_K": "int3a/group:16",
    "Q4_K": "int4m/group:32",
    "Q5_K": "int5m/group:32",
    "Q6_K": "int6a/group:16",
    "MXFP4": "mxfp4",
}


def packed(name: str, kind: str, blocks: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """Packed tensors of a layer from the bytes uint8 (blocks, size) of its rows. DQError as `Stored.packed`.

    Some rows at a time: codes take ten times their bytes while they are sorted.
    """
    each = len(blocks) // rows
    step = max(1, MOST_BYTES // (each * blocks.shape[1]))
    parts = [
        _packed(name, kind, blocks[at * each : (at + step) * each], min(step, rows - at))
        for at in range(0, rows, step)
    ]
    return parts[0] if len(parts) == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _packed(name: str, kind: str, blocks: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    plan = TensorPlan.parse(KEPT[kind])
    if kind == "MXFP4":
        return _micro(name, blocks, rows)
    found = _READ[kind](blocks)
    scale = checked_scale(name, found.scale).reshape(rows, -1)
    codes = found.codes.reshape(rows, scale.shape[1], -1)
    if found.least is not None:
        least = checked_scale(name, found.least).reshape(rows, -1)
        return _offset(name, plan, codes, scale, least)
    return _signed(name, plan, codes, scale)


def _signed(name: str, plan: TensorPlan, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Codes below and above 0; a negative scale turns them over, what dq's positive one then holds by a zero of −1."""
    spec, turned, size = plan.spec, scale < 0, abs(scale)
    signed = codes - 2 ** (spec.bits - 1)
    if not spec.affine and bool((turned[..., None] & (signed == -(2 ** (spec.bits - 1)))).any()):
        raise DQError(f"layer {name!r}: a negative scale beside the code {-(2 ** (spec.bits - 1))}; {ANEW}")
    signed = torch.where(turned[..., None], (-1 - signed) if spec.affine else -signed, signed)
    signed = signed.masked_fill((size == 0)[..., None], 0)
    made = {
        "weight": spec.pack(signed.to(torch.int8).reshape(len(codes), -1)),
        "scale": size.clamp(min=SCALE_FLOOR) if bool((size == 0).any()) else size,
    }
    return made | ({"zero": torch.where(turned, -1, 0).to(torch.int8)} if spec.affine else {})


def _offset(
    name: str, plan: TensorPlan, codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor
) -> dict[str, torch.Tensor]:
    spec = plan.spec
    if bool((scale < 0).any()):
        raise DQError(f"layer {name!r}: {spec.name} has positive scales, the file a negative one; {ANEW}")
    signed = (codes - 2 ** (spec.bits - 1)).masked_fill((scale == 0)[..., None], -(2 ** (spec.bits - 1)))
    weight = spec.pack(signed.to(torch.int8).reshape(len(codes), -1))
    return {"weight": weight, "scale": torch.where(scale == 0, SCALE_FLOOR, scale), "zero": least}


def _micro(name: str, blocks: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
    """MXFP4: a byte of exponent, then 32 nibbles in two halves."""
    if bool((blocks[:, 0] == NAN).any()):
        raise DQError(f"layer {name!r}: the file holds scales of NaN; download it again")
    codes = _nibbles(blocks[:, 1:], 16).to(torch.int8).reshape(rows, -1)
    scale = blocks[:, :1].contiguous().view(torch.int8).reshape(rows, -1)
    return {"weight": formats.get("mxfp4").pack(codes), "scale": scale}


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The 16-bit number at a byte of every block, fp32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """uint8 (n, bytes) -> int16 (n, 2 bytes): of each `run` bytes first all low nibbles, then all high ones."""
    parts = packed.reshape(len(packed), -1, 1, run)
    shifts = torch.tensor([0, 4], dtype=torch.uint8).reshape(1, 1, 2, 1)
    return ((parts >> shifts) & 15).reshape(len(packed), -1).to(torch.int16)


def _bits(packed: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """uint8 (n, bytes) -> int16 (n, codes): of each `run` bytes first all lowest `width` bits, then the next ones."""
    parts = packed.reshape(len(packed), -1, 1, run)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).reshape(1, 1, -1, 1)
    return ((parts >> shifts) & (2**width - 1)).reshape(len(packed), -1).to(torch.int16)


def _fifth(packed: torch.Tensor) -> torch.Tensor:
    """32 bits of a block, lowest first, as int16 (n, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).reshape(len(packed), 32).to(torch.int16)


def _q8_0(b: torch.Tensor) -> Blocks:
    return Blocks(b[:, 2:].contiguous().view(torch.int8).to(torch.int16) + 128, _half(b, 0))


def _q4_0(b: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(b[:, 2:], 16), _half(b, 0))


def _q4_1(b: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(b[:, 4:], 16), _half(b, 0), _half(b, 2))


def _q5_0(b: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(b[:, 6:], 16) | (_fifth(b[:, 2:6]) << 4), _half(b, 0))


def _q5_1(b: torch.Tensor) -> Blocks:
    return Blocks(_nibbles(b[:, 8:], 16) | (_fifth(b[:, 4:8]) << 4), _half(b, 0), _half(b, 2))


def _six(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes -> eight scales and eight minima of 6 bits, fp32 (n, 8) each."""
    low, least, both = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scale = torch.cat([low & 63, (both & 15) | ((low >> 2) & 48)], 1)
    minima = torch.cat([least & 63, (both >> 4) | ((least >> 2) & 48)], 1)
    return scale.float(), minima.float()


def _q4_k(b: torch.Tensor) -> Blocks:
    scale, least = _six(b[:, 4:16])
    return Blocks(_nibbles(b[:, 16:], 32), _half(b, 0) * scale, -(_half(b, 2) * least))


def _q5_k(b: torch.Tensor) -> Blocks:
    scale, least = _six(b[:, 4:16])
    high = _bits(b[:, 16:48], 1, 32)
    return Blocks(_nibbles(b[:, 48:], 32) | (high << 4), _half(b, 0) * scale, -(_half(b, 2) * least))


def _q2_k(b: torch.Tensor) -> Blocks:
    scale, least = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    return Blocks(_bits(b[:, 16:80], 2, 32), _half(b, 80) * scale, -(_half(b, 82) * least))


def _q3_k(b: torch.Tensor) -> Blocks:
    high = _bits(b[:, :32], 1, 32)
    packed = b[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    scale = low | (_bits(packed[:, 8:], 2, 4).to(torch.uint8) << 4)
    return Blocks(_bits(b[:, 32:96], 2, 32) | (high << 2), _half(b, 108) * (scale.float() - 32))


def _q6_k(b: torch.Tensor) -> Blocks:
    codes = _nibbles(b[:, :128], 64) | (_bits(b[:, 128:192], 2, 32) << 4)
    return Blocks(codes, _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8).float())


_READ: dict[str, Callable[[torch.Tensor], Blocks]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
