"""Several cards in one process: each layer is served by what its own card has. The cards are made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq import kernels, layers
from dq.kernels import Machine, choice, times
from dq.kernels.choice import Problem
from tests.kernels.test_kernels import plan, tensors

CARDS = {0: ((9, 0), "H100"), 1: ((8, 6), "A40"), 2: ((9, 0), "H100")}
FP8 = plan("linear", (64, 64), "fp8/channel", "fp8/token")


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """Cards of CARDS; -> a list of one element, the current one's index."""
    now = [0]

    class Current:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            self.before, now[0] = now[0], self.index

        def __exit__(self, *error):
            now[0] = self.before

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARDS[now[0]][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARDS[torch.device(device).index][1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: None)
    monkeypatch.setenv("DQ_CACHE", str(tmp_path))
    times._name.cache_clear()
    times._table.cache_clear()
    yield now
    times._name.cache_clear()
    times._table.cache_clear()


def test_each_layer_gets_the_kernel_of_its_own_card(cards):
    layer = layers.pack("it", nn.Linear(64, 64), FP8, torch.float32)
    found = [layer.ready(torch.device("cuda", index)) for index in CARDS]
    assert [each.backend for each in found] == ["scaled", "weightonly", "scaled"]
    assert dict(found[1].refusals)["triton"] == "sm_86 has no fp8 matrix unit"
    assert layer.bind("cuda:1").backend == "weightonly" and layer.bind("cuda").backend == "scaled"
    assert cards == [0]


def test_a_device_without_an_index_is_the_current_card(cards):
    cards[0] = 1
    layer = layers.pack("it", nn.Linear(64, 64), FP8, torch.float32)
    assert layer.bind("cuda").backend == "weightonly" and layer._bound[0] == torch.device("cuda", 1)


def test_verdicts_and_times_are_of_a_model_of_card_and_shared_by_two_of_one(cards):
    tables = [times.table(torch.device("cuda", index)) for index in CARDS]
    assert tables[0] is tables[2] is times.table(torch.device("cuda"))
    assert tables[0].path != tables[1].path and tables[1].what["device"] == "A40"
    cards[0] = 1
    assert times.table(torch.device("cuda")) is tables[1]


def test_a_card_that_proved_wrong_does_not_speak_for_another(cards, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "measured")
    h100, other = (Problem("linear", FP8, None, torch.device("cuda", i), torch.float32, 2) for i in (2, 1))
    times.table(other.device).judge(other.formats, {"scaled": "wrong on a small problem"})
    assert choice.known(h100).backend == "scaled"
    times.table(torch.device("cuda", 0)).judge(h100.formats, {"scaled": "wrong on a small problem"})
    assert choice.known(h100).backend != "scaled" and choice.known(other).backend == "weightonly"


def test_what_is_measured_runs_with_its_card_current(cards):
    with choice._plain(torch.device("cuda", 1)):
        assert cards == [1] and kernels.architecture() == "sm_86"
    with choice._plain(torch.device("cpu")):
        assert cards == [0]


def test_parts_of_a_split_input_reach_int_mm_in_rows_of_their_own(monkeypatch):
    split = plan("linear", (64, 96), splits=(40,))
    seen, product = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda q, w: seen.append((q, w.t())) or product(q, w))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # all it asks before a product
    t, x = tensors(split), torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    ours, truth = (kernels.backends()[name].build("linear", split, None)(x, t) for name in ("torchops", "reference"))
    assert torch.allclose(ours, truth, atol=1e-4)
    assert [tuple(w.shape) for _, w in seen] == [(64, 40), (64, 56)]
    assert all(q.is_contiguous() and w.is_contiguous() for q, w in seen)


def test_a_card_without_an_int8_unit_is_not_given_int8_products():
    int8 = plan("linear", (64, 64))
    with kernels.imagined(Machine(gpu="sm_103")):
        name, refusals = kernels.chosen("linear", int8, "cuda")
    assert name == "weightonly" and dict(refusals)["torchops"] == "sm_103 has no int8 matrix unit"
