"""tree_attention against attention of each row by itself. The gradient of a shared token is the sum over its rows."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_equal_to_rounding
from inputs import DTYPES, backends, sanitized
from tree_inputs import LARGE, OPTIONS, TREES, Attention, Tree, check, group, ours, run

import flashpo

every_backend = sanitized
in_tiles = pytest.mark.parametrize("backend", [b for b in backends() if b != "torch"])
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
every_option = pytest.mark.parametrize("attention", OPTIONS.values(), ids=OPTIONS.keys())


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


@every_tree
@every_option
@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_as_accurate_as_torch(attention, tree, backend, dtype):
    check(attention, tree, backend, dtype)


@pytest.mark.parametrize("name", ["plain", "everything", "one kv head", "D 80"])
@in_tiles
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


@in_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_that_starts_late_in_a_tile(backend, dtype):
    """A query whose tile has hundreds of keys before the first that it sees itself."""
    check(Attention(window=650), Tree.of((700,), (100,)), backend, dtype)


@every_backend
def test_each_input_alone(backend):
    attention, tree = OPTIONS["everything"], TREES["two groups"]
    inputs = attention.make(len(tree), torch.float32)
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim)
    with flashpo.backend(backend):
        _, *together = run(lambda *x: ours(attention, tree, *x), inputs, upstream)
        for n, whole in enumerate(together):
            alone = [x.detach() for x in inputs]
            alone[n].requires_grad_()
            out = ours(attention, tree, *alone)
            assert torch.equal(torch.autograd.grad(out, alone[n], upstream)[0], whole)


@in_tiles
@pytest.mark.parametrize("name", ["plain", "window", "everything"])
def test_same_twice(name, backend):
    attention, tree = OPTIONS[name], LARGE
    inputs = attention.make(len(tree), torch.float32)
    upstream = torch.randn(len(tree), attention.heads, attention.v_dim or attention.dim)
    with flashpo.backend(backend):
        first, second = (run(lambda *x: ours(attention, tree, *x), inputs, upstream) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@every_backend
def test_layouts(backend):
    """Slices and transposes give what their contiguous copies give: bitwise, but for torch's own products."""
    tree = TREES["levels"]
    N = len(tree)
    plain = [torch.randn(N, heads, 16) for heads in (4, 2, 2)]
    upstream = torch.randn(N, 4, 16)

    def attend(*x):
        return ours(Attention(), tree, *x)

    def rows(*x):
        return Attention().rows(tree, *x)

    exact = run(rows, [x.double().requires_grad_() for x in plain], upstream)
    baseline = run(rows, [x.clone().requires_grad_() for x in plain], upstream)
    layouts = {
        "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "features first": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "of a wider tensor": lambda x: torch.cat([x, x], 2)[..., :16],
    }
    with flashpo.backend(backend):
        expected = run(attend, [x.requires_grad_() for x in plain], upstream)
        for change in layouts.values():
            inputs = [change(x.detach()).requires_grad_() for x in plain]
            got = run(attend, inputs, change(upstream))
            if backend != "torch":
                assert all(torch.equal(x, y) for x, y in zip(got, expected))
            for numbers in zip(got, expected, exact, baseline):
                assert_equal_to_rounding(*numbers)


@pytest.mark.parametrize("seed", range(20))
def test_random_trees(seed):
    """In float64: single tokens, paths that end within a tile of the path for CPUs, and paths longer than one."""
    torch.manual_seed(seed)
    tree = Tree.random(roots=3, depth=4, children=4, tokens=(3, 12, 40)[seed % 3])
    check(Attention(window=(0, 9)[seed % 2], sinks=seed % 4 == 3, heads=8), tree, "native", torch.float32)


