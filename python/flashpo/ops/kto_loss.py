"""KTO and unpaired APO: losses of single completions that are labelled as desirable or undesirable."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpo.ops._check import check_beside, check_choice, check_device, check_dtype, check_float, check_positive
from flashpo.ops._wide import wide_dtype

KTO_LOSSES = ("kto", "apo_zero_unpaired")


class UnpairedLoss(NamedTuple):
    loss: Tensor  # (): the mean of per_sequence; 0 for an empty batch
    per_sequence: Tensor  # (B,)
    rewards: Tensor  # (B,), without gradient: beta times the log-ratio to the reference


def kto_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    desirable: Tensor,
    *,
    loss: str = "kto",
    beta: float = 0.1,
    kl: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """KTO: the mean of w_d (1 - s(b (x - z))) for desirable and w_u (1 - s(b (z - x))) for undesirable completions.

    x is the log-ratio of a completion to the reference, b is beta, s the logistic function, and z = max(0, mean of kl)
    is a constant (arXiv 2402.01306, equation 7). "apo_zero_unpaired" has z = 0 (APO, arXiv 2408.06266, without pairs).
    As in TRL's KTOTrainer.

    Args:
        logprob, ref_logprob: (B,) float: the sum over each completion's tokens, for instance from `sequence_logprobs`.
        desirable: (B,) bool: the label of each completion.
        loss: "kto" or "apo_zero_unpaired".
        beta: a positive number.
        kl: for "kto" only: log-ratios (any shape) of prompts combined with completions of other prompts, or their mean.
            If there are several ranks, take the mean over them first, since all ranks share one estimate.
        desirable_weight, undesirable_weight: w_d and w_u, positive numbers.

    Returns:
        UnpairedLoss, fp32 or wider.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, a name is unknown, or kl is missing, empty, or given to a loss that does
            not read it.
    """
    check_choice("loss", loss, KTO_LOSSES, "; see also preference_loss")
    for name, value in (("beta", beta), ("desirable_weight", desirable_weight)):
        check_positive(name, value)
    check_positive("undesirable_weight", undesirable_weight)
    _check_sequences(logprob, ref_logprob, desirable)
    if (kl is None) == (loss == "kto"):
        raise ValueError(f"kl is {'needed' if kl is None else 'not read'} by {loss}")

    wide = wide_dtype(logprob.dtype)
    x = logprob.to(wide) - ref_logprob.to(wide)
    shift = x.new_zeros(()) if kl is None else _estimate(kl, logprob).to(wide)
    away = beta * (shift - x)
    per_sequence = torch.where(
        desirable, desirable_weight * torch.sigmoid(away), undesirable_weight * torch.sigmoid(-away)
    )
    return UnpairedLoss(per_sequence.sum() / max(x.shape[0], 1), per_sequence, beta * x.detach())


def _estimate(kl: Tensor, logprob: Tensor) -> Tensor:
    check_float("kl", kl)
    check_device("kl", kl, "logprob", logprob)
    if kl.numel() == 0:
        raise ValueError("kl is empty")
    return kl.detach().mean().clamp(min=0)


def _check_sequences(logprob: Tensor, ref_logprob: Tensor, desirable: Tensor) -> None:
    check_float("logprob", logprob)
    check_float("ref_logprob", ref_logprob)
    check_dtype("desirable", desirable, torch.bool)
    if logprob.dim() != 1:
        raise ValueError(f"logprob must have shape (B,), got {tuple(logprob.shape)}")
    for name, x in (("ref_logprob", ref_logprob), ("desirable", desirable)):
        check_beside(name, x, "logprob", logprob)
