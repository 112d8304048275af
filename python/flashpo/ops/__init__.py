"""The ops: each file holds a public function, its reference, fake, backends and gradient."""

from flashpo.ops.linear_logprob import linear_logprob
from flashpo.ops.selective_log_softmax import selective_log_softmax
from flashpo.ops.token_stats import TokenStats

__all__ = ["TokenStats", "linear_logprob", "selective_log_softmax"]
