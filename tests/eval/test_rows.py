"""Rows are stamped wherever they are measured: on a machine with a copy of the files and little else, too."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from eval.experiments import rows


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    def bare(name):
        if name == "torch":
            return version(name)
        raise PackageNotFoundError(name)

    monkeypatch.setattr(rows, "version", bare)
    assert rows.stamp()["versions"] == {"torch": version("torch")}


@pytest.mark.parametrize("missing", ["git", "repository"])
def test_a_commit_that_nobody_can_tell_is_never_taken_for_a_clean_one(monkeypatch, tmp_path, missing):
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert rows.stamp()["commit"] == "unknown+", "a `+` makes peers measure again"


def test_a_row_is_measured_once_for_each_version_of_the_code_behind_it(tmp_path):
    file, measured = tmp_path / "rows.json", []

    def measure():
        measured.append(len(measured))
        return {"psnr_db": measured[-1]}

    first, again = (rows.kept(file, {"row": "a"}, "one", measure) for _ in range(2))
    assert first == again and measured == [0] and first["psnr_db"] == 0 and first["commit"]
    assert rows.kept(file, {"row": "b"}, "one", measure)["psnr_db"] == 1
    assert rows.kept(file, {"row": "a"}, "two", measure)["psnr_db"] == 2
    assert [(row["row"], row["psnr_db"]) for row in rows.read(file)] == [("a", 2), ("b", 1)], "old code's is replaced"
