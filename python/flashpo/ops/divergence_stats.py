"""How far a student's softmax is from a teacher's, for one token per row, and the partial sums behind it.

For each model let z be the logits at the temperature, L their log-sum-exp, and log p_j = z_j - L. Let d_j be log p_j of
the teacher minus log p_j of the student.

    beta = 0        forward KL(teacher || student) = sum_j p_j(teacher) d_j
    beta = 1        reverse KL(student || teacher) = -sum_j p_j(student) d_j
    0 < beta < 1    the generalised Jensen-Shannon divergence of TRL and GKD, with the mixture
                    M = (1 - beta) student + beta teacher:  beta KL(teacher || M) + (1 - beta) KL(student || M)

A token of probability 0 adds nothing (0 log 0 = 0). A KL is +inf if the distribution over which it averages gives a
positive probability, however small, to a token whose logit is -inf in the other one. The mixture gives a positive
probability to all of these tokens, so the Jensen-Shannon divergence is finite, at most log 2.

A partial (10 or 14, N) holds sums over a part J of the vocabulary, one column per token. Its rows are the student's
partial and the teacher's (see `token_stats`), and then the terms of both KLs. Here `own` is the distribution over which
a KL averages, and `other` the other one; y (in bits) and r are as in `token_stats`:

    GAP        sum_J 2^(y_j - r) ((y_j - r) of own - (y_j - r) of other)     0 for the Jensen-Shannon divergence
    FORBIDDEN  the number of j in J that are possible under own and impossible under other
    S_TOP, S_AT, T_TOP, T_AT   for student and teacher: max_J y_j - r, and the first j that has it; only if asked for

The Jensen-Shannon divergence needs both log-sum-exps before it can be summed, so it takes a second pass:

    JSD        sum_J beta p_j(teacher) log(p_j(teacher) / M_j) + (1 - beta) p_j(student) log(p_j(student) / M_j)
    KL_STUDENT sum_J p_j(student) log(p_j(student) / M_j), which the gradient needs
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashpo.ops import token_stats
from flashpo.ops._check import check_names
from flashpo.ops.token_stats import ENTROPY, LN2, LOG_Z, LOG_Z_REST, LOGPROB, REF, SUM, TARGET, WSUM, merge_partials

STUDENT, TEACHER, GAP, FORBIDDEN, S_TOP, S_AT, T_TOP, T_AT = 0, 4, 8, 9, 10, 11, 12, 13
MOST = 80.0  # bound of |d|: e^80 is finite in fp32, and a probability e^-80 times another adds nothing to it


def partial_rows(top1: bool) -> int:
    return 14 if top1 else 10


class DivergenceStats(NamedTuple):
    """Per-token results, each of the target's shape, fp32 and in nats. None: not asked for.

    `divergence`, `entropy` (of the student) and `student_logprob` are differentiable by the student's hidden states and
    head, or by its logits. `is_top1_agreed` is a bool: student and teacher have the same most probable token (of
    several that tie, the first).
    """

    divergence: Tensor
    entropy: Tensor = None  # type: ignore[assignment]  # never None for a caller that asked for it
    student_logprob: Tensor = None  # type: ignore[assignment]
    teacher_logprob: Tensor = None  # type: ignore[assignment]
    is_top1_agreed: Tensor = None  # type: ignore[assignment]


def check_outputs(outputs: tuple[str, ...]) -> bool:
    """Whether `outputs` asks for the most probable tokens; raises on an unknown name."""
    check_names("outputs", outputs, DivergenceStats._fields)
    return "is_top1_agreed" in outputs


def select(outputs: tuple[str, ...], shape: torch.Size, results: tuple[Tensor, ...]) -> DivergenceStats:
    """Pick the wanted outputs from all (flat) outputs and give them the target's shape."""
    named = zip(DivergenceStats._fields, results)
    return DivergenceStats(**{name: x.view(shape) for name, x in named if name in ("divergence", *outputs)})


