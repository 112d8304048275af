"""Products of fp32 numbers in fp32 for the time of a self-check: TF32 and bf16 would hide a small mistake.

The flags belong to the process: self-checks take turns.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

one_at_a_time = threading.RLock()  # for self-checks: the flags, the random state and the counts of calls are global


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Afterwards every flag is what it was, also where nothing was set and a flag follows a more general one."""
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
        for flag, during in flags:  # with none above it, a flag shows what it was set to itself
            before.append(flag.fp32_precision)
            _set(flag, during)
        yield
    finally:
        for (flag, _), value in zip(flags, before):
            _set(flag, value)


def _flags() -> list[tuple[Any, str]]:
    """The precisions that products go by, general ones first, and what each has to be; empty before torch 2.9.

    The older `torch.get_float32_matmul_precision` raises once one of them was set.
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
