"""`decode_attention` and `kv_append` in Triton on a GPU: accuracy, batch invariance, graphs, no host sync. Also the
accuracy of the operators of a decoder layer.
"""

import dataclasses
import os

import pytest
import torch
from accuracy import assert_as_accurate
from decode_inputs import FORESTS, plant
from inputs import DTYPES

import flashpo
from flashpo import decode_attention, kv_append
from flashpo.ops.decode_layer import add_rms_norm, gated_activation, rope_append

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreting"),
]
SHAPES = [(2, 2, 64, 64), (8, 2, 128, 128), (4, 4, 80, 80), (1, 8, 256, 256), (2, 7, 96, 64), (8, 1, 192, 128)]
OPTIONS = [{}, {"window": 90}, {"softcap": 5.0, "window": 300, "spread": 2.0}]


@pytest.fixture(autouse=True)
def on_triton():
    with flashpo.backend("triton"):
        yield


def on_the_gpu(args):
    return [x.cuda() for x in args]


def attend(problem, dtype):
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in problem.options.items()}
    return [x.cpu() for x in decode_attention(*on_the_gpu(problem.tables(dtype)), **options)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "forest"),
    [(SHAPES[1], forest) for forest in FORESTS] + [(shape, "three levels") for shape in SHAPES if shape != SHAPES[1]],
)
def test_accuracy(dtype, shape, forest):
    for options in OPTIONS:
        problem = plant(FORESTS[forest], *shape, **options, sinks=torch.randn(shape[0] * shape[1]))
        ours, exact, plain = attend(problem, dtype), *(problem.dense(dtype, w) for w in (torch.float64, torch.float32))
        for x, true, baseline in zip(ours, exact, plain):
            assert_as_accurate(x, true, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    problem = plant([(700, *[3] * 20, (90, 2, 5)), (64, 70, 1), 300], 2, 4, 128, window=600)
    out, lse = attend(problem, dtype)
    for b in range(len(problem.q)):
        path = [dataclasses.replace(s, begin=0, end=1) for s in problem.segments if s.begin <= b < s.end]
        here = slice(b, b + 1)
        alone = attend(
            dataclasses.replace(problem, q=problem.q[here], segments=path, position=problem.position[here]), dtype
        )
        assert torch.equal(out[here], alone[0])
        assert torch.equal(lse[here], alone[1])


def test_a_graph_follows_the_tables():
    """One capture serves later lengths: appended tokens and longer segments are read from the same tensors."""
    problem = plant([(200, *[10] * 8), 30], 2, 2, 64)
    args = on_the_gpu(problem.tables(torch.bfloat16))
    q, k_cache, v_cache, _, _, length, blocks, position = args
    own = len(problem.segments) - len(q)
    k, v = torch.randn(2, len(q), 2, 64, device="cuda").bfloat16()
    slot = torch.full((len(q),), -1, device="cuda")

    def step():
        kv_append(k, v, k_cache, v_cache, slot)
        return decode_attention(*args, **problem.options)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        at = length[own:-1].long()
        slot.copy_(blocks[own:-1, 0].long() * 64 + at)
        length[own:-1] += 1
        position += 1
        k.normal_(), v.normal_()
        graph.replay()
        assert all(map(torch.equal, captured, decode_attention(*args, **problem.options)))


def test_bad_tables_give_nan():
    problem = plant([(70, 3, 4), 5])
    args = on_the_gpu(problem.tables(torch.float32))
    expected = decode_attention(*args, **problem.options)
    for table, at, value in ((6, (0, 1), 99), (6, (0, 0), -1), (5, 0, -1), (5, 0, 10_000)):
        bad = list(args)
        bad[table] = args[table].clone()
        bad[table][at] = value
        out, lse = decode_attention(*bad, **problem.options)
        assert out[:2].isnan().all()
        assert lse[:2].isnan().all()
        assert torch.equal(out[2:], expected[0][2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("unit_offset", "under_autocast"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("heads", "kv_heads", "features", "turned"), [(16, 8, 128, 128), (3, 1, 80, 32)])
def test_pieces_of_a_layer(dtype, unit_offset, under_autocast, heads, kv_heads, features, turned):
    """Against the reference on the CPU, in the same dtype and in float64."""
    rows, hidden = 9, heads * features
    wide = torch.float32 if under_autocast else dtype  # of what is no matrix product
    qkv, x, residual = torch.randn(rows, (heads + 2 * kv_heads) * features), *torch.randn(2, rows, hidden)
    weight, of_head, gate = torch.randn(hidden), torch.randn(features), 4 * torch.randn(rows, 2 * 1500)
    angles = torch.rand(rows, turned // 2).mul(100).repeat(1, 2)
    slot = torch.tensor([3, 70, -1, 64, 0, 191, 100, 130, 5])

    def pieces(device, exact=None):
        def here(x, rounded=dtype):
            return x.to(rounded).to(device, exact or rounded)

        caches = [
            torch.zeros(3, kv_heads, *tile, dtype=exact or dtype, device=device)
            for tile in ((features, 64), (64, features))
        ]
        parts = here(qkv).split([heads * features, kv_heads * features, kv_heads * features], 1)
        norm = {"eps": 1e-6, "unit_offset": unit_offset}
        weights = {"q_weight": here(of_head, wide), "k_weight": here(of_head, wide)}
        turn = here(angles.cos(), wide), here(angles.sin(), wide)
        results = [
            *add_rms_norm(here(x), here(residual, wide), here(weight, wide), **norm),
            rope_append(*parts, *turn, *caches, slot.to(device), **weights, **norm),
            *caches,
            *(gated_activation(*here(gate).chunk(2, 1), activation=name) for name in ("silu", "gelu_tanh")),
        ]
        return [x.cpu() for x in results]

    ours = pieces("cuda")
    with flashpo.backend("torch"):
        exact, plain = pieces("cpu", torch.float64), pieces("cpu")
    for results in zip(ours, exact, plain):
        assert_as_accurate(*results)
