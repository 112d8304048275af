"""CPO, SimPO, AlphaPO, ORPO and TPO against TRL's losses on the same logits, and cases where these are not finite."""

from types import SimpleNamespace

import mpmath
import pytest
import torch

pytest.importorskip("trl")
from trl import DPOTrainer
from trl_losses import BETA, PAIRS, TOKENS, assert_same, completions, inputs_of, outputs, trainer_of

from flashpo import preference_loss, selective_log_softmax, sequence_logprobs
from flashpo.ops._preference_terms import F_DIVERGENCES, SMOOTHED

VOCAB = 13


@pytest.fixture(autouse=True)
def experimental(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def batch_of_pairs(kinds=("chosen", "rejected"), empty=False):
    """The batch as the collators make it, and per kind the (PAIRS, TOKENS) masks of completion and of real tokens."""
    mask = completions(len(kinds) * PAIRS)
    if not empty:
        mask[0, 1] = True
    whole = torch.nn.functional.pad(mask, (1, 0))
    real = whole.flip(1).cumsum(1).flip(1) > 0  # up to the last token of the completion
    ids = torch.randint(1, VOCAB, whole.shape)
    batch = {}
    for kind, rows in zip(kinds, torch.arange(len(mask)).chunk(len(kinds))):
        batch[f"{kind}_input_ids"] = ids[rows]
        batch[f"{kind}_attention_mask"] = real[rows].long()
        batch[f"{kind}_labels"] = ids[rows].where(whole[rows], -100)
    return batch, ids, whole, real


def sums_of(logits, ids, mask):
    """`sequence_logprobs` of the tokens in a mask of ids."""
    target = ids[:, 1:].where(mask[:, 1:], -100)
    return sequence_logprobs(selective_log_softmax(logits[:, :-1], target).logprob, mask[:, 1:])


CPO = [
    *({"loss_type": loss} for loss in ("sigmoid", "hinge", "ipo", "simpo")),
    {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.5},
    {"loss_type": "simpo", "label_smoothing": 0.1, "cpo_alpha": 0.0, "simpo_gamma": 0.8},
    {"loss_type": "simpo", "alpha": 0.3, "cpo_alpha": 0.0},
    {"loss_type": "simpo", "alpha": -0.4},
    {"loss_type": "sigmoid", "alpha": 0.2},
]


@pytest.mark.parametrize("options", CPO, ids=str)
def test_cpo_and_simpo(options):
    from trl.experimental.cpo import CPOTrainer

    o = dict(label_smoothing=0.0, cpo_alpha=1.0, simpo_gamma=0.5, alpha=0.0) | options
    batch, ids, whole, _ = batch_of_pairs()
    logits = torch.randn(2 * PAIRS, TOKENS + 1, VOCAB, dtype=torch.float64)
    term = {"sigmoid": "cdpo"}.get(o["loss_type"], o["loss_type"])
    divergence = dict(f_divergence="alpha_divergence", f_alpha=1 - o["alpha"]) if o["alpha"] else {}

    def trl(x):
        trainer = trainer_of(CPOTrainer, **o)
        return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=x), batch)[0]

    def ours(x):
        sums, length, _ = sums_of(x, ids, whole)
        return preference_loss(
            *sums.chunk(2),
            loss="cpo" if (term, o["cpo_alpha"]) == ("cdpo", 1) else (term, "sft"),
            loss_weights=None if (term, o["cpo_alpha"]) == ("cdpo", 1) else (1, o["cpo_alpha"]),
            beta=BETA,
            label_smoothing=o["label_smoothing"],
            gamma=o["simpo_gamma"],
            chosen_length=length[:PAIRS],
            rejected_length=length[PAIRS:],
            **divergence,
        ).loss

    assert_same(ours, trl, logits)


