"""A decoder layer as one operator: the native one against the reference in float64."""

import os
import signal
import time

import pytest
import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo._op import native
from flashpo.ops.decode_step import decode_layer_
from flashpo.ops.packed_linear import pack_linear

pytestmark = pytest.mark.native
HIDDEN, HEADS, KV_HEADS, FEATURES, INNER, ROWS = 96, 4, 2, 32, 160, 7


def layer(dtype, *, norms, bias, first):
    """Arguments in `dtype`: rows 0 to 4 share a segment of 70 tokens, each row has 3 of its own, the last is parked."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).bfloat16().to(dtype)

    queries, keys = HEADS * FEATURES, KV_HEADS * FEATURES
    shapes = [(queries, HIDDEN), (keys, HIDDEN), (keys, HIDDEN), (HIDDEN, queries)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    linears = [pack_linear(rand(*shape, scale=shape[1] ** -0.5)) for shape in shapes]
    biases = [rand(n) if bias and i < 3 else None for i, (n, _) in enumerate(shapes)]
    weights = [rand(HIDDEN), rand(HIDDEN), *(rand(FEATURES) if norms else None for _ in "qk")]
    x, residual = rand(ROWS, HIDDEN), None if first else rand(ROWS, HIDDEN)
    turn = rand(ROWS, FEATURES), rand(ROWS, FEATURES)
    caches = rand(3 + ROWS, KV_HEADS, FEATURES, 64), rand(3 + ROWS, KV_HEADS, 64, FEATURES)
    own = torch.arange(3, 3 + ROWS)
    slot = own * 64 + 2
    slot[-1] = -1
    readers = [(0, 5), *((i, i + 1) for i in range(ROWS))]
    tables = readers, [0] + [70] * ROWS, [70] + [3] * ROWS, [[1, 2], *([i, 0] for i in own)], [72] * ROWS
    tables = [torch.tensor(table, dtype=torch.int32) for table in tables]
    eps = [1e-5, 1e-6, 1e-5]
    return x, residual, weights, eps, linears, biases, "silu", *turn, *caches, slot, *tables, FEATURES**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(("norms", "bias", "first"), [(True, False, False), (False, True, True)])
def test_against_float64(dtype, window, norms, bias, first, poisoned):
    if dtype == torch.bfloat16 and native.isa != "amx":
        pytest.skip("no kernel for bfloat16")
    results = []
    for backend, of in (("native", dtype), ("torch", torch.float64), ("torch", dtype)):
        arguments = layer(of, norms=norms, bias=bias, first=first)
        with flashpo.backend(backend):
            out = decode_layer_(*arguments, window)
        results.append((*out, *arguments[9:11]))
    for ours, exact, plain in zip(*results):
        assert_as_accurate(ours, exact, plain)


def test_shapes_are_checked():
    arguments = list(layer(torch.float32, norms=True, bias=False, first=False))
    arguments[4] = [*arguments[4][:6], arguments[4][5]]
    with flashpo.backend("native"), pytest.raises(ValueError, match="another number of columns"):
        decode_layer_(*arguments, 0)
    arguments = list(layer(torch.float32, norms=True, bias=False, first=False))
    arguments[4] = [*arguments[4][:6], pack_linear(torch.randn(HIDDEN, INNER + 64))]
    with flashpo.backend("native"), pytest.raises(ValueError, match="another number of columns"):
        decode_layer_(*arguments, 0)
    arguments[5] = arguments[5][:5]
    with flashpo.backend("native"), pytest.raises(ValueError, match="7 linears and biases"):
        decode_layer_(*arguments, 0)


def run(arguments) -> list[bytes]:
    with flashpo.backend("native"):
        results = *decode_layer_(*arguments, 0), *arguments[9:11]
    return [x.numpy().tobytes() for x in results]


def fresh():
    return layer(torch.float32, norms=True, bias=False, first=False)


def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    results = []
    for threads in (1, 2, 3, 7) * 10:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(fresh()))
    assert all(result == results[0] for result in results)


def test_in_a_forked_child():
    """It has none of its parent's threads: operators of torch would wait for them."""
    here, there = run(fresh()), fresh()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(run(there) != here)
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)
