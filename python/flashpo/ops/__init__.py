"""The operators. Each file holds one public function with its reference, its fake, its backends and its gradient."""

from flashpo.ops._lineage import Lineage
from flashpo.ops._preference_terms import PREFERENCE_LOSSES
from flashpo.ops.decode_attention import decode_attention
from flashpo.ops.direct_advantage_loss import direct_advantage_loss
from flashpo.ops.divergence import divergence, topk_divergence
from flashpo.ops.divergence_stats import DivergenceStats
from flashpo.ops.gae import gae
from flashpo.ops.group_advantages import Advantages, group_advantages
from flashpo.ops.kto_loss import UnpairedLoss, kto_loss
from flashpo.ops.kv_append import kv_append
from flashpo.ops.linear_divergence import linear_divergence
from flashpo.ops.linear_logprob import linear_logprob
from flashpo.ops.loss_spec import LOSSES, LossSpec
from flashpo.ops.masked_quantile import entropy_threshold, masked_quantile, ratio_quantiles
from flashpo.ops.overlong_penalty import overlong_penalty
from flashpo.ops.policy_loss import PolicyLoss, policy_loss
from flashpo.ops.policy_stats import PolicyStats
from flashpo.ops.preference_loss import PreferenceLoss, preference_loss
from flashpo.ops.sample import Sample, sample
from flashpo.ops.selective_log_softmax import selective_log_softmax
from flashpo.ops.sequence_logprobs import SequenceLogprobs, sequence_logprobs
from flashpo.ops.token_stats import TokenStats
from flashpo.ops.tree_attention import tree_attention
from flashpo.ops.tree_conv import tree_conv
from flashpo.ops.tree_recurrence import tree_recurrence
from flashpo.ops.value_loss import value_loss

__all__ = [
    "LOSSES",
    "PREFERENCE_LOSSES",
    "Advantages",
    "DivergenceStats",
    "Lineage",
    "LossSpec",
    "PolicyLoss",
    "PolicyStats",
    "PreferenceLoss",
    "Sample",
    "SequenceLogprobs",
    "TokenStats",
    "UnpairedLoss",
    "decode_attention",
    "direct_advantage_loss",
    "divergence",
    "entropy_threshold",
    "gae",
    "group_advantages",
    "kto_loss",
    "kv_append",
    "linear_divergence",
    "linear_logprob",
    "masked_quantile",
    "overlong_penalty",
    "policy_loss",
    "preference_loss",
    "ratio_quantiles",
    "sample",
    "selective_log_softmax",
    "sequence_logprobs",
    "topk_divergence",
    "tree_attention",
    "tree_conv",
    "tree_recurrence",
    "value_loss",
]
