"""Other implementations of the same computations: (logprob, entropy or None) from hidden states and a head, or from
logits; and the policy loss of given log-probs. Only those that are installed and run on the device are listed.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F


def eager(h, w, target):
    """Plain torch: logits in the head's dtype, then fp32."""
    return eager_logits(F.linear(h, w), target)


def eager_logits(logits, target):
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def trl_logits(logits, target):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    # Its CPU path loops over the first dimension, so its best case is one sequence of all tokens.
    logprob, entropy = selective_log_softmax_and_entropy(logits[None], target[None])
    return logprob[0], entropy[0]


def trl(h, w, target):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(
        h, w, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
    )[:2]


def trl_divergence(h, w, h_teacher, w_teacher, beta):
    """(divergence, entropy) by the kernel of TRL's DistillationTrainer. Only the divergence has a gradient."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(h, w, None, h_teacher, w_teacher, None, beta)


def eager_divergence(h, w, h_teacher, w_teacher, beta):
    """Plain torch, as in GKD: both logits are materialised, and there is no entropy."""
    student, teacher = (F.linear(*head).float().log_softmax(-1) for head in ((h, w), (h_teacher, w_teacher)))
    if beta == 0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1), None
    if beta == 1:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1), None
    mixture = torch.stack([student + math.log1p(-beta), teacher + math.log(beta)]).logsumexp(0)
    of_teacher, of_student = (F.kl_div(mixture, x, reduction="none", log_target=True) for x in (teacher, student))
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1), None


def cce(h, w, target):
    """With exact gradients (by default `cce` filters them and sums in bf16); there is no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, w, target, reduction="none", impl="cce_exact"), None


def liger(h, w, target):
    """The mean cross-entropy only: its forward pass computes the gradient for a uniform upstream gradient."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(h, w, target)[0], None


def trl_policy_loss(
    logprob,
    old_logprob,
    advantage,
    mask,
    ref_logprob=None,
    *,
    loss_type,
    level="token",
    epsilon_low=0.2,
    epsilon_high=0.28,
    beta=0.0,
    num_items=None,
    metrics=False,
):
    """What TRL 1.16's GRPOTrainer._compute_loss does with log-probs, in torch and on one process. With `metrics` it
    also logs, and each logged value waits for the device."""
    a = advantage[:, None]
    log_ratio = logprob - old_logprob
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    w = log_ratio.exp()
    if beta != 0:
        delta = ref_logprob - logprob
        kl = (delta.exp() - delta - 1) * w
    if loss_type == "cispo":
        x = -w.clamp(max=epsilon_high).detach() * a * logprob
    elif loss_type == "vespo":
        with torch.no_grad():
            log_w = (log_ratio.clamp(-20, 20) * mask).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
            k, lam = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
            phi = (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        x = -phi * a * logprob
    else:
        x = -torch.min(w * a, w.clamp(1 - epsilon_low, 1 + epsilon_high) * a)
    if beta != 0:
        x = x + beta * kl
    if num_items is None:
        loss = ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    else:
        loss = (x * mask).sum() / num_items.clamp(min=1.0)
    if metrics:
        with torch.no_grad():
            trl_metrics(w, a, mask, kl if beta != 0 else None, loss_type, epsilon_low, epsilon_high)
    return loss


def trl_metrics(w, a, mask, kl, loss_type, epsilon_low, epsilon_high):
    def mean(x):
        total, count = (x.sum(), x.new_tensor(len(x))) if x.shape[1] == 1 else ((x * mask).sum(), mask.sum().float())
        return (total / count.clamp(min=1.0)).item()

    def of_sequence(x):
        return x[:, 0] if x.shape[1] == 1 else (x * mask).sum(-1) / mask.sum(-1)

    if kl is not None:
        mean(kl)
    if loss_type == "cispo":
        mean(((w > epsilon_high) & (a > 0)).float())
    elif loss_type != "vespo":
        low, high = (w < 1 - epsilon_low) & (a < 0), (w > 1 + epsilon_high) & (a > 0)
        for flag in (low, high, low | high):
            mean(flag.float())
        of_sequence(low.float()).nan_to_num(nan=torch.inf).min().item()
        of_sequence(high.float()).nan_to_num(nan=-torch.inf).max().item()


def installed(device: str) -> dict:
    """name -> function of (hidden, weight, target)."""
    torch._dynamo.reset()  # the graphs of the previous shape would count towards the limit of recompilations
    found = {"torch eager": eager, "torch.compile": torch.compile(eager)}
    if importlib.util.find_spec("trl"):
        found["TRL"] = trl
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        found["CCE exact"] = cce
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    return found
