"""Values and gradients of every operator, backend and dtype against fp64. Plain torch's own error is the yardstick."""

import pytest
import torch
from accuracy import assert_as_accurate, assert_equal_to_rounding
from inputs import ALL, CASES, DTYPES, IGNORED, Case, backends, sanitized
from op_examples import EXAMPLES, Recorder

import flashpo
from flashpo import linear_logprob, selective_log_softmax
from flashpo._op import OPS
from flashpo.ops._linear_logprob_cpu import Tiles
from flashpo.ops.linear_logprob import linear_logprob_partial
from flashpo.ops.token_stats import LOG_Z, LOG_Z_REST, merge_partials

SMALL = [case for case in CASES if case.vocab < 3000 and case.tokens != (4100,)]
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
small = pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
every_backend = pytest.mark.parametrize("backend", backends())


def run(function, inputs, target, upstream):
    """Outputs, and gradients of sum_i upstream_i output_i; an upstream of None is an output that nothing uses."""
    out = function(inputs, target)
    used = [(x, d.to(x.dtype)) for x, d in zip((out.logprob, out.entropy), upstream) if d is not None]
    grads = torch.autograd.grad([x for x, _ in used], inputs, [d for _, d in used])
    return [x.detach().double() for x in out], grads


@named
@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(case: Case, backend, dtype):
    inputs, target = case.make()
    upstream = torch.randn(2, *case.tokens)
    exact, exact_grads = run(case.plain, case.cast(inputs, dtype, torch.float64), target, upstream)
    plain, plain_grads = run(case.plain, case.cast(inputs, dtype), target, upstream)
    flashpo.stats(reset=True)
    with flashpo.backend(backend):
        ours, grads = run(case.ours, case.cast(inputs, dtype), target, upstream)
    assert {used for counts in flashpo.stats().values() for used in counts} == {backend}
    for name, out, true, baseline in zip(ALL, ours, exact, plain):
        if name == "mean_logit" and case.masked:
            continue  # -inf by definition
        if name == "is_top1":  # where logits are rounded to 16 bits, a tie may fall the other way
            assert ((out == baseline) | (out == true)).all()
        else:
            assert_as_accurate(out, true, baseline)
    for grad, x, true, baseline in zip(grads, inputs, exact_grads, plain_grads):
        assert grad.dtype == dtype
        assert grad.shape == x.shape
        assert_as_accurate(grad, true, baseline)
    ignored = target == IGNORED
    assert all((x[ignored] == 0).all() for x in ours)


@small
@every_backend
@pytest.mark.parametrize("used", ["logprob", "entropy"])
def test_each_gradient_alone(case: Case, backend, used):
    """One output used, one input that needs a gradient: the others' work is skipped, the result the same."""
    inputs, target = case.make()
    d = torch.randn(case.tokens)
    upstream = (d, None) if used == "logprob" else (None, d)
    with flashpo.backend(backend):
        leaves = case.cast(inputs, torch.float32)
        _, together = run(case.ours, leaves, target, upstream)
        for i, whole in enumerate(together):
            alone = [x.detach() for x in leaves]
            alone[i].requires_grad_()
            out = getattr(case.ours(alone, target), used)
            assert torch.equal(torch.autograd.grad(out, alone[i], d)[0], whole)


def test_gradcheck_in_float64():
    case = Case("", (5,), 7, 19, True, 0.8, 0.7, 3.0, "some")
    inputs, target = case.make()
    with flashpo.backend("torch"):  # the only one that takes float64: what every other is measured against
        assert torch.autograd.gradcheck(
            lambda *x: case.ours(x, target)[:2], [x.requires_grad_() for x in inputs], fast_mode=True
        )
        logits = torch.randn(5, 19, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, target)[:2], [logits])


@every_backend
def test_opcheck(backend):
    """Schema, fake and aliasing of every operator that has the backend, with arguments recorded from real calls."""
    calls = {}
    for example in EXAMPLES:
        with Recorder(calls):
            example()
    assert set(calls) == set(OPS)
    tests = ("test_schema", "test_faketensor")
    for name, args in calls.items():
        if backend in OPS[name].kernels:
            with flashpo.backend(backend):
                torch.library.opcheck(OPS[name].overload, args, test_utils=tests)


