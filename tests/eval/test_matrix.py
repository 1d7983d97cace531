"""The support matrix says of this machine what `dq.explain` says, and knows which kernels were timed where."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import dq
from dq import kernels
from dq.kernels import Machine
from dq.kernels.cpu import library
from dq.plan import Recipe, TensorPlan
from eval.experiments import matrix
from eval.experiments.matrix import PROCESSORS, Processor


def _dynamic(act):
    return act is None or TensorPlan.parse(act).scale == "dynamic"


HERE = Processor("this one", Machine(cpu=library.missing(), vnni=kernels.vnni(), level=library.level()))
DYNAMIC = [(kind, pair) for kind in matrix.SHAPES for pair in matrix.pairs(kind) if _dynamic(pair[1])]


class Block(nn.Module):
    """A denoiser of two layers in a row of blocks, so that dq finds where they are."""

    def __init__(self, kind):
        super().__init__()
        make = {"linear": lambda: nn.Linear(64, 64), "conv": lambda: nn.Conv2d(64, 64, 3, padding=1)}[kind]
        self.blocks = nn.ModuleList([nn.Sequential(make()) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(("kind", "pair"), DYNAMIC, ids=str)
def test_the_matrix_says_of_this_machine_what_explain_says(kind, pair):
    model = Block(kind)
    dq.quantize(model, Recipe("asked", pair, pair), progress=False)
    (row,) = {(row.emulated, row.act, row.weight) for row in dq.explain(model).layers if row.weight is not None}
    emulated, act, weight = row
    word = matrix.word(kind, pair, HERE).partition(",")[0]
    assert word == ("emulated" if emulated else "decoded" if act is None else "native")
    assert weight.startswith(pair[0].partition("/")[0])


def test_processors_own_the_rows_that_were_measured_on_them():
    def owners(machine):
        return [processor.name for processor in PROCESSORS if processor.owns({"machine": machine})]

    assert owners("2 cores AMD EPYC (avx512_vnni, avx512_bf16)") == [PROCESSORS[0].name]
    assert owners("8 cores AMD Ryzen (no low-precision units)") == [PROCESSORS[1].name]
    assert owners("16 cores Intel (avx_vnni)") == [], "it has torch's product and not dq's"
    assert owners("NVIDIA H100 80GB HBM3 (sm_90)") == ["sm_90"]


def test_a_kernel_is_timed_where_a_row_has_milliseconds_of_it(monkeypatch):
    row = {"machine": "2 cores EPYC (avx512_vnni, avx512_bf16)"}
    monkeypatch.setattr(matrix, "_timed_rows", lambda: [(row, {"dq cpu int4 x int4"})])
    fast, other = PROCESSORS[:2]
    assert matrix.timed("dq cpu int4 x int4", fast) and matrix.timed("dq cpu int4a x int4a", fast)
    assert not matrix.timed("dq cpu int4 x int4", other) and not matrix.timed("dq cpu int4", fast)
    assert matrix.word("linear", ("int4/group:64", "int4/group:64"), fast) == "native"
    assert matrix.word("linear", ("int8/channel", "int8/token"), fast) == "native, not measured"


def test_emulated_rows_give_no_time(monkeypatch):
    monkeypatch.setattr(matrix.rows, "read", lambda path: [{"emulated": True, "kernel": "k", "machine": "m"}])
    matrix._timed_rows.cache_clear()
    assert all(labels == set() for _, labels in matrix._timed_rows())
    matrix._timed_rows.cache_clear()


def test_columns_that_say_the_same_become_one():
    head, _, *lines = matrix.matrix(["linear"])
    heads, cells = head.split(" | ")[2:], [line.split(" | ")[2:] for line in lines]
    columns = [("CPU" in name or "x86" in name, *(line[i] for line in cells)) for i, name in enumerate(heads)]
    assert all(a != b for a, b in pairwise(columns))  # a processor and a card are never one column
    assert "sm_80" in head and "sm_120" in head and "gfx942" in head


def test_a_processor_is_asked_by_its_device():
    assert Processor("x", Machine(gpu="sm_90")).device == "cuda" and Processor("x", Machine()).device == "cpu"
    assert torch.empty(0).device.type == PROCESSORS[0].device
