"""Time and memory of functions that do the same thing: warmed up, interleaved, as medians."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

Function = Callable[[], object]
# Titles, each with a function that measures its table and returns the records
Tables = Iterator[tuple[str, Callable[[], Iterable[dict]]]]
Clock = Callable[[dict[str, Function]], dict[str, float]]  # returns the median seconds of each function


class KernelTable(NamedTuple):
    """One operator at one shape. `flashpo bench` prints it; pytest-benchmark has a case for each of its variants."""

    title: str
    variants: tuple[str, ...]  # FlashPO's variants, and those that show their floor
    peers: tuple[str, ...]  # those that are not installed are not measured
    # (clock, with_peers); it checks the results before it calls the clock
    measure: Callable[[Clock, bool], Iterable[dict]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Device:
    """The CPU, or one CUDA device, whose L2 cache is emptied before each call."""

    def __init__(self, name: str):
        self.name = name
        self.cuda = name == "cuda"
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=name) if self.cuda else None

    def seconds(self, f: Function) -> float:
        if not self.cuda:
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def collect(self) -> None:
        """Free what a model that has been measured leaves behind."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def peak_bytes(self, f: Function) -> int:
        """The largest growth of memory in use during f(), in bytes."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            f()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        # Otherwise f() would reuse memory that earlier calls freed, and nothing would grow
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak (VmHWM)
        before = _status_bytes("VmRSS")
        f()
        return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def interleave(
    device: Device, variants: dict[str, Function], budget: float | None = None, rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call of each variant. The variants take turns, so that changes of the machine's speed affect all
    of them.

    Each is warmed up for a tenth of `budget` seconds. Then each is called in at least `rounds` rounds, and in more
    while its share of `budget` lasts. The default budget is 4 seconds, and 0.5 on a GPU, whose times vary less.
    """
    if budget is None:
        budget = 0.5 if device.cuda else 4.0
    for f in variants.values():
        start = time.perf_counter()
        while True:
            f()
            if time.perf_counter() - start > budget / 10:
                break
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < rounds or time.perf_counter() - start < budget * len(variants):
        for name, f in variants.items():
            times[name].append(device.seconds(f))
        if len(times[name]) >= 200:
            break
    return times


def compare(
    device: Device, variants: dict[str, Function], budget: float | None = None, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each variant; see `interleave`."""
    times = interleave(device, variants, budget, rounds)
    return {name: statistics.median(values) for name, values in times.items()}
