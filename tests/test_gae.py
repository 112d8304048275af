"""gae against a plain Python loop in float64 (layouts, masks, whitening), and against the formulas of peers."""

import pytest
import torch
from accuracy import assert_as_accurate
from inputs import backends, sanitized

import flashpo
from flashpo import gae

every_backend = pytest.mark.parametrize("backend", backends())
NAN = float("nan")


def loop(rewards, values, mask, gamma, lam):
    """One sequence, token by token, in Python floats: advantages and returns, zeros where masked."""
    rows = []
    value = advantage = 0.0
    for r, v, live in reversed(list(zip(rewards.tolist(), values.tolist(), mask.tolist()))):
        if live:
            advantage = r + gamma * value - v + gamma * lam * advantage
            value = v
        rows.append((advantage, advantage + value) if live else (0.0, 0.0))
    return torch.tensor(rows[::-1], dtype=torch.float64).unbind(1)


def whitened(advantages, mask):
    """verl's masked_whiten: population of live tokens, ddof 1."""
    live = advantages[mask]
    if len(live) < 2:
        return torch.zeros_like(advantages)
    return ((advantages - live.mean()) * (live.var() + 1e-8).rsqrt()).masked_fill(~mask, 0.0)


def exact(rewards, values, mask, gamma, lam, whiten=False):
    rows = [loop(*row, gamma, lam) for row in zip(rewards, values, mask)]
    if not rows:
        return rewards.double(), rewards.double()
    advantages, returns = (torch.stack(x) for x in zip(*rows))
    return whitened(advantages, mask) if whiten else advantages, returns


def in_torch(rewards, values, mask, gamma, lam, whiten=False):
    """The same in torch, vectorised over the batch, in the dtype of its inputs: the yardstick."""
    rewards, values = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    value = advantage = torch.zeros(len(values), dtype=values.dtype)
    for t in reversed(range(values.shape[1])):
        here = rewards[:, t] + gamma * value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(mask[:, t], here, advantage)
        value = torch.where(mask[:, t], values[:, t], value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    returns = (advantages + values).masked_fill(~mask, 0.0)
    return whitened(advantages, mask) if whiten else advantages, returns


def masks(B, T):
    at = torch.arange(T)
    length = torch.randint(1, T + 1, (B, 1))
    return {
        "live": torch.ones(B, T, dtype=torch.bool),
        "padded right": at < length,
        "padded left": at >= T - length,
        "observations": (at < length) & ~((at // 5 + torch.arange(B)[:, None]) % 3 == 1),
        "scattered": torch.rand(B, T) < 0.4,
        "one token": at == torch.randint(T, (B, 1)),
        "masked": torch.zeros(B, T, dtype=torch.bool),
        "half of the sequences": (torch.arange(B)[:, None] % 2 == 0).expand(B, T),
    }


# T: one, less than any vector, whole vectors, some more, many
SHAPES = [(3, 1), (2, 3), (4, 64), (5, 77), (3, 700)]


@sanitized
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whiten", [False, True], ids=["", "whiten"])
@pytest.mark.usefixtures("poisoned")
def test_against_the_loop(backend, shape, whiten):
    for gamma, lam in ((1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9), (0.0, 0.0)):
        for name, mask in masks(*shape).items():
            rewards, values = torch.randn(2, *shape) * torch.tensor([0.1, 3.0])[:, None, None]
            rewards, values = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, torch.inf)  # never looked at
            flashpo.stats(reset=True)
            with flashpo.backend(backend):
                ours = gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=whiten)
            assert {used for counts in flashpo.stats().values() for used in counts} == {backend}
            true = exact(rewards, values, mask, gamma, lam, whiten)
            baseline = in_torch(rewards.where(mask, 0.0), values.where(mask, 0.0), mask, gamma, lam, whiten)
            for out, e, plain in zip(ours, true, baseline):
                assert out.dtype == torch.float32, name
                assert (out[~mask] == 0).all(), name
                assert_as_accurate(out, e, plain)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs(backend, dtype):
    """Computed in fp32: exactly as from the same numbers in fp32. One of both may be wider."""
    rewards, values = torch.randn(2, 3, 40).to(dtype)
    mask = torch.rand(3, 40) < 0.7
    with flashpo.backend(backend):
        expected = gae(rewards.float(), values.float(), mask)
        for inputs in ((rewards, values), (rewards.float(), values), (rewards, values.float())):
            assert all(torch.equal(x, y) for x, y in zip(gae(*inputs, mask), expected))


def test_float64_stays_float64():
    rewards, values = torch.randn(2, 3, 40, dtype=torch.float64)
    mask = torch.rand(3, 40) < 0.7
    for out, true in zip(gae(rewards, values, mask, whiten=True), exact(rewards, values, mask, 1.0, 0.95, True)):
        torch.testing.assert_close(out, true, rtol=1e-12, atol=1e-12)


@sanitized
@pytest.mark.usefixtures("poisoned")
def test_layouts(backend):
    """Slices, transposes and expanded rows give what their contiguous copies give, and no input is written to."""
    wide = torch.randn(6, 50, 3)
    mask = torch.rand(6, 50) < 0.7
    for rewards, values, live in (
        (wide[:, :, 0], wide[:, :, 1], mask),
        (wide[1:4, 3:40, 0], wide[::2, 3:40, 1], mask[1:4, 3:40]),
        (torch.randn(50, 6).t(), torch.randn(6, 51)[:, 1:], torch.rand(50, 6).t() < 0.7),
        (torch.randn(1, 50).expand(6, 50), torch.randn(6, 1).expand(6, 50), mask),
    ):
        before = [x.clone() for x in (rewards, values, live)]
        with flashpo.backend(backend):
            for whiten in (False, True):
                ours = gae(rewards, values, live, whiten=whiten)
                expected = gae(*(x.contiguous() for x in (rewards, values, live)), whiten=whiten)
                assert all(torch.equal(x, y) for x, y in zip(ours, expected))
                assert all(x.is_contiguous() for x in ours)
        assert all(torch.equal(x, y) for x, y in zip(before, (rewards, values, live)))


@sanitized
@pytest.mark.usefixtures("poisoned")
def test_flat_is_padded(backend):
    """Bitwise but for whitening's sums over all: a sequence does not know its batch, nor how far it is padded."""
    lengths = [0, 17, 1, 0, 300, 64, 2]
    B, T = len(lengths), 333
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]) & (torch.rand(B, T) < 0.8)
    keep = torch.arange(T) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, B, T)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with flashpo.backend(backend):
        padded = gae(rewards, values, mask, gamma=0.99)
        flat = gae(rewards[keep], values[keep], mask[keep], gamma=0.99, cu_seqlens=cu_seqlens)
        for x, y in zip(padded, flat):
            if backend == "native":
                assert torch.equal(x[keep], y)
            torch.testing.assert_close(x[keep], y, rtol=1e-5, atol=1e-5)
        white = gae(rewards, values, mask, gamma=0.99, whiten=True)[0][keep]
        flat_white = gae(rewards[keep], values[keep], mask[keep], gamma=0.99, whiten=True, cu_seqlens=cu_seqlens)[0]
        torch.testing.assert_close(white, flat_white, rtol=1e-5, atol=1e-6)


