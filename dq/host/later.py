"""Acting on another library once it is imported, without importing it: `import dq` costs neither torch nor diffusers.

    when_imported(module, act)   act(module) once: now where the module is there, else right after its import
    Promise(module, name)        stands for a class of dq in a host's table, and imports it when it is first used

An import asks the finders of `sys.meta_path` in turn. As long as something waits, one of ours stands first. Asked for
a module that something waits for, it lets the other finders find it and puts a loader around theirs, which runs the
module and then what waited. The module keeps its own loader. Asked for any other module, it looks whether one that is
waited for has come by another road: by a finder that stands before ours, or half imported when we were called. When
nothing waits any more, the finder is gone.

What waits is called while the import is under way, under a lock, so it must import nothing: it reads the module it is
given and `sys.modules`, and its closures import later. That, too, is what the promises are for: a host imported from
within a half imported file of dq could not import that file.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType

_waiting: dict[str, Callable[[ModuleType], None]] = {}
_lock = threading.RLock()
_asked = threading.local()  # .name: what this thread is asking the other finders for, one of which may ask ours again


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act(module)` once, now if the module of that name is imported, else when it is; its errors pass through.

    A second call for a name that is still waited for replaces the first.
    """
    with _lock:
        _waiting[name] = act
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    if sys.modules.get(name) is not None:
        importlib.import_module(name)  # where another thread is importing it, waits for that
    _look(name)


def _look(name: str) -> None:
    """Act if the module is there and its import is over."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _act(name, module)


def _act(name: str, module: ModuleType) -> None:
    with _lock:
        act = _waiting.pop(name, None)
        if not _waiting and _finder in sys.meta_path:  # a new list: a thread may be walking along the old one
            sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]
        if act is not None:
            act(module)


class _Finder:
    """Finds nothing itself; see the module docstring."""

    def find_spec(self, name, path=None, target=None):
        for waited in list(_waiting):
            _look(waited)
        before = getattr(_asked, "name", None)
        if name not in _waiting or name == before:
            return None
        _asked.name = name
        try:
            asked = (getattr(finder, "find_spec", None) for finder in sys.meta_path if finder is not self)
            found = (ask(name, path, target) for ask in asked if ask is not None)
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            _asked.name = before
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """A module's own loader, which it gets back before it runs, and after it what waits for the module."""

    def __init__(self, own):
        self.own = own

    def __getattr__(self, key: str):
        return getattr(self.own, key)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        name = module.__spec__.name
        _act(name, sys.modules.get(name, module))


_finder = _Finder()


class Promise:
    """A class by the name of its module and its own: called, asked for attributes or for instances, it imports it."""

    def __init__(self, module: str, name: str):
        self.__module__ = module
        self.__qualname__ = name

    def __getattribute__(self, key: str):
        own = object.__getattribute__(self, "__dict__")
        return own[key] if key in own else getattr(_kept(self), key)

    def __call__(self, *args, **kwargs):
        return _kept(self)(*args, **kwargs)

    def __instancecheck__(self, value) -> bool:
        return self.__module__ in sys.modules and isinstance(value, _kept(self))

    def __repr__(self) -> str:
        return f"<class '{self.__module__}.{self.__qualname__}'>"


def _kept(promise: Promise) -> type:
    return getattr(importlib.import_module(promise.__module__), promise.__qualname__)
