"""What others do for the same tokens: each gives (logprob, entropy or None) of hidden states and a head, or of logits.

Only what is installed and runs on the device is listed.
"""

import importlib.util

import torch
import torch.nn.functional as F


def eager(h, w, target):
    """torch, as one would write it: logits in the head's dtype, then fp32."""
    return eager_logits(F.linear(h, w), target)


def eager_logits(logits, target):
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def trl_logits(logits, target):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    # its CPU path loops over the first dimension: one sequence of all tokens is its best case
    logprob, entropy = selective_log_softmax_and_entropy(logits[None], target[None])
    return logprob[0], entropy[0]


def trl(h, w, target):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(
        h, w, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )[:2]


def cce(h, w, target):
    """Exact gradients (`cce` itself filters them and sums in bf16); no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, w, target, reduction="none", impl="cce_exact"), None


def liger(h, w, target):
    """Mean cross-entropy only: the gradient is computed in its forward pass, for a uniform upstream gradient."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(h, w, target)[0], None


def installed(device: str) -> dict:
    """name -> function of (hidden, weight, target)."""
    torch._dynamo.reset()  # the last shape's graphs would count towards the limit of recompilations
    found = {"torch eager": eager, "torch.compile": torch.compile(eager)}
    if importlib.util.find_spec("trl"):
        found["TRL"] = trl
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        found["CCE exact"] = cce
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    return found
