"""The Triton backend on a GPU at real sizes: accuracy, 64-bit addresses, no host sync, no recompilation."""

import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

import flashpo
from flashpo import linear_logprob, selective_log_softmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreting"),
]
ALL = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
IGNORED = -100


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda"):
        yield
    torch.cuda.empty_cache()


def need_gigabytes(n):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < n:
        pytest.skip(f"needs {n} GiB of GPU memory, {free:.0f} are free")


def results(f, inputs, upstream, backend):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    with flashpo.backend(backend):
        out = f(*inputs)
        d = [d.to(y.dtype) for d, y in zip(upstream, (out.logprob, out.entropy))]
        grads = torch.autograd.grad([out.logprob, out.entropy], inputs, d)
    return [x.detach() for x in out if x is not None] + list(grads)


def indices(N, V):
    return torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < 0.2, IGNORED)


# V: Llama 2, an odd one whose rows are not aligned, Qwen 2.5, Gemma
@pytest.mark.parametrize("V", [32_000, 50_257, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selective_log_softmax(V, dtype):
    logits, index, upstream = (torch.randn(48, V) * 4).to(dtype), indices(48, V), torch.randn(2, 48)

    def f(x):
        return selective_log_softmax(x, index, temperature=0.7, outputs=ALL)

    def inplace(x):
        return selective_log_softmax(x.view_as(x), index, temperature=0.7, outputs=ALL, inplace_backward=True)

    out = results(f, [logits], upstream, "triton")
    exact, torch_out = results(f, [logits.double()], upstream, "torch"), results(f, [logits], upstream, "torch")
    for ours, true, reference in zip(out, exact, torch_out):
        assert_as_accurate(ours, true, reference)
    assert all(torch.equal(x, y) for x, y in zip(out, results(inplace, [logits], upstream, "triton")))


def eager(hidden, weight, target):
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    ignored = target == IGNORED
    logprob = logp.gather(-1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return flashpo.TokenStats(logprob.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0))


@pytest.mark.parametrize("V", [32_000, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_logprob(V, dtype):
    N, H = 300, 896  # Qwen 2.5 0.5B
    need_gigabytes(16)
    hidden, weight = torch.randn(N, H, dtype=dtype), (torch.randn(V, H) * 0.1).to(dtype)
    target, upstream = indices(N, V), torch.randn(2, N)

    def f(h, w):
        return linear_logprob(h, w, target, outputs=ALL)

    out = results(f, [hidden, weight], upstream, "triton")
    exact = results(f, [hidden.double(), weight.double()], upstream, "torch")
    torch_out = results(f, [hidden, weight], upstream, "torch")
    if dtype != torch.float32:  # gradients: against what a trainer's own 16-bit head does
        torch_out[-2:] = results(lambda h, w: eager(h, w, target), [hidden, weight], upstream, "torch")[-2:]
    for ours, true, reference in zip(out, exact, torch_out):
        assert_as_accurate(ours, true, reference)


def test_more_logits_than_32_bits_count():
    N, V = 14_300, 151_936
    assert N * V > 2**31
    need_gigabytes(12)
    logits, index = torch.randn(N, V, dtype=torch.bfloat16), torch.randint(0, V, (N,))
    last = logits[-8:].clone()
    upstream = torch.randn(2, N)

    def f(x, index):
        return selective_log_softmax(x, index, inplace_backward=True)

    with flashpo.backend("triton"):
        leaf = logits.requires_grad_()
        out = f(leaf.view_as(leaf), index)
        (grad,) = torch.autograd.grad([out.logprob, out.entropy], leaf, upstream.unbind())
    ours = [out.logprob[-8:].detach(), out.entropy[-8:].detach(), grad[-8:]]
    for x, y in zip(ours, results(lambda x: selective_log_softmax(x, index[-8:]), [last], upstream[:, -8:], "triton")):
        assert torch.equal(x, y)


def test_a_head_of_more_elements_than_32_bits_count():
    N, V, H = 40, 262_144, 8_448
    assert V * H > 2**31
    need_gigabytes(40)
    hidden, weight = torch.randn(N, H, dtype=torch.bfloat16), torch.randn(V, H, dtype=torch.bfloat16) * 0.01
    target = torch.arange(V - N, V)
    with flashpo.backend("triton"), torch.no_grad():
        ours = linear_logprob(hidden, weight, target)
    with flashpo.backend("torch"), torch.no_grad():
        reference = linear_logprob(hidden, weight, target)
    torch.testing.assert_close(ours.logprob, reference.logprob, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, reference.entropy, atol=1e-4, rtol=1e-5)


def test_tokens_do_not_depend_on_their_batch():
    N, H, V = 700, 512, 32_000
    hidden, weight = torch.randn(N, H, dtype=torch.bfloat16), torch.randn(V, H, dtype=torch.bfloat16) * 0.1
    target = torch.randint(0, V, (N,))
    logits = hidden @ weight.t()
    with flashpo.backend("triton"):
        many, linear = selective_log_softmax(logits, target), linear_logprob(hidden, weight, target)
        for part in (slice(0, 1), slice(130, 131), slice(3, 400)):
            assert torch.equal(selective_log_softmax(logits[part], target[part]).logprob, many.logprob[part])
            assert torch.equal(linear_logprob(hidden[part], weight, target[part]).logprob, linear.logprob[part])


def steps(N, H=256, V=8_000):
    """One forward and backward of each op on fresh tensors of N tokens."""
    hidden = torch.randn(N, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    logits = torch.randn(N, V, dtype=torch.bfloat16, requires_grad=True)
    target, ones = indices(N, V), torch.ones(N)
    for out, inputs in (
        (selective_log_softmax(logits, target, temperature=0.5 + N, outputs=ALL), (logits,)),
        (linear_logprob(hidden, weight, target, temperature=0.5 + N, outputs=ALL), (hidden, weight)),
    ):
        torch.autograd.grad([out.logprob, out.entropy], inputs, [ones, ones])


def test_nothing_waits_for_the_gpu():
    with flashpo.backend("triton"):
        steps(100)  # compiles, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(100)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_compilation_after_the_first_length(monkeypatch):
    import triton

    compiled = []
    with flashpo.backend("triton"):
        steps(128)
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_cache_hook", lambda *args, **kwargs: compiled.append(kwargs["repr"])
        )
        for N in (1, 2, 7, 16, 33, 100, 128, 333, 1024, 1111):
            steps(N)
    assert compiled == []
