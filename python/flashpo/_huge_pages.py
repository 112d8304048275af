"""Memory in pages of 2 MB, for what a decode step reads from end to end: the packed weights and the KV cache.

A CPU prefetches only up to the end of a page, and a virtual machine translates each page's address twice. With pages of
4 KB, memory is read at two thirds of the speed. Linux gives large pages on request; torch's allocator does not ask.
"""

import contextlib
import math
import mmap
import pathlib

import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 32 * PAGE  # of address space; pages that nobody writes to take no memory
LINE = 64
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


class HugePages:
    """Allocates tensors one after the other from large chunks. A chunk lives as long as any of its tensors."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._begin = self._end = 0  # the part of the chunk that is left

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device=device)
        size = -(-count * dtype.itemsize // LINE) * LINE
        if self._chunk is None or size > self._end - self._begin:
            self._map(max(size, CHUNK))
        begin, self._begin = self._begin, self._begin + size
        assert self._chunk is not None
        return torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=begin).view(shape)

    def _map(self, size: int) -> None:
        try:
            self._chunk = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {size} bytes of memory: {error}") from error
        with contextlib.suppress(OSError):  # the kernel has no large pages
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
        self._begin = -torch.frombuffer(self._chunk, dtype=torch.uint8).data_ptr() % PAGE
        self._end = self._begin + size


def why_not() -> str:
    """Why the system gives no large pages on request; empty if it does."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "not on this system"
    if not SETTING.exists():
        return "not in this kernel"
    return f"{SETTING} says never" if "[never]" in SETTING.read_text() else ""