@every_backend
def test_nothing_crosses_a_sequence(backend):
    """A sequence that diverged, infinities and NaN included, leaves its flat neighbours alone."""
    rewards, values, mask = torch.randn(60), torch.randn(60), torch.ones(60, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 20, 40, 60])
    with flashpo.backend(backend):
        expected = gae(rewards, values, mask, cu_seqlens=cu_seqlens)
        rewards[25:30], values[30:35] = NAN, torch.inf
        got = gae(rewards, values, mask, cu_seqlens=cu_seqlens)
    for x, y in zip(got, expected):
        assert torch.equal(x[:20], y[:20])
        assert torch.equal(x[40:], y[40:])
        assert not x[20:36].isfinite().all()


@sanitized
@pytest.mark.parametrize("whiten", [False, True], ids=["", "whiten"])
def test_empty(backend, whiten):
    with flashpo.backend(backend):
        for shape in ((0, 5), (3, 0), (0, 0)):
            out = gae(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), whiten=whiten)
            assert [x.shape for x in out] == [shape, shape]
        for cu_seqlens in ([0], [0, 0, 0]):
            none = torch.zeros(0)
            out = gae(none, none, none.bool(), whiten=whiten, cu_seqlens=torch.tensor(cu_seqlens))
            assert [x.shape for x in out] == [(0,), (0,)]


@every_backend
def test_whitening_is_exact_where_it_can_be(backend):
    """Equal advantages become exactly 0 however large they are; a far mean costs no digits of the deviations."""
    mask = torch.rand(7, 40) < 0.8
    with flashpo.backend(backend):
        equal = gae(torch.full((7, 40), 1e6 / 3), torch.zeros(7, 40), mask, gamma=0.0, whiten=True)[0]
        assert (equal == 0).all()
        far = torch.randint(-8, 9, (7, 40)) + 2.0**22  # exact in fp32
        ours = gae(far, torch.zeros(7, 40), mask, gamma=0.0, whiten=True)[0]
    torch.testing.assert_close(ours.double(), whitened(far.double(), mask), rtol=1e-6, atol=1e-6)


def test_threads_do_not_change_the_result():
    rewards, values, mask = torch.randn(9, 9000), torch.randn(9, 9000), torch.rand(9, 9000) < 0.9
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(gae(rewards, values, mask, whiten=True))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other))


@every_backend
def test_integer_masks(backend):
    rewards, values, mask = torch.randn(3, 20), torch.randn(3, 20), torch.rand(3, 20) < 0.7
    with flashpo.backend(backend):
        expected = gae(rewards, values, mask)
        for dtype in (torch.int64, torch.int32, torch.uint8):
            assert all(torch.equal(x, y) for x, y in zip(gae(rewards, values, mask.to(dtype)), expected))


def test_results_are_constants():
    rewards, values = torch.randn(2, 3, 20)
    out = gae(rewards.requires_grad_(), values.requires_grad_(), torch.ones(3, 20, dtype=torch.bool), whiten=True)
    assert not any(x.requires_grad for x in out)


