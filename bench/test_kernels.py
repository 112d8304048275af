"""The kernels' tables as cases of pytest-benchmark: `pytest bench --benchmark-only`, or `make bench-kernels`.

A case is one variant of a table of `flashpo bench`; -k selects cases: "linear_logprob and bfloat16 and not TRL". The
selected variants of a table are measured together, in turns, after their results have been checked. Each case then
replays the times of its variant to pytest-benchmark, whose options have their usual meaning (--benchmark-max-time,
--benchmark-min-rounds, --benchmark-save, --benchmark-compare).
"""

import statistics

import pytest
import torch

import flashpo
from flashpo.bench.cases import kernel_tables
from flashpo.bench.run import machine
from flashpo.bench.timing import Device, interleave

DEVICE = Device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(table, variant) for table in kernel_tables(DEVICE) for variant in (*table.variants, *table.peers)]


class VirtualTime:
    """A clock that advances by the times that were measured before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


virtual_time = VirtualTime()


class Measured:
    """The times and records of the table that was measured last. Measuring the next table frees its inputs."""

    title: str | None = None

    def take(self, table, with_peers: bool, budget: float, rounds: int) -> None:
        if self.title == table.title:
            return
        self.title, self.times = None, {}

        def clock(variants):
            times = interleave(DEVICE, variants, budget, rounds)
            self.times |= times
            return {name: statistics.median(values) for name, values in times.items()}

        torch.manual_seed(0)
        flashpo.stats(reset=True)
        self.records = {record["variant"]: record for record in table.measure(clock, with_peers)}
        if undeclared := self.records.keys() - {*table.variants, *table.peers}:
            raise AssertionError(f"{table.title} measures {undeclared}, which are no cases")
        self.about = {"backends": flashpo.stats(), **machine(DEVICE.name)}
        self.title = table.title


measured = Measured()


@pytest.mark.benchmark(timer=virtual_time, disable_gc=False, warmup=False)
@pytest.mark.parametrize(("table", "variant"), CASES, ids=[f"{table.title}-{name}" for table, name in CASES])
def test_kernel(benchmark, request, table, variant):
    chosen = {item.name for item in request.session.items}
    with_peers = any(f"test_kernel[{table.title}-{peer}]" in chosen for peer in table.peers)
    options = request.config.option
    measured.take(table, with_peers, float(options.benchmark_max_time), int(options.benchmark_min_rounds))
    if variant not in measured.times:
        pytest.skip("not installed")
    benchmark.group = table.title
    benchmark.extra_info.update(measured.records[variant] | measured.about)
    times = iter(measured.times[variant])
    benchmark.pedantic(lambda: virtual_time.pass_by(next(times)), rounds=len(measured.times[variant]))
