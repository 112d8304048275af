"""fp32 matrix products in real fp32 during a self-check, because TF32 and bf16 products would hide a small mistake; and
the dtype that autocast makes of products.

The flags of the first belong to the process, so self-checks take turns.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

one_at_a_time = threading.RLock()  # for self-checks: the flags, the random state and the counts of calls are global


def autocast_to(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to now on this type of device; None without autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Set the flags, and restore each afterwards, including flags that were unset and follow a more general flag."""
    if not (flags := _flags()):
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    before = []
    try:
        for flag, during in flags:  # with no more general flag set, a flag shows its own setting
            before.append(flag.fp32_precision)
            _set(flag, during)
        yield
    finally:
        for (flag, _), value in zip(flags, before):
            _set(flag, value)


def _flags() -> list[tuple[Any, str]]:
    """The flags of products' precision, the general ones first, each with the value it needs; empty before torch 2.9.

    The older `torch.get_float32_matmul_precision` raises once one of these flags has been set.
    """
    backends: Any = torch.backends
    parents = [backends, backends.cudnn, backends.mkldnn]  # the flag of cudnn is that of all of CUDA
    products = [backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None)]
    if not all(hasattr(flag, "fp32_precision") for flag in (*parents, *products)):
        return []
    return [*((flag, "none") for flag in parents), *((flag, "ieee") for flag in products)]


def _set(flag: Any, value: str) -> None:
    if flag is torch.backends.mkldnn:
        flag.set_flags(_fp32_precision=value)  # in torch 2.13 its attribute sets the flag of all backends
    else:
        flag.fp32_precision = value
