"""Versions of rows of quality: what the pictures depend on counts, and how it is written does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.experiments import quality, versions


@pytest.fixture(scope="module")
def before():
    return quality.version()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of dq whose version is asked."""
    shutil.copytree(quality.HOME, tmp_path / "dq", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    monkeypatch.setattr(quality, "HOME", tmp_path / "dq")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    return tmp_path / "dq"


def version():
    return quality.version.__wrapped__()


def edited(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "place, old, new",
    [
        ("formats/integer.py", "range(2, 9)", "range(2, 8)"),
        ("planning.py", "KEPT_SHARE = 0.04", "KEPT_SHARE = 0.05"),
        ("cookbook.py", '"int8/channel"', '"int7/channel"'),
        ("families/pixart.py", "FAMILIES", "OTHERS"),
        ("kernels/cpu/__init__.py", "MOST_COLUMNS = 65_000", "MOST_COLUMNS = 65_001"),
        ("kernels/torchops.py", "RANK = 50", "RANK = 51"),
        ("kernels/cpu/native/tile.h", "#pragma once", "#pragma once\n#define ODD 1"),
        ("layers/packed.py", "STARTS_ALIKE = ", "STARTS_ALIKE = 2 * "),
    ],
)
def test_a_change_of_what_decides_makes_rows_old(copy, before, place, old, new):
    edited(copy / place, old, new)
    assert version() != before


@pytest.mark.parametrize(
    "place, old, new",
    [
        ("formats/integer.py", "range(2, 9)", "range(2, 9)  # a remark\n"),
        ("kernels/cpu/native/tile.h", "#pragma once", "// a remark\n#pragma once /* and\none more */"),
        (
            "cookbook.py",
            'conv=("fp8/channel", "fp8/tensor"), status="experimental")',
            'conv=("fp8/channel", "fp8/tensor"))',
        ),
        ("fit/rounding.py", "from __future__", "ODD = 1\nfrom __future__"),  # nothing that is not calibrated needs it
    ],
)
def test_remarks_and_what_does_not_decide_leave_them(copy, before, place, old, new):
    edited(copy / place, old, new)
    assert version() == before


def test_files_of_cpp_may_be_moved(copy, before):
    (copy / "kernels/cpu/native/tile.h").rename(copy / "kernels/cpu/native/block.h")
    assert version() == before


def test_what_looks_like_a_remark_inside_of_text_counts(tmp_path):
    one, two = tmp_path / "a.cpp", tmp_path / "b.cpp"
    one.write_text('const char* at = "http://a"; // b\nchar c = \'"\'; /* " */ int d;\n')
    two.write_text('const char* at = "http://b"; // a\nchar c = \'"\'; /* " */ int d;\n')
    assert versions.native([one]) == 'const char* at = "http://a"; char c = \'"\'; int d;'
    assert versions.native([one]) != versions.native([two])


def test_the_status_of_a_recipe_does_not_count_and_that_of_a_kernel_does(tmp_path):
    def told(text: str) -> list[str]:
        (tmp_path / "a.py").write_text(text)
        return list(versions.definitions(tmp_path / "a.py"))

    loop = 'RECIPES = tuple(Recipe(name, form, status=status) for name, form, status in (("a", "int8", "{}"),))'
    assert told(loop.format("stable")) == told(loop.format("experimental")) != told(loop.format("int4"))
    given = 'RECIPES = (Recipe("a", "int8", method="b"{}),)'
    assert told(given.format("")) == told(given.format(', status="stable" if True else "experimental"'))
    assert told('STATUS = "stable"') != told('STATUS = "experimental"')
