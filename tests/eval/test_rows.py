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
