"""DPO with all of its loss types, and KTO, against TRL's own losses on the same per-token log-probabilities."""

import itertools

import pytest
import torch

pytest.importorskip("trl")
from trl import DPOTrainer, KTOTrainer
from trl_losses import BETA, PAIRS, TOKENS, assert_same, completions, inputs_of, outputs, trainer_of

from flashpo import PREFERENCE_LOSSES, kto_loss, preference_loss, sequence_logprobs
from flashpo.ops._preference_terms import F_DIVERGENCES, OF_RANKS, OF_SCORES, SMOOTHED


def check_dpo(
    losses, *, weights=None, divergence="reverse_kl", smoothing=0.0, reference=True, ld_alpha=None, wpo=False
):
    mask = completions(2 * PAIRS)
    # without a reference the log-probabilities are the ratios: small ones, or TRL's f-divergences overflow
    logprob = -torch.rand(2 * PAIRS, TOKENS, dtype=torch.float64) * (3 if reference else 0.3)
    ref = logprob + 0.5 * torch.randn_like(logprob) if reference else torch.zeros_like(logprob)
    sq = -torch.rand_like(logprob)
    read_by = SMOOTHED & set(losses)  # by the others TRL ignores it

    def trl(x):
        trainer = trainer_of(
            DPOTrainer,
            ref_model=lambda **_: outputs(ref.to(x.dtype) * mask),
            loss_types=losses,
            loss_weights=weights or [1.0] * len(losses),
            label_smoothing=smoothing,
            f_divergence_type=divergence,
            f_alpha_divergence_coef=0.6,
            ld_alpha=ld_alpha,
            use_weighting=wpo,
        )
        model = lambda **_: outputs(x * mask, sq.to(x.dtype))  # noqa: E731
        return trainer._compute_loss(model, inputs_of(mask), False)

    def ours(x):
        policy = sequence_logprobs(x, mask, ld_alpha=ld_alpha, log_sum_sq_probs=sq.to(x.dtype) if wpo else None)
        refs = sequence_logprobs(ref.to(x.dtype), mask, ld_alpha=ld_alpha).logprob.chunk(2) if reference else ()
        chosen_length, rejected_length = policy.length.chunk(2)
        sft = dict(sft=sequence_logprobs(x, mask).logprob[:PAIRS], sft_length=chosen_length) if "sft" in losses else {}
        return preference_loss(
            *policy.logprob.chunk(2),
            *refs,
            loss=losses,
            loss_weights=weights,
            beta=BETA,
            label_smoothing=smoothing if read_by else 0.0,
            f_divergence=divergence,
            f_alpha=0.6 if divergence == "alpha_divergence" else 0.5,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            pair_weight=policy.weight.view(2, -1).prod(0) if wpo else None,
            **sft,
        ).loss

    assert_same(ours, trl, logprob, fp64=divergence != "alpha_divergence")  # which TRL has in fp32 only


DPO = sorted(set(PREFERENCE_LOSSES) - {"cdpo", "simpo", "odds_ratio", "cpo", "orpo"})
MATRIX = [
    (loss, divergence, smoothing, reference)
    for loss, divergence, smoothing, reference in itertools.product(DPO, F_DIVERGENCES, (0.0, 0.1), (True, False))
    if (divergence == "reverse_kl" or loss in OF_SCORES) and (loss, smoothing) != ("exo_pair", 0.0)
]


@pytest.mark.parametrize(("loss", "divergence", "smoothing", "reference"), MATRIX)
def test_dpo(loss, divergence, smoothing, reference):
    check_dpo([loss], divergence=divergence, smoothing=smoothing, reference=reference)


def test_every_loss_of_trl_is_there():
    """TRL's message for an unknown name lists those it knows; this one is none."""
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        check_trl_name("no such loss")
    listed = str(error.value).split("[")[1].strip("]").replace("'", "").split(", ")
    assert set(listed) == set(DPO)


