"""FlashPO: kernels and a thin layer over them that compute every token of LLM post-training once.

`import flashpo` needs torch alone: no compiler, GPU, Triton or network.
"""

from flashpo._op import backend, stats
from flashpo.ops import (
    LOSSES,
    LossSpec,
    PolicyLoss,
    PolicyStats,
    TokenStats,
    entropy_threshold,
    linear_logprob,
    policy_loss,
    selective_log_softmax,
)

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "LossSpec",
    "PolicyLoss",
    "PolicyStats",
    "TokenStats",
    "backend",
    "entropy_threshold",
    "linear_logprob",
    "policy_loss",
    "selective_log_softmax",
    "stats",
]
