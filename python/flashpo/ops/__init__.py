"""The ops: each file holds a public function, its reference, fake, backends and gradient."""

from flashpo.ops.entropy_threshold import entropy_threshold
from flashpo.ops.linear_logprob import linear_logprob
from flashpo.ops.loss_spec import LOSSES, LossSpec
from flashpo.ops.policy_loss import PolicyLoss, policy_loss
from flashpo.ops.policy_stats import PolicyStats
from flashpo.ops.selective_log_softmax import selective_log_softmax
from flashpo.ops.token_stats import TokenStats

__all__ = [
    "LOSSES",
    "LossSpec",
    "PolicyLoss",
    "PolicyStats",
    "TokenStats",
    "entropy_threshold",
    "linear_logprob",
    "policy_loss",
    "selective_log_softmax",
]
