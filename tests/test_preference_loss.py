"""Preference, KTO and direct-advantage losses and `sequence_logprobs`: gradients, layouts, edge cases and errors."""

import pytest
import torch

import flashpo
from flashpo import PREFERENCE_LOSSES, direct_advantage_loss, kto_loss, preference_loss, sequence_logprobs
from flashpo.ops._preference_terms import F_DIVERGENCES, OF_SCORES, SMOOTHED, WITHOUT_REFERENCE

PAIRS = 5
LENGTHS = dict(
    chosen_length=torch.tensor([3, 1, 7, 2, 5]),
    rejected_length=torch.tensor([1, 4, 2, 6, 9]),
)


def sums(count: int, dtype=torch.float64, pairs: int = PAIRS) -> list[torch.Tensor]:
    return [(torch.randn(pairs, dtype=dtype) - 4).requires_grad_() for _ in range(count)]


def arguments(name: str, reference: bool = True) -> tuple[list[torch.Tensor], dict]:
    smoothing = {"label_smoothing": 0.1} if name in SMOOTHED else {}
    return sums(2 if name in WITHOUT_REFERENCE or not reference else 4), dict(loss=name, **LENGTHS, **smoothing)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "free"])
def test_gradcheck(name, reference):
    tensors, options = arguments(name, reference)
    weight = torch.rand(PAIRS, dtype=torch.float64)

    def values(*x):
        return (weight * preference_loss(*x, beta=0.7, **options).per_pair).sum()

    assert torch.autograd.gradcheck(values, tensors)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", sorted(OF_SCORES))
def test_gradcheck_of_divergences(name, divergence):
    tensors, options = arguments(name)
    alpha = {"f_alpha": -0.3} if divergence == "alpha_divergence" else {}
    options |= dict(f_divergence=divergence, beta=0.7, **alpha)
    assert torch.autograd.gradcheck(lambda *x: preference_loss(*x, **options).loss, tensors)


def test_limits_of_the_alpha_divergence():
    tensors = sums(4)
    for alpha, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        by_alpha = preference_loss(*tensors, f_divergence="alpha_divergence", f_alpha=alpha)
        torch.testing.assert_close(by_alpha.loss, preference_loss(*tensors, f_divergence=name).loss)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_torch_compile(name):
    torch.compiler.reset()
    tensors, options = arguments(name)

    def f(*x):
        return preference_loss(*x, **options).loss

    eager, compiled = f(*tensors), torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(loss, tensors, materialize_grads=True) for loss in (compiled, eager))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_fp32(dtype):
    low = sums(4, dtype)
    result = preference_loss(*low)
    assert result.loss.dtype == result.chosen_rewards.dtype == torch.float32
    assert result.loss == preference_loss(*(x.float() for x in low)).loss
    assert torch.autograd.grad(result.loss, low[0])[0].dtype == dtype


def test_conservative_dpo_is_smoothed_and_dpo_is_not():
    tensors = sums(4)
    z = 0.1 * (tensors[0] - tensors[2] - tensors[1] + tensors[3])
    conservative = 0.8 * (1 + (-z).exp()).log() + 0.2 * (1 + z.exp()).log()
    torch.testing.assert_close(preference_loss(*tensors, loss="cdpo", label_smoothing=0.2).per_pair, conservative)
    plain, unsmoothed = (preference_loss(*tensors, loss=name).loss for name in ("sigmoid", "cdpo"))
    assert plain == unsmoothed
    with pytest.raises(ValueError, match="label_smoothing is read by"):
        preference_loss(*tensors, label_smoothing=0.2)


def test_rewards_are_of_what_the_loss_compares():
    chosen, rejected, ref_chosen, ref_rejected = sums(4)
    result = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    torch.testing.assert_close(result.chosen_rewards, 0.5 * (chosen - ref_chosen).detach())
    torch.testing.assert_close(result.rejected_rewards, 0.5 * (rejected - ref_rejected).detach())
    result = preference_loss(chosen, rejected, loss=("simpo", "sft"), beta=0.5, **LENGTHS)
    torch.testing.assert_close(result.chosen_rewards, 0.5 * (chosen / LENGTHS["chosen_length"]).detach())
    result = preference_loss(chosen, rejected, loss="cpo", beta=0.5, **LENGTHS)
    torch.testing.assert_close(result.rejected_rewards, 0.5 * rejected.detach())
    assert not result.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_empty_batch_and_empty_completions(name):
    _, options = arguments(name)
    none = [x.new_empty(0).requires_grad_() for x in arguments(name)[0]]
    options |= dict(chosen_length=torch.zeros(0), rejected_length=torch.zeros(0))
    loss = preference_loss(*none, **options).loss
    assert loss == 0
    loss.backward()

    zeros = [x.new_zeros(PAIRS).requires_grad_() for x in arguments(name)[0]]
    options |= dict(chosen_length=torch.zeros(PAIRS), rejected_length=torch.zeros(PAIRS))
    loss = preference_loss(*zeros, **options).loss
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in zeros)