@every_backend
@pytest.mark.parametrize("hidden", [None, 16], ids=["logits", "head"])
def test_compiles_into_one_graph(backend, hidden, graphs, counting):
    """fullgraph, and one graph for every length."""

    def loss(inputs, target):
        out = linear_logprob(*inputs, target) if hidden else selective_log_softmax(*inputs, target, temperature=0.7)
        return (out.logprob - 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for tokens in (5, 8, 13, 21):
            case = Case("", (tokens,), hidden, 130, ignored="some")
            inputs, target = case.make()
            leaves = case.cast(inputs, torch.float32)
            expected = torch.autograd.grad(loss(leaves, target), leaves)
            got = torch.autograd.grad(compiled(leaves, target), leaves)
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert len(graphs) == 1


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(backend, dtype):
    """From logits, where our own code fixes the order of everything: bitwise. Torch may sum one row in other parts."""
    case = Case("", (40,), None, 5003)
    (logits,), target = case.make()
    logits = logits.to(dtype)
    with flashpo.backend(backend):
        together = selective_log_softmax(logits, target, outputs=ALL)
        alone = selective_log_softmax(logits[7:8].clone(), target[7:8], outputs=ALL)
    if backend != "torch":
        assert all(torch.equal(a[7:8], b) for a, b in zip(together, alone))
    exact, plain = (case.plain([logits[7:8].to(x)], target[7:8]) for x in (torch.float64, torch.float32))
    for a, b, true, baseline in zip(together, alone, exact, plain):
        assert_equal_to_rounding(a[7:8], b, true, baseline)


@sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_over_the_logits(backend, dtype):
    case = Case("", (3, 6), None, 999, ignored="some")
    (logits,), target = case.make()
    d = torch.randn(2, *case.tokens)
    with flashpo.backend(backend):
        _, (expected,) = run(case.ours, case.cast([logits], dtype), target, d)
        mine = logits.to(dtype).requires_grad_()
        x = mine * 1  # not a leaf, as the output of a model is
        out = selective_log_softmax(x, target, inplace_backward=True)
        storage = x.data_ptr()
        x.register_hook(lambda g: seen.append(g.data_ptr()))
        seen = []
        torch.autograd.backward([out.logprob, out.entropy], list(d))
    assert seen == [storage]
    assert torch.equal(mine.grad, expected)


def test_backward_over_the_logits_is_found_out():
    """Whoever else saved the logits for backward gets autograd's error, not wrong gradients."""
    x = torch.randn(4, 9, requires_grad=True) * 1
    target = torch.zeros(4, dtype=torch.long)
    other = (x * x).sum()
    selective_log_softmax(x, target, inplace_backward=True).logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@every_backend
def test_parts_of_the_vocabulary_make_the_whole(backend):
    """Also a part of nothing but -inf."""
    case = Case("", (9,), 8, 90, bias=True)
    (h, w, b), target = case.make()
    h, w, b = h.float(), w.float(), b.float()
    b[30:60] = -torch.inf
    target[target < 60] = 5
    options = None, 0.8, 1.0, None, IGNORED
    with flashpo.backend(backend):
        parts = [
            linear_logprob_partial(h, w[i : i + 30], target, b[i : i + 30], *options, i, 90, True, torch.float32)
            for i in (0, 30, 60)
        ]
        whole = linear_logprob_partial(h, w, target, b, *options, 0, 90, True, torch.float32)
        results = [merge_partials(torch.stack(x), 90) for x in (parts, [whole])]
    mean = 5  # -inf by definition
    for row, (joined, at_once) in enumerate(zip(*results)):
        if row not in (LOG_Z, LOG_Z_REST, mean):  # only the sum of these two is defined
            assert joined.isfinite().all()
            torch.testing.assert_close(joined, at_once)
    torch.testing.assert_close(*(x[LOG_Z] + x[LOG_Z_REST] for x in results))


@every_backend
@pytest.mark.parametrize("vocab", [5, 17, 300])
@pytest.mark.parametrize("hidden", [None, 8], ids=["logits", "head"])
def test_impossible_tokens_in_every_statistic(backend, vocab, hidden):
    """Sums over the vocabulary that compensate for rounding meet infinities, alone or many, first or last."""
    target = torch.tensor([1, 2, 1])
    for places in ([0], [vocab - 1], [vocab // 2, vocab - 1], list(range(3, vocab))):
        gone = torch.zeros(vocab).index_fill_(0, torch.tensor(places), -torch.inf)
        logits = torch.randn(3, vocab)
        h, w = (logits, torch.eye(vocab)) if hidden is None else (torch.randn(3, hidden), torch.randn(vocab, hidden))
        with flashpo.backend("torch"):
            expected = selective_log_softmax(h @ w.t() + gone, target, outputs=ALL)
        with flashpo.backend(backend):
            if hidden is None:
                out = selective_log_softmax(logits + gone, target, outputs=ALL)
            else:
                out = linear_logprob(h, w, target, gone, outputs=ALL)
        assert (out.mean_logit == -torch.inf).all()
        for name, x, y in zip(ALL, out, expected):
            torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


@every_backend
def test_autocast_chooses_the_compute_dtype(backend):
    case = Case("", (12,), 32, 301)
    (h, w), target = case.make()
    h, w = h.float().requires_grad_(), w.float().requires_grad_()
    with flashpo.backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logprob(h, w, target)
        expected = linear_logprob(h.bfloat16(), w.bfloat16(), target)
        assert torch.equal(out.logprob, expected.logprob)
        out.logprob.sum().backward()
    assert h.grad.dtype == w.grad.dtype == torch.float32


def test_a_tied_weight_gets_one_gradient():
    embedding = torch.nn.Embedding(50, 8)
    tokens = torch.randint(50, (6,))

    def loss(logprob):
        return logprob(embedding(tokens), embedding.weight, tokens.roll(-1)).sum()

    ours = torch.autograd.grad(loss(lambda h, w, t: linear_logprob(h, w, t).logprob), embedding.weight)[0]
    plain = torch.autograd.grad(
        loss(lambda h, w, t: (h @ w.t()).log_softmax(-1).gather(-1, t[:, None])), embedding.weight
    )[0]
    torch.testing.assert_close(ours, plain)


def test_a_frozen_head_costs_no_gemm():
    """dW is neither computed nor allocated for a frozen head, dH not for frozen hidden states."""
    target = torch.randint(40, (6,))
    for frozen in (0, 1):
        leaves = [torch.randn(6, 8, requires_grad=frozen != 0), torch.randn(40, 8, requires_grad=frozen != 1)]
        with Recorder(calls := {}), torch.profiler.profile() as profile:
            linear_logprob(*leaves, target).logprob.sum().backward()
        assert calls["linear_logprob_bwd"][-3:] == (frozen != 0, frozen != 1, False)
        gemms = [e.count for e in profile.key_averages() if e.key == "aten::mm"]
        assert gemms == [3]  # forward, recompute, one gradient


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Buffers of the CPU path stay below 64 MB for few tokens, many tokens, and a head that autocast converts."""
    for tokens, features, vocab, dtype in (
        (10, 1024, 151936, torch.bfloat16),
        (5000, 8192, 262144, torch.bfloat16),
        (100_000, 64, 262144, torch.float32),
    ):
        hidden, weight = torch.empty(1, features).expand(tokens, -1), torch.empty(1, features).expand(vocab, -1)
        tiles = Tiles(
            hidden, weight, torch.zeros(tokens, dtype=torch.long), *(None, None, 1.0, 1.0, None, -100, 0), dtype
        )
        tile = tiles.buffer.numel() * tiles.dtype.itemsize
        part = tiles.width * features * 4
        other = tile if tiles.dtype.itemsize == 2 else tiles.buffer_of_products().numel() * 4
        assert tile + other + part <= 64 << 20
