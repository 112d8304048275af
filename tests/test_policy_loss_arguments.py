"""Contradictory options of a LossSpec and wrong arguments of `policy_loss` raise errors that name them."""

import math

import pytest
import torch
from test_policy_loss import batch, tensors_for

from flashpo import LOSSES, LossSpec, policy_loss

CONTRADICTIONS = [
    (dict(surrogate="ppo"), "surrogate must be one of"),
    (dict(surrogate="sapo", dual_clip=3.0), "dual_clip does nothing for sapo"),
    (dict(dual_clip=0.5), "dual_clip must be above 1"),
    (dict(surrogate="cispo", ratio_cap=2.0), "ratio_cap does nothing"),
    (dict(clip_low=None), "clip needs clip_low"),
    (dict(clip_high=-0.1), "clip_high must not be negative"),
    (dict(surrogate="gmpo"), "ratio='sequence'"),
    (dict(surrogate="dppo_tv", ratio="sequence"), "ratio='token'"),
    (dict(kl_ratio_correction=True), "while kl_coef is 0"),
    (dict(surrogate="vespo", importance="sequence_mask", importance_max=2.0), "weights of tokens"),
    (dict(importance="token_mask"), "needs importance_min or _max"),
    (dict(importance_max=2.0), "do nothing without importance"),
    (dict(top_entropy=0.0), "top_entropy must be in"),
    (dict(max_length=5), "max_length does nothing"),
    (dict(empty_sequences="surrogate"), "for aggregation='sequence_mean'"),
    (dict(surrogate="sapo", clip_high=0.3), "clip_high does nothing for sapo"),
    (dict(kl_coef=0.1, kl="k1", kl_log_clamp=20.0), "kl_log_clamp does nothing for kl='k1'"),
    (dict(kl_coef=0.1, kl_clamp=0.0), "kl_clamp must be positive"),
    (dict(log_ratio_min=1.0, log_ratio_max=-1.0), "log_ratio_min must not be above log_ratio_max"),
    (dict(importance="token_mask", importance_min=3.0, importance_max=1.0), "importance_min must not be above"),
    (dict(clip_high=math.inf), "clip_high must be finite, got inf"),
    (dict(entropy_coef=math.nan), "entropy_coef must be finite, got nan"),
    (dict(sapo_temperatures=(1.0,)), r"sapo_temperatures must be a tuple like \(1.0, 1.05\)"),
    (dict(vespo_gamma=(2.0, 3.0)), "vespo_gamma must be a tuple like"),
    (dict(aggregation="fixed_length", max_length=2.5), "max_length must be a positive integer"),
]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_contradictory_options_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        LossSpec(**fields)


def _wrong(**changes):
    made = tensors_for(LOSSES["dapo"], batch(dtype=torch.float32))
    return made | changes


WRONG = [
    (dict(loss="dpo"), ValueError, "loss must be one of"),
    (dict(loss=3), TypeError, "loss must be a name"),
    (dict(loss=["dapo"]), TypeError, "loss must not be a list"),
    (dict(clip_high="0.3"), TypeError, "clip_high must be a number of Python, got str"),
    (dict(clip_high=[0.3]), TypeError, "clip_high must not be a list"),
    (dict(mask=None), TypeError, "mask must be a torch.Tensor, got NoneType"),
    (dict(old_logprob=[0.0]), TypeError, "old_logprob must be a torch.Tensor, got list"),
    (dict(advantage=[1.0] * 5), TypeError, "advantage must be a torch.Tensor, got list"),
    (dict(num_items=-4), ValueError, "num_items must not be negative"),
    (dict(num_items="4"), TypeError, "num_items must be a number, got str"),
    (dict(num_items=torch.ones(2)), ValueError, "num_items must be a number or a scalar tensor"),
    (dict(scale=float("nan")), ValueError, "scale must be finite"),
    (dict(epsilon=0.1), TypeError, "no option epsilon"),
    (dict(loss="dr_grpo"), ValueError, "needs max_length"),
    (dict(kl_coef=0.1), ValueError, "ref_logprob is needed"),
    (dict(ref_logprob=torch.zeros(5, 8)), ValueError, "kl_coef is 0"),
    (dict(importance="token_mask", importance_max=2.0), ValueError, "rollout_logprob is needed"),
    (dict(entropy=None, entropy_coef=0.1), ValueError, "entropy is needed for entropy_coef"),
    (dict(entropy=None, top_entropy=0.5), ValueError, "entropy is needed for top_entropy"),
    (dict(mask=torch.ones(5, 8)), TypeError, "mask must be bool or integers"),
    (dict(mask=torch.ones(5, 7, dtype=torch.bool)), ValueError, r"mask must have logprob's shape \(5, 8\)"),
    (dict(advantage=torch.zeros(4)), ValueError, "advantage must have one value for each of the 5 sequences"),
    (dict(advantage=torch.zeros(5, dtype=torch.float64)), TypeError, "advantage must be torch.float32"),
    (dict(logprob=torch.zeros(5, 8, dtype=torch.bfloat16)), TypeError, "float32 or float64"),
    (dict(logprob=torch.zeros(40)), ValueError, r"logprob must be \(B, T\)"),
    (dict(loss="bnpo", num_items=3.0), ValueError, "num_items does nothing"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[m for _, _, m in WRONG])
def test_bad_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        policy_loss(**_wrong(**changes))
