"""Sums of per-token log-probabilities over each sequence: the step between `linear_logprob` and `preference_loss`."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpo.ops._check import (
    check_beside,
    check_device,
    check_dtype,
    check_float,
    check_share,
    check_tensor,
    check_that,
)
from flashpo.ops._wide import wide


class SequenceLogprobs(NamedTuple):
    logprob: Tensor  # (S,): the sum of the log-probabilities of a sequence's tokens
    length: Tensor  # (S,) int64: the number of these tokens
    weight: Tensor | None = None  # (S,), without gradient: WPO's weight; the weight of a pair is the product of its two


def sequence_logprobs(
    logprob: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    log_sum_sq_probs: Tensor | None = None,
) -> SequenceLogprobs:
    """For each sequence: sum_t mask_t logprob_t, its number of tokens, and optionally its WPO weight.

        stats = linear_logprob(hidden, weight, target, outputs=("log_sum_sq_probs",))
        policy = sequence_logprobs(stats.logprob, mask, log_sum_sq_probs=stats.log_sum_sq_probs)
        result = preference_loss(*policy.logprob.chunk(2), *ref.logprob.chunk(2))

    Args:
        logprob: (S, T) float, or flat (N,) with `cu_seqlens`; differentiable. For pairs, the first half of the
            sequences are the chosen ones and the second half the rejected ones in the same order, as in TRL.
        mask: the same shape, bool or integers 0 and 1: the tokens of the completions. Other tokens are not read.
        cu_seqlens: (S + 1,) int32 or int64: sequence s has the tokens from cu_seqlens[s] up to cu_seqlens[s + 1]. With
            the boundaries of steps instead of sequences, the sums are what `direct_advantage_loss` takes.
        ld_alpha: in [0, 1], for LD-DPO (arXiv 2409.06411): tokens beyond the length of the pair's shorter completion
            are multiplied by ld_alpha. `length` counts all tokens. A likelihood term needs plain sums: pass these to
            the loss as `sft`.
        log_sum_sq_probs: the same shape as logprob: log sum_v p_v^2 of each token's distribution. If given, the weight
            of WPO (arXiv 2406.11827, equation 2) is computed: exp(mean_t(logprob_t - log_sum_sq_probs_t)), which is 1
            for a sequence without tokens.

    Returns:
        SequenceLogprobs, fp32 or wider.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes or devices disagree, an option is out of its range, `ld_alpha` is given for an odd number of
            sequences, or cu_seqlens does not ascend from 0 to N (on CUDA: a device assertion).
    """
    check_float("logprob", logprob)
    check_tensor("mask", mask)
    check_beside("mask", mask, "logprob", logprob)
    if log_sum_sq_probs is not None:
        check_float("log_sum_sq_probs", log_sum_sq_probs)
        check_beside("log_sum_sq_probs", log_sum_sq_probs, "logprob", logprob)
    check_that(((mask == 0) | (mask == 1)).all(), "mask must hold 0 and 1 only")
    rows = Rows(logprob) if cu_seqlens is None else Segments(logprob, cu_seqlens)

    mask = mask.bool()
    logprob = wide(logprob).where(mask, 0.0)
    length = rows.sum(mask.long())
    weighted = logprob
    if ld_alpha is not None:
        check_share("ld_alpha", ld_alpha)
        if rows.count % 2:
            raise ValueError(f"ld_alpha needs pairs, chosen first and rejected second: got {rows.count} sequences")
        shared = length.view(2, -1).amin(0).repeat(2)
        tail = rows.position(mask) > rows.spread(shared)
        weighted = torch.where(tail, ld_alpha * logprob, logprob)
    if log_sum_sq_probs is None:
        return SequenceLogprobs(rows.sum(weighted), length)
    aligned = (logprob.detach() - log_sum_sq_probs.detach()).where(mask, 0.0)
    return SequenceLogprobs(rows.sum(weighted), length, (rows.sum(aligned) / length.clamp(min=1)).exp())


class Rows:
    """Sequences as the rows of (S, T)."""

    def __init__(self, logprob: Tensor):
        if logprob.dim() != 2:
            raise ValueError(f"logprob must be (S, T), or (N,) with cu_seqlens, got {tuple(logprob.shape)}")
        self.count = logprob.shape[0]

    def sum(self, x: Tensor) -> Tensor:  # (S, T) -> (S,)
        return x.sum(1)

    def spread(self, x: Tensor) -> Tensor:  # (S,) -> (S, 1)
        return x[:, None]

    def position(self, mask: Tensor) -> Tensor:
        """1 for a sequence's first masked-in token, 2 for its second, and so on."""
        return mask.cumsum(1)


class Segments:
    """Sequences one after the other in (N,). Sums are in fp64, so that the order in which a GPU adds does not
    matter."""

    def __init__(self, flat: Tensor, cu_seqlens: Tensor):
        check_dtype("cu_seqlens", cu_seqlens, torch.int32, torch.int64)
        if flat.dim() != 1:
            raise ValueError(f"logprob must be (N,) with cu_seqlens, got {tuple(flat.shape)}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
        check_device("cu_seqlens", cu_seqlens, "logprob", flat)
        starts = cu_seqlens.long()
        ascends = (starts[0] == 0) & (starts[-1] == flat.shape[0]) & (starts.diff() >= 0).all()
        check_that(ascends, "cu_seqlens must ascend from 0 to the number of tokens")
        self.count = cu_seqlens.shape[0] - 1
        self.starts = starts[:-1]
        self.of_token = torch.searchsorted(starts[1:], torch.arange(flat.shape[0], device=flat.device), right=True)

    def sum(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        wide = x.double() if x.is_floating_point() else x
        return wide.new_zeros(self.count).index_add(0, self.of_token, wide).to(x.dtype)

    def spread(self, x: Tensor) -> Tensor:  # (S,) -> (N,)
        return x[self.of_token]

    def position(self, mask: Tensor) -> Tensor:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return before[1:] - self.spread(before[self.starts])
