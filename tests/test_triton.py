"""Triton kernels against their references, on a CPU: TRITON_INTERPRET=1 pytest tests/test_triton.py"""

import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_equal_to_rounding

import flashpo
from flashpo import linear_logprob, selective_log_softmax
from flashpo.ops.linear_logprob import linear_logprob_bwd, linear_logprob_partial
from flashpo.ops.token_stats import merge_partials

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen when Triton is imported: set TRITON_INTERPRET=1", allow_module_level=True)

from flashpo.kernels import linear_logprob as kernels

ALL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100

pytestmark = pytest.mark.usefixtures("poisoned")


def results(f, inputs, upstream, backend):
    """Outputs of f(*inputs) on `backend` and gradients of sum_i upstream_i output_i (None: output without gradient)."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]  # clone keeps strides
    with flashpo.backend(backend):
        out = f(*inputs)
        wanted = [(y, d.to(y.dtype)) for y, d in zip((out.logprob, out.entropy), upstream) if d is not None]
        grads = torch.autograd.grad([y for y, _ in wanted], inputs, [d for _, d in wanted])
    return [x.detach() for x in out if x is not None], list(grads)


def compare(f, inputs, shape, upstream=None, plain=None):
    """f on Triton against f in fp64, with the error of torch (gradients: of `plain`, if given) as the yardstick."""
    upstream = torch.randn(2, *shape) if upstream is None else upstream
    flashpo.stats(reset=True)
    out, grads = results(f, inputs, upstream, "triton")
    assert {name for used in flashpo.stats().values() for name in used} == {"triton"}
    exact, exact_grads = results(f, [x.double() for x in inputs], upstream, "torch")
    torch_out, torch_grads = results(f, inputs, upstream, "torch")
    if plain is not None:
        _, torch_grads = results(plain, inputs, upstream, "torch")
    for ours, true, reference in zip(out + grads, exact + exact_grads, torch_out + torch_grads):
        assert_as_accurate(ours, true, reference)
    return out, grads


def indices(shape, V, ignored=0.2):
    index = torch.randint(0, V, shape)
    return index.masked_fill(torch.rand(shape) < ignored, IGNORED)


# 37: less than a block; 1001: odd, a part of a block; 8197: a second block of 5 columns
@pytest.mark.parametrize("V", [37, 1001, 8197])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selective_log_softmax(V, dtype):
    logits, index = (torch.randn(2, 3, V) * 4).to(dtype), indices((2, 3), V)
    index[0, 0], index[0, 1], index[1, 2] = logits[0, 0].argmax(), V - 1, IGNORED
    out, (grad,) = compare(
        lambda x: selective_log_softmax(x, index, temperature=0.7, outputs=ALL), [logits], index.shape
    )
    assert all((x[index == IGNORED] == 0).all() for x in out)
    assert (grad[index == IGNORED] == 0).all()


LAYOUTS = {
    "tokens of a longer sequence": lambda: torch.randn(2, 5, 203)[:, 1:-1],
    "sequence first": lambda: torch.randn(3, 2, 203).transpose(0, 1),
    "columns of a wider head": lambda: torch.randn(2, 3, 256)[..., :203],
    "strided columns": lambda: torch.randn(2, 203, 3).transpose(1, 2),
    "one token": lambda: torch.randn(1, 1, 203),
    "one-entry vocabulary": lambda: torch.randn(2, 3, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True])
def test_selective_log_softmax_layouts(layout, inplace):
    logits = LAYOUTS[layout]()
    if inplace and logits.stride(-1) != 1:
        pytest.skip("written over by the reference only")
    index = torch.randint(0, logits.shape[-1], logits.shape[:2])

    def f(x):  # a view, because in-place backward may not write over a leaf
        return selective_log_softmax(x.view_as(x), index, temperature=1.3, inplace_backward=inplace)

    compare(f, [logits], index.shape)


@pytest.mark.parametrize("only", [0, 1], ids=["logprob", "entropy"])
def test_selective_log_softmax_gradients_alone(only):
    index = indices((2, 3), 300)
    upstream = [torch.randn(2, 3) if i == only else None for i in range(2)]
    compare(lambda x: selective_log_softmax(x, index), [torch.randn(2, 3, 300)], (2, 3), upstream)


def test_selective_log_softmax_masked_vocabulary():
    """-inf logits, and a first block of nothing else, give finite results."""
    logits = torch.randn(1, 4, 9000) * 3
    logits[0, 0, :8500] = -torch.inf
    logits[0, 1, 10:] = -torch.inf
    logits[0, 2, 1:] = -torch.inf  # a certain token
    logits[0, 3, ::2] = torch.finfo(torch.float32).min
    index = torch.tensor([[8999, 3, 0, 7]])
    compare(
        lambda x: selective_log_softmax(x, index, outputs=("entropy", "log_sum_sq_probs", "is_top1")), [logits], (1, 4)
    )


def test_large_logits():
    """Far from 0 too, results are those of the same logits near it: all is relative to the largest one."""
    logits, index = torch.randn(1, 4, 9000) * 3 + torch.tensor([[[-3e4], [100.0], [3e3], [1e5]]]), indices((1, 4), 9000)
    compare(lambda x: selective_log_softmax(x, index, outputs=ALL), [logits], (1, 4))


def test_top1_is_the_first_of_equals():
    logits = torch.zeros(1, 3, 9000)
    logits[..., 100] = logits[..., 8600] = 5.0
    with flashpo.backend("triton"):
        is_top1 = selective_log_softmax(logits, torch.tensor([[100, 8600, 5]]), outputs=("is_top1",)).is_top1
    assert is_top1.tolist() == [[True, False, False]]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_nothing_to_do(shape):
    """No token, or none that counts: zeros that stay in the graph."""
    index = torch.full(shape, IGNORED)
    logits, hidden, weight = torch.randn(*shape, 50), torch.randn(*shape, 20), torch.randn(50, 20)
    hidden[...] = torch.nan  # an ignored token's hidden state is never looked at
    for f, inputs in (
        (lambda x: selective_log_softmax(x, index, outputs=ALL), [logits]),
        (lambda h, w: linear_logprob(h, w, index, outputs=ALL), [hidden, weight]),
    ):
        out, grads = results(f, inputs, torch.randn(2, *shape), "triton")
        assert all(x.shape == shape for x in out)
        assert [g.shape for g in grads] == [x.shape for x in inputs]
        assert all((x == 0).all() for x in out + grads)


def eager(hidden, weight, bias, target, *, temperature=1.0, logit_scale=1.0, softcap=None):
    """linear_logprob as a trainer would write it: what 16-bit gradients are held against."""
    x = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    logp = (x / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)).log_softmax(-1)
    ignored = target == IGNORED
    logprob = logp.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return flashpo.TokenStats(logprob.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0))


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "per-token temperature": {"temperature": "token"},
    "Gemma": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3},
    "Granite": {"logit_scale": 0.125},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprob(head, dtype, monkeypatch):
    # 140 tokens: two tiles of 128; 1301 columns: a second split, and with few CHUNK_BYTES a second chunk; odd H
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    N, H, V = 140, 67, 1301
    options = dict(HEADS[head])
    if options.get("temperature") == "token":
        options["temperature"] = torch.rand(N) + 0.5
    hidden, weight = torch.randn(N, H, dtype=dtype), (torch.randn(V, H) * 0.4).to(dtype)
    bias, target = torch.randn(V, dtype=dtype), indices((N,), V)
    out, (d_hidden, _, _) = compare(
        lambda h, w, b: linear_logprob(h, w, target, b, outputs=ALL, **options),
        [hidden, weight, bias],
        (N,),
        plain=None if dtype == torch.float32 else lambda h, w, b: eager(h, w, b, target, **options),
    )
    assert all((x[target == IGNORED] == 0).all() for x in (*out, d_hidden))


@pytest.mark.parametrize("N", [1, 5])
def test_linear_logprob_few_columns(N):
    """Fewer tokens, columns and features than a tile has; hidden states and head not contiguous; no bias."""
    hidden, weight = torch.randn(N, 40)[:, :9], torch.randn(9, 11).t()
    target = torch.randint(0, 11, (N,))
    compare(lambda h, w: linear_logprob(h, w, target, outputs=ALL), [hidden, weight], (N,))


@pytest.mark.parametrize("only", [0, 1], ids=["logprob", "entropy"])
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_linear_logprob_gradients_alone(only, wanted):
    tensors = {"hidden": torch.randn(6, 20), "weight": torch.randn(90, 20), "bias": torch.randn(90)}
    target = indices((6,), 90)
    upstream = [torch.randn(6) if i == only else None for i in range(2)]

    def f(x):
        given = {name: (x if name == wanted else t.to(x.dtype)) for name, t in tensors.items()}
        return linear_logprob(target=target, **given)

    compare(f, [tensors[wanted]], (6,), upstream)


def test_linear_logprob_masked_vocabulary():
    """A bias of -inf, over the whole first split too, gives finite results and gradients."""
    hidden, weight, bias = torch.randn(3, 20), torch.randn(1301, 20), torch.randn(1301)
    bias[:1100] = -torch.inf
    target = torch.tensor([1100, 1300, 1200])
    compare(
        lambda h, w, b: linear_logprob(h, w, target, b, outputs=("entropy", "log_sum_sq_probs", "is_top1")),
        [hidden, weight, bias],
        (3,),
    )


def test_linear_logprob_ignores_what_ignored_tokens_hold():
    """Outputs are the same bits; gradients come from torch's products, of eight rows instead of six."""
    hidden, weight, target = torch.randn(6, 20), torch.randn(90, 20), torch.randint(0, 90, (6,))
    inputs, upstream = [hidden, weight], torch.ones(2, 6)
    clean, grads = results(lambda h, w: linear_logprob(h, w, target), inputs, upstream, "triton")
    _, plain = results(lambda h, w: eager(h, w, None, target), inputs, upstream, "torch")
    _, exact = results(lambda h, w: eager(h, w, None, target), [x.double() for x in inputs], upstream, "torch")
    hidden, longer = torch.cat([torch.full((2, 20), torch.inf), hidden]), torch.cat([torch.full((2,), IGNORED), target])
    out, (d_hidden, d_weight) = results(
        lambda h, w: linear_logprob(h, w, longer), [hidden, weight], torch.ones(2, 8), "triton"
    )
    assert all(torch.equal(x[2:], y) for x, y in zip(out, clean))
    for ours, other, true, baseline in zip((d_hidden[2:], d_weight), grads, exact, plain):
        assert_equal_to_rounding(ours, other, true, baseline)