def partial_from_logits(
    student: Tensor, teacher: Tensor, target: Tensor, beta: float, start: int, top1: bool
) -> Tensor:
    """The partial of logits (N, J), in nats. Their first column is vocabulary entry `start`; `target` counts from 0."""
    partials = [token_stats.partial_from_logits(z, target - start, False) for z in (student, teacher)]
    lowest = torch.finfo(student.dtype).min
    relative = [z / LN2 - p[REF].clamp(min=lowest)[:, None] for z, p in zip((student, teacher), partials)]
    own, other = relative if beta == 1 else relative[::-1]
    gap = (own - other).masked_fill(own.isneginf() | other.isneginf(), 0.0)
    forbidden = other.isneginf() & ~own.isneginf()
    rows = [(own.exp2() * gap).sum(-1), forbidden.sum(-1).to(gap.dtype)]
    if 0 < beta < 1:
        rows = [torch.zeros_like(row) for row in rows]
    if top1:
        for x in relative:
            top = x.max(-1)
            rows += [top.values, (start + top.indices).to(x.dtype)]
    return torch.cat([*partials, torch.stack(rows)])


def neutral_partial(top1: bool, tokens: int, like: Tensor) -> Tensor:
    """The partial of ignored tokens; `merge` of it alone gives exact zeros."""
    neutral = token_stats.neutral_partial(False, tokens, like)
    return torch.cat([neutral, neutral, neutral.new_zeros(partial_rows(top1) - 2 * len(neutral), tokens)])


class Merged(NamedTuple):
    student: Tensor  # (4, N), rows of token_stats.merge_partials
    teacher: Tensor
    divergence: Tensor | None  # (N,); None for the Jensen-Shannon divergence
    agreed: Tensor | None  # (N,) bool


def join(partials: Tensor, beta: float) -> Tensor:
    """Join partials of S parts of the vocabulary, (S, R, N) in order, to the partial (R, N) of all of them."""
    own, other = (STUDENT, TEACHER) if beta == 1 else (TEACHER, STUDENT)
    shifts, rows = {}, {}
    for head in (STUDENT, TEACHER):
        ref, total, weighted, target = (partials[:, head + row] for row in (REF, SUM, WSUM, TARGET))
        highest = ref.amax(0)
        shift = (ref - highest).nan_to_num(nan=0.0, neginf=-1e30)  # a part that is all -inf gets weight 0
        scale = shift.exp2()
        sums = (total * scale).sum(0), ((weighted + shift * total) * scale).sum(0)
        shifts[head], rows[head] = shift, [highest, *sums, (target + shift).amax(0)]
    moved = partials[:, GAP] + (shifts[own] - shifts[other]) * partials[:, own + SUM]
    joined = [*rows[STUDENT], *rows[TEACHER], (moved * shifts[own].exp2()).sum(0), partials[:, FORBIDDEN].sum(0)]
    if partials.shape[1] == partial_rows(top1=True):
        for head, top, at in ((STUDENT, S_TOP, S_AT), (TEACHER, T_TOP, T_AT)):
            tops = partials[:, top] + shifts[head]
            joined += [tops.amax(0), partials[:, at].where(tops == tops.amax(0), torch.inf).amin(0)]
    return torch.stack(joined)


def merge(partials: Tensor, vocab: int, beta: float) -> Merged:
    """The results for the whole vocabulary from the partials (S, R, N) of its parts."""
    whole = join(partials, beta) if len(partials) > 1 else partials[0]
    student, teacher = (merge_partials(whole[None, first : first + 4], vocab) for first in (STUDENT, TEACHER))
    agreed = whole[S_AT] == whole[T_AT] if len(whole) == partial_rows(top1=True) else None
    if 0 < beta < 1:
        return Merged(student, teacher, None, agreed)
    of_own, own, other = (STUDENT, student, teacher) if beta == 1 else (TEACHER, teacher, student)
    divergence = (whole[GAP] / whole[of_own + SUM] + (other[LOG_Z_REST] - own[LOG_Z_REST])) * LN2
    return Merged(student, teacher, divergence.masked_fill(whole[FORBIDDEN] > 0, torch.inf), agreed)