@every_backend
@pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
def test_compiles_into_one_graph(backend, flat, graphs, counting):
    def f(rewards, values, mask, cu_seqlens):
        return gae(rewards * 2, values, mask, gamma=0.9, whiten=True, cu_seqlens=cu_seqlens)

    compiled = torch.compile(f, backend=counting, fullgraph=True, dynamic=True)
    with flashpo.backend(backend):
        for T in (12, 20, 33):
            shape = (T,) if flat else (4, T)
            inputs = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.7
            cu_seqlens = torch.tensor([0, 5, T]) if flat else None
            expected = f(*inputs, cu_seqlens)
            assert all(torch.equal(x, y) for x, y in zip(compiled(*inputs, cu_seqlens), expected))
    assert len(graphs) == 1


def openrlhf(values, rewards, action_mask, gamma, lam):
    """`get_advantages_and_returns` with whitening over all tokens, as written: no obs-skipping, population variance."""
    values, rewards = values * action_mask, rewards * action_mask
    last, columns = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages * action_mask, (advantages + values) * action_mask


def old_trl(values, rewards, padding_mask, gamma, lam):
    """TRL 0.x PPOTrainer: values and rewards zeroed where padded, the loop, masked_whiten (ddof 1), then zeros."""
    values, rewards = values.masked_fill(padding_mask, 0), rewards.masked_fill(padding_mask, 0)
    last, columns = 0, []
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t < values.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        columns.append(last)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = advantages + values
    live = advantages[~padding_mask]
    white = (advantages - live.mean()) * torch.rsqrt(live.var() + 1e-8)
    return white.masked_fill(padding_mask, 0), returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.98, 1.0), (0.9, 0.7)])
def test_peers_where_they_agree(gamma, lam):
    """Padding on the right: no token is stepped over."""
    rewards, values = torch.randn(2, 6, 30, dtype=torch.float64)
    mask = torch.arange(30) < torch.tensor([[30], [1], [12], [29], [7], [20]])
    close = dict(rtol=1e-11, atol=1e-11)
    ours = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for x, y in zip(ours, openrlhf(values, rewards, mask.double(), gamma, lam)):
        torch.testing.assert_close(x, y, **close)
    white, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, whiten=True)
    theirs, their_returns = old_trl(values, rewards, ~mask, gamma, lam)
    torch.testing.assert_close(white, theirs, **close)
    torch.testing.assert_close(returns, their_returns.where(mask, 0.0), **close)


good = dict(rewards=torch.randn(2, 5), values=torch.randn(2, 5), mask=torch.ones(2, 5, dtype=torch.bool))
flat = dict(rewards=torch.randn(5), values=torch.randn(5), mask=torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("rewards must be a torch.Tensor, got list", {"rewards": [1.0]}),
        ("rewards must be float32", {"rewards": torch.ones(2, 5).long()}),
        ("values must be float32", {"values": torch.ones(2, 5).bool()}),
        (r"rewards must be \(B, T\)", {"rewards": torch.ones(5)}),
        (r"values must have rewards' shape \(2, 5\), got \(2, 6\)", {"values": torch.ones(2, 6)}),
        ("values is on meta", {"values": torch.ones(2, 5, device="meta")}),
        (r"mask must have the shape of rewards, \(2, 5\), got \(5,\)", {"mask": torch.ones(5).bool()}),
        ("mask must be bool or integers", {"mask": torch.ones(2, 5)}),
        ("mask holds values that are neither 0 nor 1", {"mask": torch.full((2, 5), 2)}),
        ("mask must be a torch.Tensor", {"mask": None}),
        (r"gamma must be in \[0, 1\], got 1.1", {"gamma": 1.1}),
        (r"gamma must be in \[0, 1\], got nan", {"gamma": NAN}),
        ("gamma must be a number, got str", {"gamma": "1"}),
        (r"lam must be in \[0, 1\], got -0.1", {"lam": -0.1}),
        ("group must be None with whiten=False", {"group": object()}),
        (r"rewards must be \(B, T\), or \(N,\) with cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
        ("cu_seqlens must be int64", flat | {"cu_seqlens": torch.tensor([0, 5]).int()}),
        ("cu_seqlens must be a torch.Tensor", flat | {"cu_seqlens": [0, 5]}),
        (r"cu_seqlens must be \(S \+ 1,\)", flat | {"cu_seqlens": torch.tensor([[0, 5]])}),
        (r"cu_seqlens must be \(S \+ 1,\)", flat | {"cu_seqlens": torch.tensor([], dtype=torch.int64)}),
        ("cu_seqlens must rise from 0 to the number of tokens", flat | {"cu_seqlens": torch.tensor([0, 4])}),
        ("cu_seqlens must rise from 0 to the number of tokens", flat | {"cu_seqlens": torch.tensor([1, 5])}),
        ("cu_seqlens must rise from 0 to the number of tokens", flat | {"cu_seqlens": torch.tensor([0, 4, 3, 5])}),
    ],
)
def test_bad_input(message, change):
    with pytest.raises((TypeError, ValueError), match=message):
        gae(**(good | change))