# sequence_logprobs


def ragged(sequences: int = 6, longest: int = 9):
    """Rows (S, T) with masks, and the same tokens one after the other."""
    lengths = torch.randint(1, longest + 1, (sequences,))
    lengths[0], lengths[-1] = longest, 0
    real = torch.arange(longest) < lengths[:, None]
    mask = real & (torch.rand(sequences, longest) > 0.4)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logprob, sq = -torch.rand(2, sequences, longest, dtype=torch.float64)
    return logprob, mask, sq, real, cu_seqlens


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_and_flat_agree(ld_alpha, weighted):
    logprob, mask, sq, real, cu_seqlens = ragged()
    logprob[~mask] = torch.nan  # what is masked out may hold anything
    x = logprob.clone().requires_grad_()
    rows = sequence_logprobs(x, mask, ld_alpha=ld_alpha, log_sum_sq_probs=sq if weighted else None)
    for dtype in (torch.int32, torch.int64):
        side = sq[real] if weighted else None
        flat = sequence_logprobs(
            x[real], mask[real].int(), cu_seqlens=cu_seqlens.to(dtype), ld_alpha=ld_alpha, log_sum_sq_probs=side
        )
        torch.testing.assert_close(flat, rows)
    upstream = torch.randn(len(mask), dtype=torch.float64)
    by_rows, by_flat = (torch.autograd.grad(s.logprob, x, upstream)[0] for s in (rows, flat))
    torch.testing.assert_close(by_rows, by_flat)
    assert (by_rows[~mask] == 0).all()
    assert rows.length.tolist() == mask.sum(1).tolist()
    assert (rows.weight is not None) == weighted


def test_tokens_beyond_the_shorter_completion_are_discounted():
    logprob = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]])
    result = sequence_logprobs(logprob, mask, ld_alpha=0.5)
    assert result.logprob.tolist() == [2 + 4 + 0.5 * 8, 16 + 64]
    assert result.length.tolist() == [3, 2]


def test_sums_of_long_flat_sequences_keep_their_digits():
    logprob = -torch.rand(100_000)
    cu_seqlens = torch.tensor([0, 99_990, 100_000])
    result = sequence_logprobs(logprob, torch.ones_like(logprob), cu_seqlens=cu_seqlens).logprob
    exact = torch.stack([part.double().sum() for part in logprob.split([99_990, 10])]).float()
    assert torch.equal(result, exact)


@pytest.mark.parametrize("flat", [False, True])
def test_sequence_logprobs_compiles(flat):
    logprob, mask, sq, real, cu_seqlens = ragged()
    options = dict(ld_alpha=0.5)
    if flat:
        logprob, mask, sq, options["cu_seqlens"] = logprob[real], mask[real], sq[real], cu_seqlens
    torch.compiler.reset()
    compiled = torch.compile(sequence_logprobs, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = sequence_logprobs(logprob, mask, log_sum_sq_probs=sq, **options)
    torch.testing.assert_close(compiled(logprob, mask, log_sum_sq_probs=sq, **options), expected)


def test_from_hidden_states_to_the_loss_in_two_calls():
    hidden, weight = torch.randn(2 * PAIRS, 7, 8), torch.randn(33, 8, requires_grad=True)
    target = torch.randint(33, (2 * PAIRS, 7))
    stats = flashpo.linear_logprob(hidden, weight, target, outputs=("log_sum_sq_probs",))
    policy = sequence_logprobs(stats.logprob, target > 4, log_sum_sq_probs=stats.log_sum_sq_probs)
    result = preference_loss(*policy.logprob.chunk(2), pair_weight=policy.weight.view(2, -1).prod(0))
    result.loss.backward()
    logp = (hidden @ weight.detach().T).log_softmax(-1)
    aligned = (logp.gather(-1, target[..., None])[..., 0] - (2 * logp).logsumexp(-1)) * (target > 4)
    expected = (aligned.sum(1) / (target > 4).sum(1)).exp()
    torch.testing.assert_close(policy.weight, expected)
    assert weight.grad.abs().max() > 0


def test_no_tokens_and_no_sequences():
    nothing = sequence_logprobs(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0]), ld_alpha=0.1)
    assert nothing.logprob.tolist() == nothing.length.tolist() == [0, 0]
    assert sequence_logprobs(torch.zeros(0, 4), torch.zeros(0, 4), ld_alpha=0.1).logprob.shape == (0,)
    assert sequence_logprobs(torch.zeros(0), torch.zeros(0), cu_seqlens=torch.tensor([0])).logprob.shape == (0,)


