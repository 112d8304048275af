"""Divergences of a student from a teacher by their logits: all logits of both, or a few log-probs of the teacher.

`divergence` is `linear_divergence` for given logits instead of LM heads. `topk_divergence` is for a teacher on a
server, which sends the log-probabilities of some tokens only. All other tokens form one more outcome, with the
remaining mass:

    p_rest(teacher) = 1 - sum_k p_k(teacher)        p_rest(student) = 1 - sum_k p_k(student)

The result is the divergence of the two distributions over these K + 1 outcomes. It is at most the divergence over the
whole vocabulary, and equal to it if student and teacher divide the remaining mass in the same proportions.
"""

from typing import Any

import torch
from torch import Tensor

from flashpo.ops import divergence_stats as stats
from flashpo.ops._check import (
    check_beside,
    check_device,
    check_dtype,
    check_float,
    check_index,
    check_int,
    check_positive,
    check_range,
    check_share,
)
from flashpo.ops._first_order import first_order
from flashpo.ops._wide import wide
from flashpo.ops.divergence_stats import DivergenceStats


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("entropy",),
) -> DivergenceStats:
    """Per-token divergence of the student's softmax from the teacher's, both given by logits.

    Args:
        student_logits, teacher_logits: (..., V), of any floating dtypes.
        target: (...) int64: the token whose log-probabilities are wanted. Rows equal to `ignore_index` give exactly 0.
        beta, temperature, outputs: as in `linear_divergence`.
        ignore_index: see target.

    Returns:
        DivergenceStats of the target's shape, in nats. Gradients flow to the student's logits only. Backward reads the
        logits again, so that nothing else of their size is kept.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    top1 = stats.check_outputs(outputs)
    check_index("student_logits", student_logits, "target", target)
    check_float("teacher_logits", teacher_logits)
    check_beside("teacher_logits", teacher_logits, "student_logits", student_logits)
    check_share("beta", beta)
    check_positive("temperature", temperature)
    check_int("ignore_index", ignore_index)
    vocab = student_logits.shape[-1]
    check_range("target", target, vocab, ignore_index)
    results = Divergence.apply(
        student_logits.reshape(-1, vocab),
        teacher_logits.detach().reshape(-1, vocab),
        target.reshape(-1),
        float(temperature),
        ignore_index,
        float(beta),
        top1,
    )
    return stats.select(outputs, target.shape, results)


def _at_temperature(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(wide(student[:0]).dtype, teacher.dtype)
    return student.to(dtype) / temperature, teacher.to(dtype) / temperature


class Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float,
        ignore_index: int,
        beta: float,
        top1: bool,
    ):
        ctx.set_materialize_grads(False)
        z = _at_temperature(student, teacher, temperature)
        merged = stats.merge(stats.partial_from_logits(*z, target, beta, 0, top1)[None], student.shape[-1], beta)
        value, kl = merged.divergence, merged.divergence
        if value is None:
            log_p, log_p_t = stats.log_probs(z[0], merged.student), stats.log_probs(z[1], merged.teacher)
            value, kl = stats.mixture_sums(log_p, log_p_t, beta)
        ctx.save_for_backward(student, teacher, target, merged.student, merged.teacher, kl)
        ctx.options = temperature, ignore_index, beta
        results = stats.outputs_of(merged, value, target == ignore_index)
        ctx.mark_non_differentiable(*results[3:])
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None):
        student, teacher, target, student_rows, teacher_rows, kl = ctx.saved_tensors
        temperature, ignore_index, beta = ctx.options
        z, z_teacher = _at_temperature(student, teacher, temperature)
        log_p, log_p_t = stats.log_probs(z, student_rows), stats.log_probs(z_teacher, teacher_rows)
        dz = stats.d_logits(log_p, log_p_t, target, student_rows, kl, beta, *upstream[:3])
        dz = dz.masked_fill_((target == ignore_index)[:, None], 0.0).div_(temperature)
        return dz.to(student.dtype), None, None, None, None, None, None


def topk_divergence(
    student_logits: Tensor,
    indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-token divergence from a teacher of whom only the log-probabilities of some tokens are known.

    Args:
        student_logits: (..., V).
        indices: (..., K) int64: the tokens that are known, different ones in each row. A row with fewer than K is
            filled up with `ignore_index`. A row of nothing but `ignore_index` gives exactly 0.
        teacher_logprobs: (..., K): the teacher's log-probabilities of these tokens at the temperature, normalised over
            the whole vocabulary. All other tokens share the remaining mass as one outcome (see the top of
            flashpo/ops/divergence.py). Entries at `ignore_index` are not read.
        beta: as in `linear_divergence`.
        temperature: of the student's logits.
        ignore_index: see indices.

    Returns:
        (...) in nats, fp32 or wider. Gradients flow to the student's logits only.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    check_float("student_logits", student_logits)
    check_dtype("indices", indices, torch.int64)
    check_float("teacher_logprobs", teacher_logprobs)
    check_beside("teacher_logprobs", teacher_logprobs, "indices", indices)
    check_device("indices", indices, "student_logits", student_logits)
    if student_logits.dim() < 1 or indices.dim() < 1 or indices.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            "indices must have the dimensions of student_logits but the last, and one of K tokens, "
            f"got {tuple(indices.shape)} for student_logits of {tuple(student_logits.shape)}"
        )
    check_share("beta", beta)
    check_positive("temperature", temperature)
    check_int("ignore_index", ignore_index)
    check_range("indices", indices, student_logits.shape[-1], ignore_index)
    z = wide(student_logits) / temperature
    known = indices != ignore_index
    chosen = z.gather(-1, indices.where(known, 0)) - z.logsumexp(-1, keepdim=True)
    student = _with_rest(chosen, known)
    teacher = _with_rest(teacher_logprobs.detach().to(student.dtype), known)
    columns = student.shape[-1]
    target = known.any(-1).to(torch.int64) - 1  # any valid outcome; -1 marks the rows without one, which are ignored
    stats_of = divergence(
        student.reshape(-1, columns), teacher.reshape(-1, columns), target.reshape(-1), beta=beta, ignore_index=-1
    )
    return stats_of.divergence.view(known.shape[:-1])


def _with_rest(logprobs: Tensor, known: Tensor) -> Tensor:
    """(..., K + 1): the log-probabilities, -inf where unknown, and that of all other tokens in the last column.

    Where the K tokens have all of the mass up to rounding, the other tokens get the smallest mass that fp32 can
    resolve.
    """
    logprobs = logprobs.masked_fill(~known, -torch.inf)
    mass = torch.where(known, logprobs, 0.0).exp().where(known, 0.0).sum(-1, keepdim=True)
    return torch.cat([logprobs, (1 - mass).clamp(min=torch.finfo(mass.dtype).eps).log()], -1)
