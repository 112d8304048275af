"""Exclusive use of a model that is changed for a while: by a rollout, or by a test of its adapters.

One user at a time. Any other one gets ModelInUse, even further down in the same thread.
"""

import contextlib
import threading
from collections.abc import Iterator

from torch import nn


class ModelInUse(RuntimeError):
    """A rollout of this model, or of one that shares a module or a config with it, has not ended yet."""


_taken: dict[int, threading.Thread] = {}  # id of a module or a config -> the thread that may change it
_taking = threading.Lock()


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Reserve the model until the end of the context: its flags, forwards, adapters and configs are shared by all
    threads.

    Raises:
        ModelInUse: another thread, or an outer call in this thread, has reserved it.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    mine = {id(x) for x in (*model.modules(), *configs) if x is not None}
    with _taking:
        if (other := next((_taken[x] for x in mine if x in _taken), None)) is not None:
            where = "this thread" if other is threading.current_thread() else f"thread {other.name!r}"
            raise ModelInUse(
                f"{type(model).__name__} is in the middle of a rollout in {where}, which changes the model until it "
                "ends: rollouts of one model have to run one after the other"
            )
        _taken.update(dict.fromkeys(mine, threading.current_thread()))
    try:
        yield
    finally:
        with _taking:
            for x in mine:
                del _taken[x]
