"""Decoder layers as one operator: the native kernel against the reference in float64."""

import os
import signal
import time

import pytest
import torch
from accuracy import assert_as_accurate

import flashpo
from flashpo.ops.decode_step import decode_layers_
from flashpo.ops.packed_linear import pack_linear, packs_dtype

pytestmark = pytest.mark.native
HIDDEN, HEADS, KV_HEADS, FEATURES, INNER, ROWS = 96, 4, 2, 32, 160, 7


def layers(dtype, *, norms=True, bias=False, first=False, windows=(0, 0)):
    """Arguments in `dtype`: rows 0 to 4 share a segment of 70 tokens, each row has 3 of its own, the last is parked."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).bfloat16().to(dtype)

    queries, keys = HEADS * FEATURES, KV_HEADS * FEATURES
    shapes = [(queries, HIDDEN), (keys, HIDDEN), (keys, HIDDEN), (HIDDEN, queries)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    weights, linears, biases, k_caches, v_caches = [], [], [], [], []
    for _ in windows:
        linears += [pack_linear(rand(*shape, scale=shape[1] ** -0.5)) for shape in shapes]
        biases += [rand(n) if bias and i < 3 else None for i, (n, _) in enumerate(shapes)]
        weights += [rand(HIDDEN), rand(HIDDEN), *(rand(FEATURES) if norms else None for _ in "qk")]
        k_caches.append(rand(3 + ROWS, KV_HEADS, FEATURES, 64))
        v_caches.append(rand(3 + ROWS, KV_HEADS, 64, FEATURES))
    x, residual = rand(ROWS, HIDDEN), None if first else rand(ROWS, HIDDEN)
    turn = rand(ROWS, FEATURES), rand(ROWS, FEATURES)
    own = torch.arange(3, 3 + ROWS)
    slot = own * 64 + 2
    slot[-1] = -1
    readers = [(0, 5), *((i, i + 1) for i in range(ROWS))]
    tables = readers, [0] + [70] * ROWS, [70] + [3] * ROWS, [[1, 2], *([i, 0] for i in own)], [72] * ROWS
    tables = [torch.tensor(table, dtype=torch.int32) for table in tables]
    options = weights, [1e-5, 1e-6, 1e-5] * len(windows), linears, biases, "silu"
    return [x, residual, *options, *turn, k_caches, v_caches, slot, *tables, FEATURES**-0.5, list(windows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("windows", [(0,), (40,), (40, 0, 40)], ids=str)
@pytest.mark.parametrize(("norms", "bias", "first"), [(True, False, False), (False, True, True)])
def test_against_float64(dtype, windows, norms, bias, first, poisoned):
    if not packs_dtype(dtype):
        pytest.skip(f"no kernel for {dtype}")
    results = []
    for backend, of in (("native", dtype), ("torch", torch.float64), ("torch", dtype)):
        arguments = layers(of, norms=norms, bias=bias, first=first, windows=windows)
        with flashpo.backend(backend):
            out = decode_layers_(*arguments)
        results.append((*out, *arguments[9], *arguments[10]))
    for ours, exact, plain in zip(*results, strict=True):
        assert_as_accurate(ours, exact, plain)


def test_as_one_by_one():
    whole, single = layers(torch.float32, windows=(0, 40)), layers(torch.float32, windows=(0, 40))
    with flashpo.backend("native"):
        expected = decode_layers_(*whole)
        state = single[:2]
        for i, (norms, eps, linears) in enumerate(((4, 3, 7),) * 2):
            of_layer = [x[n * i : n * i + n] for x, n in zip(single[2:6], (norms, eps, linears, linears))]
            caches = single[9][i : i + 1], single[10][i : i + 1]
            state = decode_layers_(*state, *of_layer, *single[6:9], *caches, *single[11:18], single[18][i : i + 1])
    for a, b in zip((*state, *single[9], *single[10]), (*expected, *whole[9], *whole[10]), strict=True):
        assert torch.equal(a, b)


def test_shapes_are_checked():
    arguments = layers(torch.float32)
    arguments[4] = [*arguments[4][:6], arguments[4][5], *arguments[4][7:]]
    with flashpo.backend("native"), pytest.raises(ValueError, match="another number of columns"):
        decode_layers_(*arguments)
    arguments = layers(torch.float32)
    arguments[4] = [*arguments[4][:13], pack_linear(torch.randn(HIDDEN, INNER + 64))]
    with flashpo.backend("native"), pytest.raises(ValueError, match="work"):
        decode_layers_(*arguments)
    for i in (2, 3, 4, 5, 9, 10):
        arguments = layers(torch.float32)
        arguments[i] = arguments[i][:-1]
        with flashpo.backend("native"), pytest.raises(ValueError, match="7 linears and biases"):
            decode_layers_(*arguments)


def run(arguments) -> list[bytes]:
    with flashpo.backend("native"):
        results = *decode_layers_(*arguments), *arguments[9], *arguments[10]
    return [x.numpy().tobytes() for x in results]


def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    results = []
    for threads in (1, 2, 3, 7) * 10:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run(layers(torch.float32)))
    assert all(result == results[0] for result in results)


def test_in_a_forked_child():
    """It has none of its parent's threads: operators of torch would wait for them."""
    here, there = run(layers(torch.float32)), layers(torch.float32)
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
