"""Tests of Triton kernels in Triton's interpreter, each with an outcome of its own.

triton reads TRITON_INTERPRET when it is imported, and pytest's process imports it without. So a module marked
`interpreted` is collected as usual, but the call of each of its tests is made by a second process, where the variable
was set first: it collects the same files, takes node ids one by one and sends outcomes back. It starts with the first
such test (whose time includes that) and lives as long as the session. With TRITON_INTERPRET=1 set by hand everything
runs in one process, for a debugger. A folder of such tests imports the hooks of this module in its conftest.py.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = ("-p", "no:xdist", "-p", "no:cacheprovider")


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: called in a process where Triton interprets its kernels")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if INTERPRETING or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    outcome, text = _interpreter(pyfuncitem.session).outcome(pyfuncitem.nodeid)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True


def pytest_unconfigure(config):
    if _KEY in config.stash:
        config.stash[_KEY].close()
        del config.stash[_KEY]


class Interpreter:
    """The second process, from this side. files: those it collects."""

    def __init__(self, root: Path, files: list[str]):
        spawning = multiprocessing.get_context("spawn")
        self.connection, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, root, files), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.delenv("PYTEST_ADDOPTS", raising=False)
            self.process.start()
        theirs.close()

    def outcome(self, nodeid: str) -> tuple[str, str]:
        """("passed" | "failed" | "skipped", what pytest says about it)."""
        try:
            self.connection.send(nodeid)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return "failed", f"the interpreting process ended with exit code {self.process.exitcode}"

    def close(self) -> None:
        self.connection.close()  # which ends its loop
        self.process.join()


_KEY = pytest.StashKey[Interpreter]()


def _interpreter(session: pytest.Session) -> Interpreter:
    """That of the session; a new one when there is none or it ended."""
    stash = session.config.stash
    if _KEY not in stash or not stash[_KEY].process.is_alive():
        marked = (item for item in session.items if item.get_closest_marker("interpreted"))
        stash[_KEY] = Interpreter(session.config.rootpath, sorted({str(item.path) for item in marked}))
    return stash[_KEY]


# --- in the second process -------------------------------------------------------------------------------------------


def serve(connection, root: Path, files: list[str]) -> None:
    """Collect `files`, then run the tests whose node ids arrive, until the other side is gone."""
    os.chdir(root)
    sys.stdout = Path(os.devnull).open("w")
    pytest.main(["--rootdir", str(root), *OPTIONS, *files], plugins=[_Served(connection)])


class _Served:
    """A pytest plugin: tests run when they are asked for instead of in order."""

    def __init__(self, connection):
        self.connection = connection
        self.reports: list[pytest.TestReport] = []
        self.broken: list[str] = []  # what could not be collected

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(report.longreprtext)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        while (nodeid := self._next()) is not None:
            self.connection.send(self._outcome(items.get(nodeid), nodeid))
        return True

    def _next(self) -> str | None:
        try:
            return self.connection.recv()
        except EOFError:
            return None

    def _outcome(self, item: pytest.Item | None, nodeid: str) -> tuple[str, str]:
        if item is None:
            return "failed", "\n".join(self.broken) or f"{nodeid} is not there for the interpreting process"
        self.reports.clear()
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        for outcome in ("failed", "skipped"):
            found = [report for report in self.reports if report.outcome == outcome]
            if found:
                return outcome, "\n".join(map(_told, found))
        return "passed", ""


def _told(report: pytest.TestReport) -> str:
    """Why a test was skipped; the traceback and the output of one that failed."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return "\n".join((report.longreprtext, *(f"--- {title} ---\n{text}" for title, text in report.sections)))
