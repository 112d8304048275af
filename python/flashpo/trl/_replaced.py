"""Replaces a function in a module of another package, for one thread and for the duration of a block.

A replacement acts only on the calls of the thread that made it; other threads call the original. The module gets the
original back when the last block ends, in whatever order the blocks of several threads end.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_lock = threading.Lock()
_delegates: dict[tuple[str, str], "_Delegate"] = {}  # by module and name; only those that are in a module now


class _Delegate:
    """Its `call` is put into the module. It calls the replacement of the calling thread, if that has one."""

    def __init__(self, original: Callable):
        self.original, self.blocks = original, 0
        self.of_thread = threading.local()

        @functools.wraps(original)
        def call(*args, **kwargs):
            return (self.replacements() or [original])[-1](*args, **kwargs)

        self.call = call

    def replacements(self) -> list[Callable]:
        """The replacements of the calling thread; that of the innermost block is the last."""
        return self.of_thread.__dict__.setdefault("replacements", [])


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, make: Callable[[Any], Callable]) -> Iterator[None]:
    """Within the block this thread's calls of `module.name` go to `make(original)`."""
    key = module.__name__, name
    with _lock:
        delegate = _delegates.get(key) or _Delegate(getattr(module, name))
        replacement = make(delegate.original)
        if delegate.blocks == 0:
            _delegates[key] = delegate
            setattr(module, name, delegate.call)
        delegate.blocks += 1
    delegate.replacements().append(replacement)
    try:
        yield
    finally:
        delegate.replacements().pop()
        with _lock:
            delegate.blocks -= 1
            if delegate.blocks == 0:
                del _delegates[key]
                # otherwise somebody has replaced ours in the meantime, and ours now calls the original
                if getattr(module, name) is delegate.call:
                    setattr(module, name, delegate.original)
