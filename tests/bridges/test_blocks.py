"""GGUF's block types: dq's formats hold the same codes and decode to the same bits as the library."""

from __future__ import annotations

import gguf
import pytest
import torch

from dq.bridges import blocks
from dq.errors import DQError
from dq.kernels import Tensors, proof, reference
from dq.plan import LayerPlan, TensorPlan
from tests.bridges import written

ROWS, COLUMNS = 6, 512


def packed(kind: str, raw) -> torch.Tensor:
    """What dq decodes of blocks, fp32 (ROWS, COLUMNS)."""
    found = blocks.packed("layer", kind, torch.from_numpy(raw), ROWS)
    plan = LayerPlan("linear", (ROWS, COLUMNS), TensorPlan.parse(blocks.KEPT[kind]))
    tensors = Tensors(found["weight"], found["scale"], found.get("zero"))
    if plan.weight.spec.scale_bytes == 4:
        assert (found["scale"] > 0).all()
    return reference.weight_decoder(plan)(tensors)


def raw_blocks(kind: str, **options):
    return written.blocks(kind, ROWS * COLUMNS // gguf.GGML_QUANT_SIZES[written.TYPES[kind]][0], **options)


@pytest.mark.parametrize("kind", blocks.KEPT)
@pytest.mark.parametrize("seed", range(3))
def test_every_code_decodes_to_the_bits_of_the_library(kind, seed):
    raw = raw_blocks(kind, seed=seed, negative=kind in ("Q4_0", "Q5_0", "Q3_K", "Q6_K"))
    truth = torch.from_numpy(gguf.quants.dequantize(raw.reshape(ROWS, -1), written.TYPES[kind]))
    assert torch.equal(packed(kind, raw), truth) and truth.std() > 0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_rows_are_sorted_some_at_a_time(kind, monkeypatch):
    raw = raw_blocks(kind)
    whole = blocks.packed("layer", kind, torch.from_numpy(raw), ROWS)
    monkeypatch.setattr(blocks, "MOST_BYTES", 2500)
    parts = blocks.packed("layer", kind, torch.from_numpy(raw), ROWS)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


@pytest.mark.parametrize("kind", [kind for kind in blocks.KEPT if kind != "MXFP4"])
def test_blocks_of_scale_zero_are_the_smallest_value_or_zero(kind):
    raw = raw_blocks(kind)
    for at in written.HALVES[kind][0]:
        raw[::2, at : at + 2] = 0
    truth = torch.from_numpy(gguf.quants.dequantize(raw.reshape(ROWS, -1), written.TYPES[kind]))
    assert torch.equal(packed(kind, raw), truth)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K"])
def test_scales_that_no_quantizer_writes_are_refused_by_the_layer(kind):
    raw = raw_blocks(kind)
    raw[1, 0:2] = [0x00, 0xBC]  # -1
    raw[1, 2:] = 128
    with pytest.raises(DQError, match=r"layer 'layer': .*negative.*name a recipe that rounds anew"):
        packed(kind, raw)
    raw[1, 0:2] = [0x00, 0x7E]  # NaN
    with pytest.raises(DQError, match="layer 'layer': the file holds scales of NaN or Inf"):
        packed(kind, raw)


@pytest.mark.parametrize("act", [None, "int8/token"])
@pytest.mark.parametrize("form", ["int2m/group:16", "int4m/group:32", "int5m/group:32", "int4m/channel"])
def test_integers_above_a_smallest_value_have_a_product(form, act):
    plan = LayerPlan("linear", (256, 256), TensorPlan.parse(form), None if act is None else TensorPlan.parse(act))
    from dq.kernels import cpu

    if (reason := cpu.why_not("linear", plan, "cpu")) is not None:
        pytest.skip(reason)
    for dtype in (torch.float32, torch.bfloat16):
        assert proof.why_wrong("cpu", "linear", plan, None, torch.empty(0, dtype=dtype)) is None