def test_linear_logprob_mixed_dtypes():
    """An fp32 head under 16-bit hidden states is rounded to their dtype, tile by tile."""
    hidden, weight, target = torch.randn(9, 33).bfloat16(), torch.randn(200, 33), torch.randint(0, 200, (9,))
    upstream = torch.randn(2, 9)
    out, grads = results(lambda h, w: linear_logprob(h, w, target), [hidden, weight], upstream, "triton")
    rounded = [hidden, weight.bfloat16()]
    exact, exact_grads = results(
        lambda h, w: linear_logprob(h, w, target), [x.double() for x in rounded], upstream, "torch"
    )
    torch_out, _ = results(lambda h, w: linear_logprob(h, w, target), rounded, upstream, "torch")
    _, torch_grads = results(lambda h, w: eager(h, w, None, target), rounded, upstream, "torch")
    assert grads[1].dtype == torch.float32
    for ours, true, reference in zip(out + grads, exact + exact_grads, torch_out + torch_grads):
        assert_as_accurate(ours, true, reference)


@pytest.mark.parametrize("side", [False, True])
def test_vocabulary_in_parts(side):
    """Shards of the head, merged, are the whole; their gradients add up (hidden) or line up (weight, bias)."""
    N, H, V, cut = 7, 30, 1500, 1100
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    target = torch.tensor([0, cut - 1, cut, V - 1, IGNORED, 500, 1200])
    live = target != IGNORED
    d_logprob, d_entropy = torch.randn(2, N)
    parts = [(0, slice(0, cut)), (cut, slice(cut, V))]
    head = None, 0.8, 1.0, None, IGNORED  # token temperature, temperature, scale, softcap

    def both(backend, dtype, parts):
        h, w, b, *upstream = (x.to(dtype) for x in (hidden, weight, bias, d_logprob, d_entropy))
        with flashpo.backend(backend):
            columns = [
                linear_logprob_partial(h, w[s], target, b[s], *head, start, V, side, dtype) for start, s in parts
            ]
            rows = merge_partials(torch.stack(columns), V)
            grads = [
                linear_logprob_bwd(h, w[s], target, b[s], *head, start, dtype, rows, *upstream, True, True, True)
                for start, s in parts
            ]
        d_hidden, d_weight, d_bias = zip(*grads)
        return [*rows[:, live], sum(d_hidden), torch.cat(d_weight), torch.cat(d_bias)]

    whole = [(0, slice(0, V))]
    for out in (both("triton", torch.float32, parts), both("triton", torch.float32, whole)):
        for ours, exact, reference in zip(
            out, both("torch", torch.float64, whole), both("torch", torch.float32, whole)
        ):
            assert_as_accurate(ours, exact, reference)


