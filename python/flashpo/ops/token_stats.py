"""Statistics of a softmax for one token per row, and the partial sums from which they are computed.

With logits z_j over the vocabulary, target t and log-sum-exp L = log sum_j exp(z_j):

    logprob           z_t - L
    entropy           L - sum_j p_j z_j                     p_j = exp(z_j - L)
    log_sum_sq_probs  log sum_j p_j^2
    mean_logit        mean_j z_j
    is_top1           whether t is the first of the largest z_j

Sums over a part J of the vocabulary form one column of a *partial*, a float tensor (R, N). There logits are in bits,
y_j = z_j log2(e), and relative to a reference r near their maximum. `merge_partials` joins the partials of several
parts.

    REF     r                                SQSUM   sum_J 2^(2 (y_j - r))
    SUM     sum_J 2^(y_j - r)                YSUM    sum_J y_j
    WSUM    sum_J 2^(y_j - r) (y_j - r)      BEFORE  max of y_j - r over j in J before the target, or -inf
    TARGET  y_t - r if t is in J, else -inf  MAX     max_J y_j - r

The result is one tensor with the rows LOGPROB, ENTROPY, LOG_Z, LOG_Z_REST and, if asked for, the side outputs. Backward
needs L. In bits L is LOG_Z + LOG_Z_REST, where the first is near the largest logit and the second is small. Therefore
p_j = 2^((y_j - LOG_Z) - LOG_Z_REST) is exact to fp32, however large the logits are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flashpo._op import native, op
from flashpo.ops._check import check_names
from flashpo.ops._wide import wide_dtype

LN2 = math.log(2.0)
REF, SUM, WSUM, TARGET, SQSUM, YSUM, BEFORE, MAX = range(8)
LOGPROB, ENTROPY, LOG_Z, LOG_Z_REST = range(4)
SIDE_OUTPUTS = ("log_sum_sq_probs", "mean_logit", "is_top1")


def partial_rows(side: bool) -> int:
    return 8 if side else 4


def result_rows(side: bool) -> int:
    return 7 if side else 4


class TokenStats(NamedTuple):
    """Per-token results, each of the target's shape and fp32 (`is_top1`: bool). None: not asked for.

    `logprob` and `entropy` are in nats and differentiable; the others are not differentiable.
    """

    logprob: Tensor
    entropy: Tensor = None  # type: ignore[assignment]  # never None for a caller that asked for it
    log_sum_sq_probs: Tensor = None  # type: ignore[assignment]
    mean_logit: Tensor = None  # type: ignore[assignment]
    is_top1: Tensor = None  # type: ignore[assignment]


def check_outputs(outputs: tuple[str, ...]) -> bool:
    """Whether `outputs` asks for any side output. Raises on an unknown name."""
    check_names("outputs", outputs, TokenStats._fields)
    return any(name in outputs for name in SIDE_OUTPUTS)


def split(rows: Tensor) -> tuple[Tensor, ...]:
    """(logprob, entropy, and the side outputs if there are any) from a tensor of results."""
    logprob, entropy, _, _, *side = rows.unbind(0)
    return logprob, entropy, *side


def select(outputs: tuple[str, ...], shape: torch.Size, logprob: Tensor, entropy: Tensor, *side: Tensor) -> TokenStats:
    """Pick the wanted outputs from an operator's flat results and give them the target's shape."""
    if len(shape) != 1:
        logprob, entropy = logprob.view(shape), entropy.view(shape)
        side = tuple(x.view(shape) for x in side)
    if not side:
        return TokenStats(logprob, entropy) if "entropy" in outputs else TokenStats(logprob)
    stats = {"entropy": entropy, **dict(zip(SIDE_OUTPUTS, (*side[:-1], side[-1] > 0)))}
    return TokenStats(logprob, **{name: x for name, x in stats.items() if name in outputs})


def partial_from_logits(z: Tensor, target: Tensor, side: bool) -> Tensor:
    """The partial of logits z (N, J), in nats. A target outside [0, J) belongs to another part."""
    y = z / LN2
    ref = y.amax(-1)
    lowest = torch.finfo(y.dtype).min  # a lower bound, because -inf - -inf and 0 * -inf are NaN
    relative = y - ref.clamp(min=lowest)[:, None]
    shifted = relative.clamp(min=lowest)
    e = shifted.exp2()
    inside = (target >= 0) & (target < y.shape[-1])
    of_target = relative.gather(-1, target.where(inside, 0)[:, None])[:, 0].where(inside, -torch.inf)
    rows = [ref, e.sum(-1), (e * shifted).sum(-1), of_target]
    if side:
        earlier = torch.arange(y.shape[-1], device=y.device) < target[:, None]
        before = relative.where(earlier, -torch.inf).amax(-1)
        rows += [(e * e).sum(-1), y.sum(-1), before, relative.amax(-1)]
    return torch.stack(rows)


def neutral_partial(side: bool, tokens: int, like: Tensor) -> Tensor:
    """(R, tokens): the partial of ignored tokens; `merge_partials` of it alone gives exact zeros."""
    partial = like.new_zeros((partial_rows(side), tokens), dtype=wide_dtype(like.dtype))
    partial[SUM] = 1
    if side:
        partial[SQSUM] = 1
    return partial


@op
def merge_partials(
    partials: Tensor,  # (S, R, N): S parts of the vocabulary
    vocab: int,
) -> Tensor:
    """The rows LOGPROB ... LOG_Z_REST and the side outputs for the whole vocabulary, (4 or 7, N)."""
    refs = partials[:, REF]
    ref = refs.amax(0)
    shift = (refs - ref).nan_to_num(nan=0.0, neginf=-1e30)  # a part that is all -inf gets weight 0
    scale = shift.exp2()
    total = (partials[:, SUM] * scale).sum(0)
    weighted = ((partials[:, WSUM] + shift * partials[:, SUM]) * scale).sum(0)
    bits = total.log2()
    target = (partials[:, TARGET] + shift).amax(0)
    rows = [(target - bits) * LN2, (bits - weighted / total) * LN2, ref, bits]
    if partials.shape[1] == partial_rows(side=True):
        top1 = (target >= (partials[:, MAX] + shift).amax(0)) & (target > (partials[:, BEFORE] + shift).amax(0))
        rows += [
            ((partials[:, SQSUM] * scale * scale).sum(0).log2() - 2 * bits) * LN2,
            partials[:, YSUM].sum(0) * (LN2 / vocab),
            top1.to(ref.dtype),
        ]
    return torch.stack(rows)


@merge_partials.fake
def _(partials, vocab):
    return partials.new_empty((result_rows(partials.shape[1] == partial_rows(side=True)), partials.shape[-1]))


@merge_partials.backend("native")  # csrc/cpu/token_stats.cpp
def _(partials, vocab):
    if partials.device.type != "cpu" or partials.dtype != torch.float32:
        return NotImplemented
    rows = partials.new_empty((result_rows(partials.shape[1] == partial_rows(side=True)), partials.shape[-1]))
    native.merge_partials(partials.contiguous(), vocab, rows)
    return rows


@merge_partials.backend("triton")
def _(partials, vocab):
    from flashpo.kernels.token_stats import merge_partials as run

    return run(partials, vocab) if partials.dtype == torch.float32 else NotImplemented
