"""FlashPO: kernels and a thin layer over them that compute every token of LLM post-training once.

`import flashpo` needs torch alone: no compiler, GPU, Triton or network.
"""

from flashpo._op import backend, stats
from flashpo.ops import TokenStats, linear_logprob, selective_log_softmax

__version__ = "0.1.0"
__all__ = ["TokenStats", "backend", "linear_logprob", "selective_log_softmax", "stats"]
