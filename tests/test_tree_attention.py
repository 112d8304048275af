"""tree_attention against every row attended to by itself, where a shared token's gradient is the sum over its rows."""

import dataclasses

import pytest
import torch
from accuracy import assert_as_accurate
from inputs import DTYPES, backends
from tree_inputs import LARGE, TREES, Attention, Tree

import flashpo
from flashpo import tree_attention

every_backend = pytest.mark.parametrize("backend", backends())
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
OPTIONS = {
    "plain": Attention(),
    "scaled": Attention(scale=0.3),
    "window": Attention(window=5),
    "window longer than any row": Attention(window=1000),
    "softcap": Attention(softcap=1.5),
    "sinks": Attention(heads=32, kv_heads=4, sinks=True),
    "everything": Attention(heads=32, kv_heads=4, window=7, softcap=2.0, sinks=True, scale=0.5, v_dim=24),
    "one head": Attention(heads=1, kv_heads=1, dim=64),
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
    options = {"heads": 4, "kv_heads": 2, "dim": 4, "v_dim": 3}  # small, for it tries every number
    attention = dataclasses.replace(OPTIONS[name], **options)
    tree = Tree.of((2, (2,), (1, (2,), (1,))))
    inputs = attention.make(len(tree))
    assert torch.autograd.gradcheck(lambda *x: ours(attention, tree, *x), inputs)


@every_backend
def test_no_tokens(backend):
    attention = Attention(sinks=True)
    inputs = attention.make(0, torch.float32)
    with flashpo.backend(backend):
        out, *grads = run(lambda *x: ours(attention, Tree.of(), *x), inputs, torch.zeros(0, 4, 16))
    assert out.shape == (0, 4, 16)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    assert (grads[-1] == 0).all()


def check(attention, tree, backend, dtype):
    inputs = attention.make(len(tree), dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim or attention.dim).to(dtype)
    exact = run(lambda *x: attention.rows(tree, *x), wide, upstream)
    plain = run(lambda *x: attention.rows(tree, *x), inputs, upstream)
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        results = run(lambda *x: ours(attention, tree, *x), inputs, upstream)
    assert {used for counts in flashpo.stats().values() for used in counts} == {backend}
    for result, true, baseline in zip(results, exact, plain):
        assert result.dtype == dtype
        assert_as_accurate(result, true, baseline)


@every_tree
@every_option
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_as_accurate_as_torch(attention, tree, backend, dtype):
    check(attention, tree, backend, dtype)


@pytest.mark.parametrize("name", ["plain", "everything", "one kv head", "D 80"])
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_larger_than_a_tile(name, backend, dtype):
    check(OPTIONS[name], LARGE, backend, dtype)


@pytest.mark.parametrize(
    ("attention", "tree"), [(Attention(), Tree.of((1,))), (Attention(window=1), TREES["levels"])], ids=["one", "window"]
)
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_sees_itself_alone(attention, tree, backend, dtype):
    """Gets its own value; its scores do not matter."""
    q, k, v = attention.make(len(tree), dtype)
    upstream = torch.randn(len(tree), attention.heads, attention.dim).to(dtype)
    with flashpo.backend(backend):
        out, dq, dk, dv = run(lambda *x: ours(attention, tree, *x), [q, k, v], upstream)
    repeat = attention.heads // attention.kv_heads
    assert torch.equal(out, v.repeat_interleave(repeat, 1))
    expected = upstream.unflatten(1, (-1, repeat)).float().sum(2).to(dtype)
    torch.testing.assert_close(dv, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    for grad in dq, dk:  # the difference of two sums of the same products in fp32
        assert grad.abs().max() < 1e-5


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_that_starts_late_in_a_tile(backend, dtype):
    """A query whose tile has hundreds of keys before the first that it sees itself."""
    check(Attention(window=650), Tree.of((700,), (100,)), backend, dtype)