def check_trl_name(name):
    mask = completions(2)
    trainer = trainer_of(
        DPOTrainer, ref_model=lambda **_: outputs(mask * -1.0), loss_types=[name], loss_weights=[1.0],
        f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False,
    )  # fmt: skip
    trainer._compute_loss(lambda **_: outputs(mask * -1.0), inputs_of(mask), False)


UNWEIGHED = OF_RANKS | {"hinge", "sft"}  # TRL refuses to weigh ranks, and fails with the others: `*=` under autograd


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (loss, options)
        for loss in sorted(set(DPO) - {"exo_pair"})
        for options in ({"ld_alpha": 0.0}, {"ld_alpha": 0.4}, {"wpo": True}, {"ld_alpha": 0.7, "wpo": True})
        if not ("wpo" in options and loss in UNWEIGHED)
    ],
    ids=str,
)
def test_dpo_length_desensitised_and_weighted(loss, options):
    check_dpo([loss], **options)


def test_dpo_several_losses():
    check_dpo(["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0])
    check_dpo(["sigmoid", "robust", "aot"], smoothing=0.2)
    check_dpo(["hinge", "sft"], weights=[1.0, -0.5], divergence="js_divergence", reference=False)


def test_dpo_rewards():
    mask = completions(2 * PAIRS)
    logprob, ref = torch.randn(2, 2 * PAIRS, TOKENS)
    trainer = trainer_of(
        DPOTrainer, ref_model=lambda **_: outputs(ref * mask), loss_types=["sigmoid"], loss_weights=[1.0],
        f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False,
    )  # fmt: skip
    trainer._compute_loss(lambda **_: outputs(logprob * mask), inputs_of(mask), False)
    metrics = trainer._metrics["train"]
    sums = (sequence_logprobs(x, mask).logprob.chunk(2) for x in (logprob, ref))
    result = preference_loss(*itertools.chain(*sums), beta=BETA)
    assert result.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0], rel=1e-5)
    assert result.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"][0], rel=1e-5)
    accuracy = (result.chosen_rewards > result.rejected_rewards).float().mean().item()
    assert accuracy == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", ["mixed", "desirable", "undesirable"])
@pytest.mark.parametrize("kl_sign", [1, -1], ids=["kl", "kl clamped"])
def test_kto(loss, labels, kl_sign):
    mask, kl_mask = completions(PAIRS), completions(PAIRS)
    logprob, ref, kl_logprob = -torch.rand(3, PAIRS, TOKENS, dtype=torch.float64) * 3
    kl_ref = kl_logprob - kl_sign * torch.rand_like(kl_logprob)
    desirable = {"mixed": torch.arange(PAIRS) % 3 == 0}.get(labels, torch.full((PAIRS,), labels == "desirable"))

    def scorer(of_completions, of_others):
        def model(input_ids, **_):
            return outputs(of_others * kl_mask if (input_ids == 2).all() else of_completions * mask)

        model.is_gradient_checkpointing = False
        return model

    def trl(x):
        trainer = trainer_of(
            KTOTrainer, ref_model=scorer(ref.to(x.dtype), kl_ref.to(x.dtype)), loss_type=loss,
            calculate_KL=loss == "kto", desirable_weight=1.3, undesirable_weight=0.7,
        )  # fmt: skip
        batch = inputs_of(mask) | {"KL_" + k: v for k, v in inputs_of(kl_mask).items()} | {"label": desirable}
        batch["KL_input_ids"] = torch.full_like(batch["KL_input_ids"], 2)
        return trainer._compute_loss(scorer(x, kl_logprob.to(x.dtype)), batch, False)

    def ours(x):
        sums = (sequence_logprobs(t.to(x.dtype), kl_mask).logprob for t in (kl_logprob, kl_ref))
        policy, others = next(sums), next(sums)
        return kto_loss(
            sequence_logprobs(x, mask).logprob,
            sequence_logprobs(ref.to(x.dtype), mask).logprob,
            desirable,
            loss=loss,
            beta=BETA,
            kl=policy - others if loss == "kto" else None,
            desirable_weight=1.3,
            undesirable_weight=0.7,
        ).loss

    assert_same(ours, trl, logprob)