@every_backend
def test_padded_batch(backend):
    """The model of transformers: prompts repeated, completions padded, torch's attention."""
    tree = TREES["two groups"]
    attention = Attention(heads=8, kv_heads=2, dim=64)
    inputs = attention.make(len(tree), torch.float32)
    longest = max(map(len, tree.rows))
    padded = torch.stack([F.pad(row, (0, longest - len(row))) for row in tree.rows])
    real = torch.stack([torch.arange(longest) < len(row) for row in tree.rows])
    upstream = torch.randn(*real.shape, 8, 64) * real[..., None, None]

    def stock(q, k, v):
        q, k, v = (x[padded].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def unpacked(*x):
        with flashpo.backend(backend):
            return ours(attention, tree, *x)[padded]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact, baseline = run(stock, wide, upstream), run(stock, inputs, upstream)
    for n, (result, true, other) in enumerate(zip(run(unpacked, inputs, upstream), exact, baseline)):
        assert_as_accurate(*((x[real] if n == 0 else x) for x in (result, true, other)))


@every_backend
def test_compiles_into_one_graph(backend, graphs, counting):
    attention = OPTIONS["sinks"]

    def loss(tree, inputs):
        return ours(attention, tree, *inputs).square().sum()

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for tokens in (5, 9, 17):
            tree = Tree.of(group(tokens, 3, tokens + 1))
            inputs = [x.detach().contiguous().requires_grad_() for x in attention.make(len(tree), torch.float32)]
            expected = torch.autograd.grad(loss(tree, inputs), inputs)
            got = torch.autograd.grad(compiled(tree, inputs), inputs)
            assert all(torch.equal(x, y) for x, y in zip(got, expected))
    assert len(graphs) == 1


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [0, 2, 40, 65, 200])
@pytest.mark.parametrize("tree", [Tree.of((320,)), LARGE], ids=["one chain", "large"])
def test_windows_over_threads(tree, window, threads, monkeypatch):
    """A window changes how much each range of queries has to do, and with that how many ranges there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check(Attention(heads=2, kv_heads=1, window=window), tree, "native", torch.float32)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_threads(name, monkeypatch):
    """Forward gives the same bits with any number of them; backward adds up the keys' gradients in other orders."""
    attention = OPTIONS[name]
    inputs = attention.make(len(LARGE), torch.float32)
    upstream = torch.randn(len(LARGE), attention.heads, attention.v_dim or attention.dim)
    results = []
    for threads in (1, 2, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with flashpo.backend("native"):
            results.append(run(lambda *x: ours(attention, LARGE, *x), inputs, upstream))
    for out, *grads in results[1:]:
        assert torch.equal(out, results[0][0])
        torch.testing.assert_close(grads, results[0][1:], rtol=1e-4, atol=1e-4)


q, k, end = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.full((5,), 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("q must be a torch.Tensor, got list", {"q": [1.0]}),
        ("q must be float32", {"q": q.long()}),
        (r"k must be \(tokens, heads, head dimension\), got \(2, 8\)", {"k": k[0]}),
        ("v must have the dtype of q", {"v": k.half()}),
        ("k has 4 tokens, q has 5", {"k": k[:4]}),
        ("q has 3 heads, which is not a multiple of the 2 of k", {"q": q[:, :3]}),
        ("v has 1 heads, k has 2", {"v": k[:, :1]}),
        ("head dimensions of q and k must agree", {"q": q[..., :4]}),
        ("head dimensions of q and k must agree, and none be 0: 8, 8, 0", {"v": k[..., :0]}),
        ("k is on meta", {"k": k.to("meta")}),
        ("end must be a torch.Tensor", {"end": None}),
        ("end must be int32", {"end": end.long()}),
        ("position must be int32", {"position": end.float()}),
        ("position must have the shape of q's tokens", {"position": end[:4]}),
        ("end must be greater than the index of its token", {"end": end - 1}),
        ("end must be greater than the index of its token", {"end": end + 1}),
        ("neither nested nor disjoint", {"end": torch.tensor([3, 2, 4, 4, 5], dtype=torch.int32)}),
        ("window must be an integer of at least 0 and fit into 64 bits, got -1", {"window": -1}),
        ("window must be an integer of at least 0, got 2.5", {"window": 2.5}),
        ("softcap must be positive", {"softcap": -1.0}),
        ("scale must be positive", {"scale": 0.0}),
        ("sinks must have one number for each head of q", {"sinks": torch.zeros(2)}),
        ("sinks must be float32", {"sinks": torch.zeros(4).int()}),
    ],
)
def test_errors(message, change):
    arguments = {"q": q, "k": k, "v": k, "end": end, "position": end} | change
    with pytest.raises((TypeError, ValueError), match=message):
        flashpo.tree_attention(**arguments)
