"""Backends can be asked for a machine that is not there, and answer as they do on one that is."""

from __future__ import annotations

import pytest
import torch

from dq import kernels
from dq.kernels import Conv, Machine, dense, reference
from dq.kernels.cpu import attention, library
from dq.kernels.triton import configs
from tests.kernels.test_kernels import plan, tensors

INT8 = plan("linear", (64, 64))
WEIGHT_ONLY = plan("linear", (64, 64), "int4/group:32", None)
FP8 = plan("linear", (64, 64), "fp8/channel", "fp8/token")


def backend(given, device, machine):
    with kernels.imagined(machine):
        return kernels.chosen("linear", given, device)[0]


@pytest.mark.parametrize("status", [kernels.backends()[name].STATUS for name in kernels.backends()])
def test_every_backend_says_whether_it_was_tried(status):
    assert status in ("stable", "experimental")


def test_a_described_machine_decides_who_runs_a_layer():
    assert backend(INT8, "cpu", Machine()) == "cpu"
    assert backend(INT8, "cpu", Machine(cpu="an old processor")) == "torchops"
    assert backend(INT8, "cpu", Machine(cpu="an old processor", vnni=False)) == "dense"
    assert backend(INT8, "cpu", Machine(vnni=False, level="avx2")) == "cpu"
    assert backend(WEIGHT_ONLY, "cpu", Machine()) == "cpu"
    assert backend(WEIGHT_ONLY, "cpu", Machine(vnni=False, level="avx2")) == "cpu"
    assert backend(WEIGHT_ONLY, "cpu", Machine(cpu="an old processor")) == "dense"
    assert backend(INT8, "cuda", Machine(gpu="sm_75")) == "torchops"
    assert backend(INT8, "cuda", Machine(gpu="sm_90")) == "triton"
    assert backend(FP8, "cuda", Machine(gpu="sm_75")) == "weightonly"
    assert backend(FP8, "cuda", Machine(gpu="sm_86")) == "weightonly"  # the tile sizes of sm_89, but not its fp8 units
    assert backend(FP8, "cuda", Machine(gpu="sm_89")) == "scaled"
    assert backend(FP8, "cuda", Machine(gpu="gfx942")) == "weightonly"  # its fp8 is another one
    assert backend(FP8, "cuda", Machine(gpu="gfx950")) == "scaled"


def test_the_reason_is_the_machines_own():
    with kernels.imagined(Machine(cpu="an old processor")):
        assert dict(kernels.chosen("linear", INT8, "cpu")[1])["cpu"] == "an old processor"
    with kernels.imagined(Machine(gpu="sm_86")):
        assert dict(kernels.chosen("linear", FP8, "cuda")[1])["triton"] == "sm_86 has no fp8 matrix unit"


def test_a_level_says_which_kernels_it_lacks_and_labels_say_which_ran():
    conv, pointwise = plan("conv2d", (64, 64, 3, 3), act="int8/tensor"), plan("conv2d", (64, 64, 1, 1))
    cpu = kernels.backends()["cpu"]
    for level, name in (("avx2", "AVX2"), ("avxvnni", "AVX-VNNI"), ("avx512vnni", "AVX512-VNNI")):
        with kernels.imagined(Machine(level=level)):
            assert cpu.why_not("linear", INT8, "cpu") is cpu.why_not("conv", pointwise, "cpu") is None
            assert cpu.why_not("linear", WEIGHT_ONLY, "cpu") is None
            assert cpu.why_not("conv", conv, "cpu") is None and cpu.label("conv", conv).endswith(f" conv on {name}")
            assert attention._missing() is None and library.missing("avx512") is not None
            assert cpu.label("linear", INT8) == f"dq cpu int8 x int8 on {name}"
    with kernels.imagined(Machine()):
        assert cpu.label("linear", INT8) == "dq cpu int8 x int8" and library.missing("avx512") is None


def test_the_machine_at_hand_is_asked_again_afterwards():
    before = kernels.choose("linear", INT8, "cpu")
    with pytest.raises(RuntimeError), kernels.imagined(Machine(cpu="an old processor")):
        raise RuntimeError
    after = kernels.choose("linear", INT8, "cpu")
    assert kernels.machine() is None and (after.backend, after.refusals) == (before.backend, before.refusals)
    assert library.missing() is library._load()[1]


def test_a_described_machine_equals_the_one_it_describes():
    """This machine, described, answers as this machine."""
    here = Machine(kernels.architecture(), library.missing(), kernels.vnni(), library.level())
    for given in (
        INT8,
        FP8,
        WEIGHT_ONLY,
        plan("linear", (64, 64), "nvfp4", "nvfp4"),
    ):
        choice = kernels.choose("linear", given, "cpu")
        with kernels.imagined(here):
            assert kernels.chosen("linear", given, "cpu") == (choice.backend, choice.refusals)


def test_architectures_are_named_as_their_makers_name_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.architecture() == "sm_121" and configs.architecture() == "sm_120"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.architecture() == "" and configs.architecture() == "sm_100"


@pytest.mark.parametrize("level", ["none", "avx2", "avxvnni", "avx512vnni"])
def test_levels_without_bf16_units_hide_them(monkeypatch, level):
    monkeypatch.setenv("DQ_CPU_LEVEL", level)
    assert not kernels.bf16()
    monkeypatch.delenv("DQ_CPU_LEVEL")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert kernels.bf16()
    monkeypatch.setenv("DQ_CPU_LEVEL", "")  # as unset
    assert kernels.bf16()


@pytest.mark.parametrize("shape", [(24, 40), (24, 40, 3, 3)])
def test_without_bf16_units_dense_rounds_once_at_the_end(monkeypatch, shape):
    monkeypatch.setattr(dense, "HAS_BF16", False)
    op, conv = ("linear", None) if len(shape) == 2 else ("conv", Conv((1, 1), (1, 1), (1, 1), 1))
    p = plan("linear" if conv is None else "conv2d", shape, act=None, rank=4)
    t = tensors(p, torch.bfloat16)
    x = torch.randn(6, 40, *[5] * (len(shape) - 2)).bfloat16()
    y, truth = dense.build(op, p, conv)(x, t), reference.build(op, p, conv)(x.float(), t)
    assert y.dtype is torch.bfloat16
    assert ((y.float() - truth).abs() <= truth.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-4).all()
