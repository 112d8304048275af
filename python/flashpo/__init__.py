"""FlashPO: kernels and a thin layer over them that compute every token of LLM post-training once.

`import flashpo` needs torch alone: no compiler, GPU, Triton or network.
"""

from flashpo._op import backend, stats
from flashpo.ops import (
    LOSSES,
    PREFERENCE_LOSSES,
    Advantages,
    LossSpec,
    PolicyLoss,
    PolicyStats,
    PreferenceLoss,
    SequenceLogprobs,
    TokenStats,
    UnpairedLoss,
    direct_advantage_loss,
    entropy_threshold,
    gae,
    group_advantages,
    kto_loss,
    linear_logprob,
    masked_quantile,
    overlong_penalty,
    policy_loss,
    preference_loss,
    ratio_quantiles,
    selective_log_softmax,
    sequence_logprobs,
    tree_attention,
    value_loss,
)

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "PREFERENCE_LOSSES",
    "Advantages",
    "LossSpec",
    "PolicyLoss",
    "PolicyStats",
    "PreferenceLoss",
    "SequenceLogprobs",
    "TokenStats",
    "UnpairedLoss",
    "backend",
    "direct_advantage_loss",
    "entropy_threshold",
    "gae",
    "group_advantages",
    "kto_loss",
    "linear_logprob",
    "masked_quantile",
    "overlong_penalty",
    "policy_loss",
    "preference_loss",
    "ratio_quantiles",
    "selective_log_softmax",
    "sequence_logprobs",
    "stats",
    "tree_attention",
    "value_loss",
]
