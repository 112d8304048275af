"""A function of somebody else's module, replaced for one thread and for the length of a block.

What a thread replaces acts on its own calls alone, other threads call the original. The module has the original again
when the last block is left, in whatever order threads leave theirs.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_lock = threading.Lock()
_delegates: dict[tuple[str, str], "_Delegate"] = {}  # by module and name: those that are in place now


class _Delegate:
    """What stands in the module: it asks the calling thread for its replacement."""

    def __init__(self, original: Callable):
        self.original, self.blocks = original, 0
        self.of_thread = threading.local()

        @functools.wraps(original)
        def call(*args, **kwargs):
            return (self.replacements() or [original])[-1](*args, **kwargs)

        self.call = call

    def replacements(self) -> list[Callable]:
        """Of the calling thread, the innermost block's last."""
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
                if getattr(module, name) is delegate.call:  # else somebody has replaced ours, which calls the original
                    setattr(module, name, delegate.original)