# KTO and direct advantage


def test_kto_gradcheck_and_edges():
    logprob, ref = sums(2)
    desirable = torch.tensor([True, False, True, True, False])
    kl = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = lambda x, r: kto_loss(x, r, desirable, kl=kl, beta=0.7, desirable_weight=1.5).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logprob, ref))
    loss(logprob, ref).backward()
    assert kl.grad is None
    empty = torch.zeros(0, requires_grad=True)
    assert kto_loss(empty, empty, torch.zeros(0, dtype=torch.bool), kl=kl).loss == 0
    result = kto_loss(logprob, ref, desirable, loss="apo_zero_unpaired", beta=0.5)
    torch.testing.assert_close(result.rewards, 0.5 * (logprob - ref).detach())


def test_direct_advantage():
    """The loss is 0, and stays there, where the log-ratio is the advantage over beta; its gradient is the residual."""
    logprob, ref, advantage = sums(3)
    assert torch.autograd.gradcheck(lambda *x: direct_advantage_loss(*x, beta=0.2), (logprob, ref, advantage))
    best = (ref + advantage / 0.2).detach().requires_grad_()
    assert direct_advantage_loss(best, ref, advantage, beta=0.2).item() == pytest.approx(0, abs=1e-25)
    (gradient,) = torch.autograd.grad(direct_advantage_loss(logprob, ref, advantage, beta=0.2), logprob)
    torch.testing.assert_close(gradient, (logprob - ref - advantage / 0.2) / PAIRS)
    assert direct_advantage_loss(*(x.new_empty(0) for x in (logprob, ref, advantage)), beta=0.2) == 0


def test_steps_are_the_segments_of_sequences():
    """Per-token log-probabilities of two completions of two and of one step, in two calls."""
    token, ref = -torch.rand(2, 10)
    steps = torch.tensor([0, 3, 6, 10])
    policy, reference = (sequence_logprobs(x, torch.ones(10), cu_seqlens=steps).logprob for x in (token, ref))
    advantage = torch.tensor([0.1, -0.2, 0.3])
    by_hand = [(a / 0.5 - (token - ref)[i:j].sum()) ** 2 / 2 for a, i, j in zip(advantage, steps, steps[1:])]
    torch.testing.assert_close(direct_advantage_loss(policy, reference, advantage, beta=0.5), sum(by_hand) / 3)


# errors name the argument

