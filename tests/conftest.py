"""Threads, seeds, environment, NaN-filled allocations and the `gpu` marker, for every test."""

import os
import warnings
import zlib

# OpenMP reads these when torch loads it. Two threads, so that kernels meet others; threads that wait do not spin:
# where there are more of them than cores, of other workers or processes, a spinning one keeps the next from its work.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


def pytest_configure(config):
    # torch's first multi-threaded exp or logsumexp of a process is now and then accurate to 3e-5 only: take it here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.linspace(-5, 5, 4096)
    x.exp(), x.abs().log(), x.logsumexp(0)
    torch.set_num_threads(threads)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter  # noqa: F401


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded(request):
    """Inputs depend on the test's own name: not on its neighbours, nor on -k."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _same_environment():
    """What a library sets is not handed on: PEFT's BOFT leaves CXX=gcc, by which a C++ build lacks its library."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def no_fallback():
    """No warning of FlashPO, but in a block of `pytest.warns`."""
    import flashpo

    flashpo.stats(reset=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlashPO")
        yield


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def graphs():
    """What torch.compile(backend=counting) has captured in this test."""
    torch._dynamo.reset()
    return []


@pytest.fixture
def counting(graphs):
    """A backend that runs each graph as it is, and keeps it."""

    def run(graph, _):
        graphs.append(graph)
        return graph.forward

    return run
