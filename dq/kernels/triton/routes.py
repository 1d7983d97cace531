"""Which kernel serves a linear layer, decided from its plan alone; plain data, no triton.

| route     | weight          | activation                        | product                                           |
|-----------|-----------------|-----------------------------------|---------------------------------------------------|
| w8        | int8, channel   | integers a token, or stored scale | s8 x s8 -> s32                                    |
| w4        | int4, channel   | as w8                             | to s8 in registers or a workspace, s8 x s8 -> s32 |
| two-level | int4, two-level | as w8                             | to s8, multiplied, in a workspace; as w8          |
| groups    | int4, group     | as w8, or groups like the weight  | s8 x s8 -> s32 within a group, fp32 between       |
| fp8       | fp8, channel    | fp8 a token                       | e4m3 x e4m3 -> fp32                               |
| nvfp4     | nvfp4           | nvfp4                             | block-scaled e2m1                                 |
| decode    | 4 bits, any     | none                              | unpacked to the compute dtype, torch's product    |
| decode    | int8, channel   | none                              | as `dense`                                        |

Products of at most 16 rows with weights of whole numbers and no activation format read them as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from dq.formats.integer import Integer
from dq.plan import LayerPlan

GROUPS = (64, 128)  # columns that share a scale: half of them is a step of an 8-bit product, which takes 32 or more
LONGEST_BLOCKS = 16384  # columns of a row that nvfp4 activations are rounded from in registers
LONGEST_SUM = 131072  # 8-bit products that an int32 holds the sum of
REGISTER_ROWS = 512  # rows up to which int4 weights are unpacked in registers; an estimate, no GPU was at hand
DECODED = ("int4", "int4a", "nvfp4", "mxfp4")


@dataclass(frozen=True)
class Route:
    """kind: row of the table. unit: matrix unit it needs, "" without one. label: shown by `dq.explain`."""

    kind: str
    unit: str
    label: str


def route(plan: LayerPlan) -> Route | str:
    """The route of a linear layer, or in one line why there is none."""
    if plan.kind != "linear":
        return f"no Triton kernel for a {plan.kind}"
    if plan.splits:
        return "an input split is a product per part, and no Triton kernel adds them"
    weight, act = plan.weight, plan.act
    if act is None:
        if weight.format == "int8" and weight.grain.kind == "channel":
            return Route("decode", "", "Triton few rows int8, else decode int8 + F.linear")
        if weight.format not in DECODED:
            return f"weight-only {weight}: torch decodes it as fast"
        return Route("decode", "", f"Triton decode {weight.format} + F.linear")
    pair = f"{weight.format} x {act.format}"
    if weight.format == act.format == "fp8":
        return _fp8(plan) or Route("fp8", "fp8", f"Triton gemm {pair}")
    if weight.format == act.format == "nvfp4":
        return _nvfp4(plan) or Route("nvfp4", "nvfp4", f"Triton block-scaled gemm {pair}")
    if not isinstance(act.spec, Integer) or not isinstance(weight.spec, Integer) or weight.spec.bits not in (4, 8):
        return f"no Triton kernel multiplies {pair}"
    return _integer(plan, pair)


def rounds_again(plan: LayerPlan) -> bool:
    """Whether a layer in groups multiplies, for more than REGISTER_ROWS rows, weights rounded once more."""
    return route(plan).kind == "groups" and plan.act.grain.kind != "group"


def _fp8(plan: LayerPlan) -> str | None:
    if plan.weight.grain.kind == "group" or plan.act.grain.kind == "group":
        return "Triton's fp8 product takes one scale a row, not one a group"
    if plan.act.scale != "dynamic" or plan.act.shift:
        return "Triton's fp8 product takes dynamic activation scales without a shift"
    return None


def _nvfp4(plan: LayerPlan) -> str | None:
    if plan.columns % 32:
        return f"block-scaled products need inputs in multiples of 32, got {plan.columns}"
    if plan.columns > LONGEST_BLOCKS:
        return f"rows of nvfp4 activations have at most {LONGEST_BLOCKS} columns, got {plan.columns}"
    if plan.act.scale != "dynamic" or plan.act.shift:
        return "block-scaled products take dynamic activation scales without a shift"
    return None


def _integer(plan: LayerPlan, pair: str) -> Route | str:
    weight, act = plan.weight, plan.act
    if plan.columns > LONGEST_SUM:
        return f"sums of more than {LONGEST_SUM} products of 8 bits may not fit in an int32, got {plan.columns}"
    if act.scale != "dynamic" and act.spec.affine:
        return "stored activation scales come without zero points"
    if weight.spec.affine and act.spec.affine and act.spec.bits == 8:
        return "zero points on both sides of an 8-bit product"
    if weight.grain.two_level and weight.format != "int4":
        return f"Triton's product under two-level scales takes int4 weights, got {weight}"
    if weight.grain.kind != "group" or weight.grain.two_level:
        if act.grain.kind == "group":
            return "activation scales per group need a weight with the same groups"
        return Route("two-level" if weight.grain.two_level else f"w{weight.spec.bits}", "int8", f"Triton gemm {pair}")
    size = weight.grain.size
    if weight.format != "int4" or size not in GROUPS:
        return f"Triton's grouped product takes int4 weights in groups of 64 or 128, got {weight}"
    if act.spec.affine and act.spec.bits == 8:
        return "8-bit zero points of activations need one weight scale per output channel"
    if act.grain.kind == "group" and act.grain.size != size:
        return f"activation groups of {act.grain.size} differ from weight groups of {size}"
    return Route("groups", "int8", f"Triton gemm {pair} in groups of {size}")
