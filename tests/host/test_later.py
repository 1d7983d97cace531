"""Acting on a module when it is imported: once, after it ran, without a trace, and beside other import hooks."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import threading

import pytest

from dq.host import later

TEXT = "value = 1\nloader = __loader__\nlast = 2\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of modules on `sys.path`; nothing else waits, and the modules are forgotten afterwards."""
    monkeypatch.setattr(later, "_waiting", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not later._finder])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(home, name: str, text: str = TEXT) -> str:
    (home / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return name


def waiting(name: str) -> list:
    """What `act` was called with for a module."""
    seen = []
    later.when_imported(name, lambda module: seen.append((module.__name__, module.last)))
    return seen


def test_it_acts_once_after_the_module_ran_and_leaves_no_trace(home):
    name = write(home, "later_one")
    seen = waiting(name)
    assert later._finder in sys.meta_path and seen == [] and name not in sys.modules
    module = importlib.import_module(name)
    assert seen == [(name, 2)] and later._finder not in sys.meta_path
    kind = importlib.machinery.SourceFileLoader
    assert type(module.loader) is type(module.__loader__) is type(module.__spec__.loader) is kind
    importlib.import_module(name)
    assert importlib.reload(module) is module and seen == [(name, 2)]


def test_it_acts_at_once_on_a_module_that_is_there(home):
    name = write(home, "later_two")
    importlib.import_module(name)
    assert waiting(name) == [(name, 2)] and later._finder not in sys.meta_path


def test_other_modules_are_found_as_before_while_something_waits(home):
    seen = waiting(write(home, "later_three"))
    other = importlib.import_module(write(home, "later_other"))
    assert type(other.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert seen == [] and later._finder in sys.meta_path
    with pytest.raises(ModuleNotFoundError, match="later_nowhere"):
        importlib.import_module("later_nowhere")


def test_looking_for_a_module_is_not_importing_it(home):
    seen = waiting(write(home, "later_four"))
    spec = importlib.util.find_spec("later_four")
    assert spec.loader.get_source("later_four") == TEXT and seen == []
    importlib.import_module("later_four")
    assert seen == [("later_four", 2)]


def test_an_import_that_fails_is_waited_for_again(home):
    name = write(home, "later_five", "raise RuntimeError('not yet')")
    seen = waiting(name)
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(name)
    write(home, name, TEXT + "# of another size\n")
    importlib.import_module(name)
    assert seen == [(name, 2)]


def test_a_module_that_is_half_imported_is_acted_on_when_it_is_whole(home, monkeypatch):
    seen = []
    monkeypatch.setattr(later, "ask", lambda: seen.append(waiting("later_six")), raising=False)
    write(home, "later_six", "from dq.host import later\nlater.ask()\nlast = 2\n")
    write(home, "later_next")
    importlib.import_module("later_six")
    assert seen == [[]] and later._finder in sys.meta_path
    importlib.import_module("later_next")  # any import
    assert seen == [[("later_six", 2)]] and later._finder not in sys.meta_path


def test_an_error_passes_through_to_who_imports(home):
    name = write(home, "later_seven")
    later.when_imported(name, lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert later._finder not in sys.meta_path


class Hook:
    """An import hook of somebody else's, for one module: asks all other finders for it, or all but ours."""

    def __init__(self, name: str, asks_ours: bool):
        self.name, self.passed = name, (self,) if asks_ours else (self, later._finder)

    def find_spec(self, name, path=None, target=None):
        asked = [finder for finder in sys.meta_path if finder not in self.passed] if name == self.name else []
        return next((spec for finder in asked if (spec := finder.find_spec(name, path, target))), None)


@pytest.mark.parametrize("asks_ours", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_it_works_beside_other_hooks(home, asks_ours, first):
    name = write(home, "later_eight")
    write(home, "later_next")
    if not first:
        sys.meta_path.insert(0, Hook(name, asks_ours))
    seen = waiting(name)
    if first:
        sys.meta_path.insert(0, Hook(name, asks_ours))
    importlib.import_module(name)
    importlib.import_module("later_next")
    assert seen == [(name, 2)] and later._finder not in sys.meta_path


def test_threads_that_import_at_once_all_find_it_done(home):
    name = write(home, "later_nine", "import time\ntime.sleep(0.2)\nlast = 2\ndone = 0\n")
    start, found = threading.Barrier(9), []

    def act(module):
        module.done += 1

    def work(register: bool):
        start.wait()
        if register:
            later.when_imported(name, act)
        found.append(importlib.import_module(name).done)

    later.when_imported(name, act)
    threads = [threading.Thread(target=work, args=(number == 0,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 9


def test_a_thread_waits_for_what_another_is_importing(home):
    name = write(
        home, "later_ten", "import time\nfrom dq.host import later\nlater.began.set()\ntime.sleep(0.2)\nlast = 2"
    )
    later.began = threading.Event()
    thread = threading.Thread(target=importlib.import_module, args=(name,))
    thread.start()
    later.began.wait()
    assert waiting(name) == [(name, 2)]
    thread.join()
    del later.began


def test_a_promise_is_the_class_once_it_is_used(home):
    write(
        home,
        "later_class",
        "class Thing:\n    kind = 3\n    def __init__(self, value=1):\n        self.value = value\n",
    )
    promise = later.Promise("later_class", "Thing")
    assert repr(promise) == "<class 'later_class.Thing'>" and not isinstance(3, promise)
    assert (promise.__module__, promise.__qualname__) == ("later_class", "Thing") and "later_class" not in sys.modules
    assert promise(2).value == 2 and promise.kind == 3
    Thing = sys.modules["later_class"].Thing
    assert promise.__init__ is Thing.__init__ and isinstance(Thing(), promise) and not isinstance(3, promise)