def log_probs(z: Tensor, rows: Tensor) -> Tensor:
    """log softmax of logits z (N, J), by the merged rows of the whole vocabulary; clamped, so never -inf."""
    bits = (z / LN2 - rows[LOG_Z, :, None]) - rows[LOG_Z_REST, :, None]
    return (bits * LN2).clamp(min=torch.finfo(z.dtype).min)


def mixture_over(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log M minus the student's log-probabilities, and log M minus the teacher's.

    It is computed relative to the larger of the two probabilities. With e, the ratio of the smaller to the larger one,
    and `share`, the weight of the smaller one in M, the result is log(1 - share + share e).
    """
    d = (teacher - student).clamp(-MOST, MOST)
    share, e = torch.where(d < 0, beta, 1 - beta).to(d.dtype), (-d.abs()).exp()
    # Near e = 1, where both results are small differences, log1p avoids the rounding of 1 - share.
    rest = torch.where(d < 0, 1 - beta, beta).to(d.dtype)
    over_larger = torch.where(e < 0.5, (rest + share * e).log(), torch.log1p(share * torch.expm1(-d.abs())))
    return over_larger + d.clamp(min=0.0), over_larger - d.clamp(max=0.0)


def mixture_sums(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """(JSD, KL_STUDENT) (2, N) from log-probabilities (N, J)."""
    over_student, over_teacher = mixture_over(student, teacher, beta)
    kl_student = -(student.exp() * over_student).sum(-1)
    kl_teacher = -(teacher.exp() * over_teacher).sum(-1)
    return torch.stack([beta * kl_teacher + (1 - beta) * kl_student, kl_student])


def outputs_of(merged: Merged, divergence: Tensor, ignored: Tensor) -> tuple[Tensor, ...]:
    """All fields of DivergenceStats, as copies that the caller may write over. The last one is empty if not asked
    for."""
    student, teacher, _, agreed = merged
    rows = torch.stack([divergence, student[ENTROPY], student[LOGPROB], teacher[LOGPROB]]).masked_fill(ignored, 0.0)
    agreed = ignored.new_empty(0) if agreed is None else agreed & ~ignored
    return *(row.clone() for row in rows), agreed


def d_logits(
    log_p: Tensor,  # of the student, (N, J)
    log_p_teacher: Tensor,
    target: Tensor,  # (N,): the target's column in these logits
    student_rows: Tensor,
    kl: Tensor,  # (N,): the divergence if beta is 1, KL_STUDENT if beta is between 0 and 1
    beta: float,
    d_divergence: Tensor | None,
    d_entropy: Tensor | None,
    d_logprob: Tensor | None,
) -> Tensor:
    """The gradient by the student's logits z, (N, J)."""
    p, dz = log_p.exp(), torch.zeros_like(log_p)
    if d_divergence is not None:
        kl = kl.where(d_divergence != 0, 0.0)[:, None]  # 0 times an infinite KL would be NaN
        if beta == 0:
            of_z = p - log_p_teacher.exp()
        elif beta == 1:
            of_z = p * (log_p - log_p_teacher - kl)
        else:
            of_z = (beta - 1) * p * (mixture_over(log_p, log_p_teacher, beta)[0] + kl)
        dz += d_divergence[:, None] * of_z
    if d_entropy is not None:
        dz -= d_entropy[:, None] * p * (log_p + student_rows[ENTROPY, :, None])
    if d_logprob is not None:
        onehot = torch.arange(dz.shape[-1], device=dz.device) == target[:, None]
        dz += d_logprob[:, None] * (onehot.to(dz.dtype) - p)
    return dz