def test_forward_and_backward_of_different_backends():
    hidden, weight, target = torch.randn(6, 20), torch.randn(90, 20), torch.randint(0, 90, (6,))
    grads = {}
    for forward in ("triton", "torch"):
        for backward in ("triton", "torch"):
            h = hidden.clone().requires_grad_()
            with flashpo.backend(forward):
                out = linear_logprob(h, weight, target)
            with flashpo.backend(backward):
                grads[forward, backward] = torch.autograd.grad((out.logprob + 0.1 * out.entropy).sum(), h)[0]
    for grad in grads.values():
        torch.testing.assert_close(grad, grads["torch", "torch"])


def test_a_token_does_not_depend_on_its_batch():
    """Bitwise from logits; from hidden states the interpreter multiplies with numpy, to whom a row's place matters."""
    hidden, weight, target = torch.randn(150, 40), torch.randn(1200, 40), torch.randint(0, 1200, (150,))
    logits, here = hidden @ weight.t(), slice(140, 141)
    exact = eager(hidden[here].double(), weight.double(), None, target[here])
    plain = eager(hidden[here], weight, None, target[here])
    with flashpo.backend("triton"):
        many, one = (linear_logprob(hidden[s], weight, target[s]) for s in (slice(None), here))
        assert_equal_to_rounding(many.logprob[here], one.logprob, exact.logprob, plain.logprob)
        assert_equal_to_rounding(many.entropy[here], one.entropy, exact.entropy, plain.entropy)
        many, one = (selective_log_softmax(logits[s], target[s]) for s in (slice(None), slice(140, 141)))
        assert torch.equal(many.logprob[140:141], one.logprob)


def test_double_precision_is_left_to_the_reference():
    with flashpo.backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        selective_log_softmax(torch.randn(2, 5).double(), torch.tensor([0, 1]))


def test_indices_are_checked():
    with flashpo.backend("triton"):
        with pytest.raises(ValueError, match="index"):
            selective_log_softmax(torch.randn(2, 5), torch.tensor([0, 5]))
        with pytest.raises(ValueError, match="target"):
            linear_logprob(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, -1]))


@pytest.mark.parametrize("kilobytes", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [2, 4])
def test_tiles_fit(kilobytes, dtype, stored):
    block_n, block_v, block_h, stages, _ = kernels.tiles(dtype, kilobytes * 1024, stored)
    assert stages * (block_n + block_v) * block_h * stored <= kilobytes * 1024
    assert kernels.SPLIT % block_v == 0