def test_orpo():
    """TRL's likelihood term is over prompt and chosen completion."""
    from trl.experimental.orpo import ORPOTrainer

    batch, ids, whole, real = batch_of_pairs()
    logits = torch.randn(2 * PAIRS, TOKENS + 1, VOCAB, dtype=torch.float64)

    def trl(x):
        trainer = trainer_of(ORPOTrainer)
        return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=x), batch)[0]

    def ours(x):
        sums, length, _ = sums_of(x, ids, whole)
        with_prompt = sums_of(x[:PAIRS], ids[:PAIRS], real[:PAIRS])
        return preference_loss(
            *sums.chunk(2),
            loss="orpo",
            beta=BETA,
            chosen_length=length[:PAIRS],
            rejected_length=length[PAIRS:],
            sft=with_prompt.logprob,
            sft_length=with_prompt.length,
        ).loss

    assert_same(ours, trl, logits, fp64=False)  # TRL casts to fp32 within


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "tpo-l"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tpo(loss, smoothing):
    """CPO with the likelihood of a third, gold completion; empty ones among them."""
    from trl.experimental.tpo import TPOTrainer

    _, ids, whole, real = batch_of_pairs(("chosen", "rejected", "reference"), empty=True)
    logits = torch.randn(3 * PAIRS, TOKENS + 1, VOCAB, dtype=torch.float64)
    term = {"sigmoid": "cdpo", "tpo-l": "simpo"}.get(loss, loss)

    def trl(x):
        trainer = trainer_of(TPOTrainer, loss_type=loss, label_smoothing=smoothing, tpo_alpha=0.7, tpo_l_gamma=0.4)
        inputs = dict(input_ids=ids, attention_mask=real.long(), completion_mask=whole.long())
        return trainer._compute_loss(lambda **_: SimpleNamespace(logits=x), inputs, False)

    def ours(x):
        (chosen, rejected, gold), (n_c, n_w, n_g) = (part.chunk(3) for part in sums_of(x, ids, whole)[:2])
        return preference_loss(
            chosen,
            rejected,
            loss=(term, "sft"),
            loss_weights=(1, 0.7),
            beta=BETA,
            label_smoothing=smoothing if term in SMOOTHED else 0.0,
            gamma=0.4 if term == "simpo" else 0.5,
            chosen_length=n_c,
            rejected_length=n_w,
            sft=gold,
            sft_length=n_g,
        ).loss

    assert_same(ours, trl, logits)


# where TRL's own is not finite


def exact(f, *at):
    """f and its derivatives at a point, by 60 digits."""
    mpmath.mp.dps = 60
    at = [mpmath.mpf(x) for x in at]
    one = lambda i: [int(i == j) for j in range(len(at))]  # noqa: E731
    return [float(f(*at))] + [float(mpmath.diff(f, at, one(i))) for i in range(len(at))]


def trl_dpo(chosen, loss, beta, divergence="reverse_kl", tau=0.05):
    """TRL's DPO loss of one-token completions, the rejected and the reference's log-probabilities being 0."""
    zeros = torch.zeros(len(chosen))
    trainer = trainer_of(
        DPOTrainer, precompute_ref_logps=True, loss_types=[loss], loss_weights=[1.0], f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5, ld_alpha=None, use_weighting=False, beta=beta, label_smoothing=0.0,
        args=SimpleNamespace(discopop_tau=tau),
    )  # fmt: skip
    inputs = inputs_of(torch.ones(2 * len(chosen), 1, dtype=torch.bool))
    inputs |= dict(ref_chosen_logps=zeros, ref_rejected_logps=zeros)
    return trainer._compute_loss(lambda **_: outputs(torch.cat([chosen, zeros])[:, None]), inputs, False)


