"""tree_attention in Triton on a GPU: accuracy at real sizes, determinism, 64-bit addresses, no host sync."""

import os

import pytest
import torch
from inputs import DTYPES
from tree_inputs import LARGE, OPTIONS, TREES, Attention, Tree, check, group, ours, run

import flashpo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreting"),
]
BATCH = Tree.of(group(1500, 130, 512, 1, 300, 77), (700, (200, (20,), (90,)), (5,)), (64,), group(128, 64, 64))


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("tree", [*TREES.values(), LARGE], ids=[*TREES, "large"])
@pytest.mark.parametrize("attention", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_options(attention, tree, dtype):
    check(attention, tree.to("cuda"), "triton", dtype)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch(dim, window, dtype):
    check(Attention(heads=8, kv_heads=2, dim=dim, window=window), BATCH.to("cuda"), "triton", dtype)


@pytest.mark.parametrize("repeat", [1, 2, 4, 8])
def test_grouped_queries(repeat):
    check(Attention(heads=8, kv_heads=8 // repeat, dim=128), BATCH.to("cuda"), "triton", torch.bfloat16)


def step(attention, tree, inputs, upstream):
    with flashpo.backend("triton"):
        return run(lambda *x: ours(attention, tree, *x), inputs, upstream)


@pytest.mark.parametrize("name", ["D 128", "everything"])
def test_same_every_time(name):
    attention, tree = OPTIONS[name], BATCH.to("cuda")
    inputs = attention.make(len(tree), torch.bfloat16)
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim or attention.dim)
    first = step(attention, tree, inputs, upstream)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(step(attention, tree, inputs, upstream), first))


def test_more_elements_than_32_bits_count():
    """Chains of 256 tokens: the last gives, bit for bit, what it gives alone."""
    heads, dim, length = 128, 128, 256
    tree = Tree.of(*[(length,)] * 540).to("cuda")
    assert len(tree) * heads * dim > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    attention = Attention(heads=heads, kv_heads=heads, dim=dim)
    inputs = [torch.randn(len(tree), heads, dim, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    upstream = torch.randn(len(tree), heads, dim, dtype=torch.bfloat16)
    alone = [x.detach()[-length:].clone().requires_grad_() for x in inputs]
    expected = step(attention, Tree.of((length,)).to("cuda"), alone, upstream[-length:])
    assert all(torch.equal(x[-length:], y) for x, y in zip(step(attention, tree, inputs, upstream), expected))


def test_nothing_waits_for_the_gpu():
    attention, tree = OPTIONS["everything"], BATCH.to("cuda")
    inputs = attention.make(len(tree), torch.bfloat16)
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim)
    step(attention, tree, inputs, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(attention, tree, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
