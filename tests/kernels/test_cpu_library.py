"""The shared object of the CPU kernels: when it is refused and why, how it is built, its structures and ours."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import types

import pytest

from dq import kernels
from dq.kernels.cpu import attention, library, ops, weightonly
from dq.kernels.cpu import compile as source
from dq.plan import DQError, LayerPlan, TensorPlan

built = pytest.mark.skipif(library.library() is None, reason=str(library.missing()))


@pytest.fixture
def reload():
    """Forgets what was loaded: now, whenever the test asks, and at its end."""
    library._load.cache_clear()
    yield library._load.cache_clear
    library._load.cache_clear()


def int8():
    """The plan of a linear that the kernels run where they are."""
    return LayerPlan("linear", (48, 64), TensorPlan.parse("int8/channel"), TensorPlan.parse("int8/token"))


# --- levels ----------------------------------------------------------------------------------------------------------


def test_none_hides_every_kernel_and_says_so(reload, monkeypatch):
    monkeypatch.setenv("DQ_CPU_LEVEL", "none")
    assert library.library() is None and "hidden by DQ_CPU_LEVEL=none" in library.missing()
    choice = kernels.choose("linear", int8(), "cpu")
    assert choice.backend != "cpu" and "hidden by DQ_CPU_LEVEL=none" in dict(choice.refusals)["cpu"]


@built
@pytest.mark.parametrize("name", library.LEVELS[1:])
def test_the_highest_level_up_to_the_one_asked_for_runs(reload, monkeypatch, name):
    monkeypatch.setenv("DQ_CPU_LEVEL", name)
    mask = library.library().dq_cpu_levels()
    allowed = library.LEVELS[: library.LEVELS.index(name) + 1]
    assert library.level() == [each for i, each in enumerate(allowed) if mask >> i & 1][-1] != "none"
    choice = kernels.choose("linear", int8(), "cpu")
    assert choice.backend == "cpu" and (library.level() == "avx512" or library.UNITS[library.level()] in choice.label)


@pytest.mark.parametrize("value", [None, "", "avx512"])
def test_the_highest_level_is_the_default(reload, monkeypatch, value):
    monkeypatch.delenv("DQ_CPU_LEVEL", raising=False) if value is None else monkeypatch.setenv("DQ_CPU_LEVEL", value)
    assert library._allowed() == "avx512" and "hidden" not in str(library.missing())


def test_a_level_that_is_none_is_refused_with_the_known_ones(reload, monkeypatch):
    monkeypatch.setenv("DQ_CPU_LEVEL", "avx51")
    with pytest.raises(
        DQError, match=r"DQ_CPU_LEVEL is 'avx51', expected one of avx2, avx512, .*none\. Did you mean 'avx512'"
    ):
        library.missing()


def test_the_variable_is_read_by_a_process_that_starts():
    code = "from dq.kernels.cpu import library; print(library.missing())"
    environment = os.environ | {"DQ_CPU_LEVEL": "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "hidden by DQ_CPU_LEVEL=none" in done.stdout


@built
def test_a_processor_below_every_level_is_refused(reload, monkeypatch):
    old = types.SimpleNamespace(dq_fingerprint=lambda: source.fingerprint().encode(), dq_cpu_levels=lambda: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: old)
    assert library.library() is None and "processor lacks AVX2" in library.missing()


# --- the file --------------------------------------------------------------------------------------------------------


@built
def test_a_library_of_other_sources_is_refused(reload, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "fingerprint", lambda: "00000000")
    assert "other sources" in library.missing()
    monkeypatch.setattr(source, "LIBRARY", tmp_path / "none.so")
    reload()
    assert "not built" in library.missing()
    choice = kernels.choose("linear", int8(), "cpu")
    assert choice.backend != "cpu" and "not built" in dict(choice.refusals)["cpu"]


def test_without_a_compiler_the_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(RuntimeError, match="cannot be run"):
        source.build(tmp_path / "out.so")


class Field(ctypes.Structure):
    """native/fields.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_int64), ("bytes", ctypes.c_int64))


@built
@pytest.mark.parametrize(
    "structure",
    [ops.Linear, ops.Conv, weightonly.WeightOnly, weightonly.Decode, attention.Attention],
    ids=lambda s: s.__name__,
)
def test_structures_have_the_fields_of_the_native_ones_in_their_places(structure):
    """A field added, swapped or widened on one side only shifts what the other reads."""
    fields = getattr(library.library(), f"dq_{structure.__name__.lower()}_fields")
    fields.restype = ctypes.POINTER(Field)
    native, at = [], fields()
    while at[len(native)].name is not None:
        found = at[len(native)]
        native.append((found.name.decode(), found.offset, found.bytes))
    ours = [(name, getattr(structure, name).offset, getattr(structure, name).size) for name, _ in structure._fields_]
    assert native == ours
    assert at[len(native)].offset == ctypes.sizeof(structure)