@pytest.mark.parametrize("tau", [0.05, 0.9])  # at 0.9 the value is not 0 long after e^-z has left fp32
def test_discopop_is_finite_where_trls_is_nan(tau):
    log_ratio = [-3000.0, -1000.0, -301.0, -100.0, -34.0, -33.0, -1.0, 0.0, 5.0, 100.0, 3000.0]
    chosen = torch.tensor(log_ratio, requires_grad=True)
    zeros, beta = torch.zeros(len(chosen)), 0.3
    loss = trl_dpo(chosen, "discopop", beta, tau=tau)
    assert loss.isnan()
    assert torch.autograd.grad(loss, chosen)[0].isnan().any()

    def formula(x):
        z = mpmath.mpf(beta) * x
        m = 1 / (1 + mpmath.exp(-z / tau))
        return (1 - m) * mpmath.log1p(mpmath.exp(-z)) + m * mpmath.exp(-z)

    ours = preference_loss(chosen, zeros, zeros, zeros, loss="discopop", beta=beta, discopop_tau=tau).per_pair
    (gradient,) = torch.autograd.grad(ours.sum(), chosen)
    value, slope = zip(*(exact(formula, x) for x in log_ratio))
    torch.testing.assert_close(ours, torch.tensor(value))
    torch.testing.assert_close(gradient, torch.tensor(slope))


def test_orpo_is_right_up_to_probability_1():
    from trl.experimental.orpo import ORPOTrainer

    points = [(0.0, -0.7), (0.0, -30.0), (-1e-30, -2.0), (-1e-7, -1e-3), (-0.5, -1e-6), (-40.0, -0.1), (-120.0, -118.0)]
    c, w = (torch.tensor(x, requires_grad=True) for x in zip(*points))
    trl = trainer_of(ORPOTrainer).odds_ratio_loss(c, w)[0]
    assert torch.autograd.grad(trl.sum(), c)[0].isnan().any()

    ones = torch.ones(len(points), dtype=torch.int64)
    ours = preference_loss(c, w, loss="odds_ratio", chosen_length=ones, rejected_length=ones, beta=1.0).per_pair
    gradients = torch.autograd.grad(ours.sum(), (c, w))

    def formula(c, w):
        odds_c, odds_w = (mpmath.exp(x) / -mpmath.expm1(x) for x in (c, w))
        return mpmath.log1p(odds_w / odds_c)

    # the limit at 0 from just below it
    expected = zip(*(exact(formula, min(x, -1e-40), y) for x, y in points))
    for actual, right in zip((ours, *gradients), expected):
        torch.testing.assert_close(actual, torch.tensor(right))
    certain = preference_loss(
        torch.tensor([-0.5]), torch.zeros(1, requires_grad=True), loss="odds_ratio", chosen_length=ones[:1],
        rejected_length=ones[:1],
    )  # fmt: skip
    assert certain.loss.isfinite()


def test_the_alpha_divergence_is_held_where_trl_holds_it():
    """The exponent, half of these, at 80."""
    for log_ratio in (-100.0, -158.0, -162.0, -400.0):
        chosen = torch.tensor([log_ratio], requires_grad=True)
        zero = torch.zeros(1)
        trl = trl_dpo(chosen, "sigmoid", BETA, "alpha_divergence")
        ours = preference_loss(chosen, zero, zero, zero, beta=BETA, f_divergence="alpha_divergence").loss
        torch.testing.assert_close(ours, trl)
        torch.testing.assert_close(torch.autograd.grad(ours, chosen), torch.autograd.grad(trl, chosen))


def test_divergent_scores_beyond_fp32_stay_finite():
    """A policy that has lost a chosen completion: e^(l_ref - l) overflows, as TRL's forward KL does."""
    lost = torch.tensor([-200.0, -90.0, -3.0], requires_grad=True)
    zeros = torch.zeros(3)
    for divergence in F_DIVERGENCES:
        f_alpha = 0.0 if divergence == "alpha_divergence" else 0.5
        result = preference_loss(lost, zeros, zeros, zeros, f_divergence=divergence, f_alpha=f_alpha)
        assert result.loss.isfinite()
        assert torch.autograd.grad(result.loss, lost)[0].isfinite().all()
