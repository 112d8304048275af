"""tree_attention against every row attended to by itself, where a shared token's gradient is the sum over its rows."""

import pytest
import torch
from tree_inputs import TREES, Attention, Tree

import flashpo
from flashpo import tree_attention

every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
OPTIONS = {
    "plain": Attention(),
    "scaled": Attention(scale=0.3),
    "window": Attention(window=5),
    "window of one": Attention(window=1),
    "window longer than any row": Attention(window=1000),
    "softcap": Attention(softcap=1.5),
    "sinks": Attention(sinks=True),
    "everything": Attention(window=7, softcap=2.0, sinks=True, scale=0.5, v_dim=24),
    "one head": Attention(heads=1, kv_heads=1),
    "one kv head": Attention(heads=8, kv_heads=1),
    "equal heads": Attention(heads=3, kv_heads=3, dim=7, v_dim=5),
    "D 80": Attention(dim=80),
    "D 128": Attention(dim=128),
    "D 256": Attention(heads=2, kv_heads=1, dim=256),
}
every_option = pytest.mark.parametrize("attention", OPTIONS.values(), ids=OPTIONS.keys())


def ours(attention: Attention, tree: Tree, *inputs, **options):
    q, k, v, *sinks = inputs
    options = attention.options | {"sinks": sinks[0] if sinks else None} | options
    return tree_attention(q, k, v, tree.end, tree.position, **options)


def run(function, inputs, upstream):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype), allow_unused=True)]


@every_tree
@every_option
def test_float64_is_exact(attention, tree):
    inputs = attention.make(len(tree))
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim or attention.dim)
    exact = run(lambda *x: attention.rows(tree, *x), inputs, upstream)
    for result, true in zip(run(lambda *x: ours(attention, tree, *x), inputs, upstream), exact):
        torch.testing.assert_close(result, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradcheck(name):
    attention, tree = OPTIONS[name], Tree.of((2, (2,), (1, (2,), (1,))))
    inputs = attention.make(len(tree))
    assert torch.autograd.gradcheck(lambda *x: ours(attention, tree, *x), inputs)


@pytest.mark.parametrize("backend", ["torch"])
def test_no_tokens(backend):
    attention = Attention(sinks=True)
    inputs = attention.make(0, torch.float32)
    with flashpo.backend(backend):
        out, *grads = run(lambda *x: ours(attention, Tree.of(), *x), inputs, torch.zeros(0, 4, 16))
    assert out.shape == (0, 4, 16)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    assert (grads[-1] == 0).all()