X = torch.zeros(3)
N = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("chosen must be a torch.Tensor", ([0.0], X), {}),
        ("chosen must be float32", (N, X), {}),
        (r"chosen must have shape \(B,\)", (X[None], X[None]), {}),
        ("rejected must have the shape of chosen", (X, X[:2]), {}),
        ("ref_rejected must have the shape", (X, X, X, X[:1]), {}),
        ("ref_chosen and ref_rejected", (X, X, X), {}),
        ("pair_weight must have the shape", (X, X), {"pair_weight": X[:2]}),
        ("pair_weight: aot sorts", (X, X), {"pair_weight": X, "loss": "aot"}),
        ("loss must be one of .*, got 'dpo'", (X, X), {"loss": "dpo"}),
        ("see also kto_loss", (X, X), {"loss": "kto"}),
        ("loss must name at least one loss", (X, X), {"loss": ()}),
        ("loss_weights has 1", (X, X), {"loss": ("sigmoid", "hinge"), "loss_weights": (1,)}),
        ("loss_weights must be finite", (X, X), {"loss_weights": (float("nan"),)}),
        ("beta must be positive", (X, X), {"beta": 0.0}),
        (r"label_smoothing must be in \[0, 0.5\)", (X, X), {"loss": "robust", "label_smoothing": 0.5}),
        ("label_smoothing must be positive for exo_pair", (X, X), {"loss": "exo_pair"}),
        ("label_smoothing is read by", (X, X), {"label_smoothing": 0.1}),
        ("f_divergence must be one of .*, got 'kl'", (X, X), {"f_divergence": "kl"}),
        ("f_divergence 'forward_kl' is for", (X, X), {"f_divergence": "forward_kl", "loss": ("sigmoid", "apo_zero")}),
        ("f_divergence is read by", (X, X), {"f_divergence": "forward_kl", "loss": "sft", "chosen_length": N}),
        ("f_alpha is for", (X, X), {"f_alpha": 0.2}),
        ("gamma is read by", (X, X), {"gamma": 1.0}),
        ("discopop_tau is read by", (X, X), {"discopop_tau": 0.1}),
        ("ipo needs chosen_length", (X, X), {"loss": "ipo", "rejected_length": N}),
        ("simpo needs rejected_length", (X, X), {"loss": "simpo", "chosen_length": N}),
        ("sft needs chosen_length, or sft", (X, X), {"loss": ("sigmoid", "sft")}),
        ("sft and sft_length", (X, X), {"loss": "sft", "sft": X}),
        ("sft is read by", (X, X), {"sft": X, "sft_length": N}),
        ("simpo has no reference", (X, X, X, X), {"loss": "simpo"}),
        ("chosen_length must be a torch.Tensor", (X, X), {"loss": "ipo", "chosen_length": 3}),
    ],
)
def test_preference_errors(message, arguments, options):
    with pytest.raises((ValueError, TypeError), match=message):
        preference_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("mask must have the shape of logprob", (torch.zeros(2, 3), torch.zeros(2, 4)), {}),
        ("mask must hold 0 and 1", (torch.zeros(1, 2), torch.tensor([[0, 2]])), {}),
        (r"logprob must be \(S, T\)", (X, X), {}),
        (r"logprob must be \(N,\)", (torch.zeros(1, 3), torch.zeros(1, 3)), {"cu_seqlens": torch.tensor([0, 3])}),
        ("cu_seqlens must be int32 or int64", (X, X), {"cu_seqlens": torch.tensor([0.0, 3.0])}),
        ("cu_seqlens must ascend", (X, X), {"cu_seqlens": torch.tensor([0, 2])}),
        ("cu_seqlens must ascend", (X, X), {"cu_seqlens": torch.tensor([0, 2, 1, 3])}),
        (r"cu_seqlens must have shape", (X, X), {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}),
        ("log_sum_sq_probs must have the shape", (X[None], X[None]), {"log_sum_sq_probs": X}),
        (r"ld_alpha must be in \[0, 1\]", (torch.zeros(2, 3), torch.zeros(2, 3)), {"ld_alpha": 1.5}),
        ("ld_alpha needs pairs", (X[None], X[None]), {"ld_alpha": 0.5}),
    ],
)
def test_sequence_errors(message, arguments, options):
    with pytest.raises((ValueError, TypeError), match=message):
        sequence_logprobs(*arguments, **options)


B = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("kl is needed by kto", (X, X, B), {}),
        ("kl is not read by apo_zero_unpaired", (X, X, B), {"kl": X, "loss": "apo_zero_unpaired"}),
        ("kl is empty", (X, X, B), {"kl": X[:0]}),
        ("loss must be one of .*, got 'bco'", (X, X, B), {"kl": X, "loss": "bco"}),
        ("desirable must be bool", (X, X, N), {"kl": X}),
        ("ref_logprob must have the shape", (X, X[:1], B), {"kl": X}),
        ("undesirable_weight must be positive", (X, X, B), {"kl": X, "undesirable_weight": 0}),
    ],
)
def test_kto_errors(message, arguments, options):
    with pytest.raises((ValueError, TypeError), match=message):
        kto_loss(*arguments, **options)


def test_direct_advantage_errors():
    with pytest.raises(ValueError, match="advantage must have the shape of logprob"):
        direct_advantage_loss(X, X, X[:2], beta=1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        direct_advantage_loss(X, X, X, beta=-1.0)
