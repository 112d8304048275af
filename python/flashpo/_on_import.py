"""Calling a function on a module once it has been imported, now or later."""

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Callable
from typing import Any

_waiting: dict[str, list[Callable[[str], None]]] = {}
# Modules whose execution we saw end; Python still marks them as initializing at that moment
_executed: set[str] = set()


def is_imported(name: str) -> bool:
    """Whether the module has been imported completely."""
    module = sys.modules.get(name)
    return module is not None and (name in _executed or not getattr(module.__spec__, "_initializing", False))


def when_imported(name: str, act: Callable[[str], None]) -> None:
    """Call `act(name)` once the module is imported: at once, or right after its import and before any code gets it."""
    if is_imported(name):
        act(name)
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(act)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self._asking = threading.local()  # the name that this thread is asking the other finders for

    def find_spec(self, name, path, target=None):
        before = getattr(self._asking, "name", None)
        if name not in _waiting or name == before:
            return None
        self._asking.name = name
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:
            self._asking.name = before
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _executed.add(name)
            for act in _waiting.pop(name, []):  # not earlier: code that asks for a spec need not import
                act(name)

        spec.loader.exec_module = exec_module
        return spec
