"""Divergence between the softmaxes of a student's and a teacher's LM head, without storing the logits of either.

    z = softcap tanh(((h W^T + b) logit_scale) / softcap) / T, of each model; log p = z - lse(z)
    beta = 0     sum_j p_t (log p_t - log p_s)       dz_s = p_s - p_t
    beta = 1     sum_j p_s (log p_s - log p_t)       dz_s = p_s (log p_s - log p_t - the sum)
    between      beta KL(p_t || M) + (1 - beta) KL(p_s || M), M = (1 - beta) p_s + beta p_t
                                                     dz_s = (1 - beta) p_s (log p_s - log M - KL(p_s || M))

See `divergence_stats` for the sums and for logits of -inf. Tiles of both heads' logits are folded into a partial.
Backward computes the tiles again and turns the student's into gradients. Lower bound on the work, in GEMMs: two for
forward (four for the Jensen-Shannon divergence, which needs both log-sum-exps first), and four more for backward, or
three if the student's head is frozen.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashpo._op import op
from flashpo.ops import _linear_divergence_cpu as cpu
from flashpo.ops import divergence_stats as stats
from flashpo.ops._check import (
    KERNEL_DTYPES,
    check_device,
    check_group,
    check_int,
    check_positive,
    check_range,
    check_share,
)
from flashpo.ops._first_order import first_order
from flashpo.ops._wide import wide_dtype
from flashpo.ops.divergence_stats import DivergenceStats
from flashpo.ops.linear_logprob import (
    all_reduced,
    check_head,
    compute_dtype,
    gather_partials,
    head_gradients,
    head_logits,
)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("entropy",),
    group: dist.ProcessGroup | None = None,
    gather: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> DivergenceStats:
    """Per-token divergence of the student's next-token distribution from the teacher's, with side statistics.

    Args:
        student_hidden, teacher_hidden: (..., H) float32, bfloat16 or float16: the last hidden states of the same tokens
            (not logits). Width and dtype may differ between the two.
        student_weight, teacher_weight: (V, H): the LM heads, over the same vocabulary. They are converted to the
            compute dtype tile by tile. The compute dtype is autocast's if autocast is on, otherwise that of the hidden
            states.
        target: (...) int64: the token whose log-probabilities are wanted. Rows equal to `ignore_index` cost nothing and
            give exactly 0. In all other rows the divergence itself does not depend on the target.
        student_bias, teacher_bias: (V,) or None.
        beta: 0 is the forward KL(teacher || student), 1 is the reverse KL(student || teacher), a number between them is
            the generalised Jensen-Shannon divergence, as in TRL's DistillationTrainer.
        temperature: of both models, a positive number.
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: the transforms of each head's
            logits, see the formulas at the top of flashpo/ops/linear_divergence.py.
        ignore_index: see target.
        outputs: names of the `DivergenceStats` fields wanted besides `divergence`.
        group: a process group over which both heads are sharded along V, in rank order and in equal shards. Hidden
            states, target and incoming gradients must be the same on every rank.
        gather: returns a context manager inside which sharded heads (as of ZeRO-3) are whole. The caller is already
            inside such a context. Backward enters another one, so that the heads need not stay whole in between.

    Returns:
        DivergenceStats of the target's shape, fp32, in nats. Gradients flow to the student's hidden states, weight and
        bias only; they are accumulated in fp32 and returned in their argument's dtype. The teacher is a constant, even
        if its tensors require grad. A KL is +inf where the distribution over which it averages gives a positive
        probability to a token whose logit is -inf in the other one. The gradient of the forward KL is finite even
        there, the gradient of the reverse KL is not.

    Raises:
        TypeError, ValueError: the message names the argument. (A target outside [0, V) is a device assertion on CUDA.)
    """
    top1 = stats.check_outputs(outputs)
    student = student_hidden, student_weight, target, student_bias, student_logit_scale, student_softcap
    teacher = teacher_hidden, teacher_weight, target, teacher_bias, teacher_logit_scale, teacher_softcap
    check_head("student_", *student, "linear_divergence")
    check_head("teacher_", *teacher, "linear_divergence")
    if len(teacher_weight) != len(student_weight):
        raise ValueError(
            f"teacher_weight must have the student's vocabulary, {len(student_weight)} rows, got "
            f"{len(teacher_weight)}; where one is padded, pass the rows that both have"
        )
    check_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    check_share("beta", beta)
    check_positive("temperature", temperature)
    check_int("ignore_index", ignore_index)
    check_group("group", group)
    results = LinearDivergence.apply(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        target.reshape(-1),
        (
            float(temperature),
            float(student_logit_scale),
            None if student_softcap is None else float(student_softcap),
            float(teacher_logit_scale),
            None if teacher_softcap is None else float(teacher_softcap),
        ),
        ignore_index,
        float(beta),
        top1,
        group,
        gather,
    )
    return stats.select(outputs, target.shape, results)


class Head(NamedTuple):
    hidden: Tensor  # (N, H)
    weight: Tensor  # (J, H): the whole head, or the part of it that begins at Heads.start
    bias: Tensor | None  # (J,)
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype  # the dtype of the GEMM

    def logits(self, temperature: float) -> tuple[Tensor, Tensor]:
        return head_logits(
            self.hidden, self.weight, self.bias, None, temperature, self.logit_scale, self.softcap, self.dtype
        )


class Heads(NamedTuple):
    """The first arguments of every operator in this file."""

    student: Head
    teacher: Head
    target: Tensor  # (N,)
    temperature: float
    ignore_index: int
    start: int  # the first vocabulary entry that these weights hold
    beta: float

    def log_probs(self, student_rows: Tensor, teacher_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log p of the student, log p of the teacher, dz/dx of the student's logits), all (N, J)."""
        (z_s, slope), (z_t, _) = self.student.logits(self.temperature), self.teacher.logits(self.temperature)
        dtype = student_rows.dtype
        return stats.log_probs(z_s.to(dtype), student_rows), stats.log_probs(z_t.to(dtype), teacher_rows), slope


def heads_of(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor,
    temperature: float,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    ignore_index: int,
    vocab_start: int,
    beta: float,
) -> Heads:
    return Heads(
        Head(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap, student_dtype),
        Head(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap, teacher_dtype),
        target,
        temperature,
        ignore_index,
        vocab_start,
        beta,
    )


SHARED = tuple(inspect.signature(heads_of).parameters.values())


def on_heads(fn: Callable) -> Callable:
    """Make `fn(heads, ...)` a function of plain arguments, because operators take no others; those of `heads_of`
    first."""

    @functools.wraps(fn)
    def run(*args):
        return fn(heads_of(*args[: len(SHARED)]), *args[len(SHARED) :])

    signature = inspect.signature(fn)
    own = list(signature.parameters.values())[1:]
    run.__signature__ = signature.replace(parameters=[*SHARED, *own])  # type: ignore[attr-defined]
    return run


@op
@on_heads
def linear_divergence_partial(heads: Heads, vocab: int, top1: bool) -> Tensor:
    """The partial (10 or 14, N) of this part of the vocabulary; ignored tokens get a neutral partial."""
    check_range("target", heads.target, vocab, heads.ignore_index)
    (z_s, _), (z_t, _) = heads.student.logits(heads.temperature), heads.teacher.logits(heads.temperature)
    wide = torch.promote_types(z_s.dtype, z_t.dtype)
    partial = stats.partial_from_logits(z_s.to(wide), z_t.to(wide), heads.target, heads.beta, heads.start, top1)
    neutral = stats.neutral_partial(top1, len(heads.target), partial)
    return partial.where(heads.target != heads.ignore_index, neutral)


@linear_divergence_partial.fake
@on_heads
def _(heads, vocab, top1):
    return _new_rows(heads, stats.partial_rows(top1))


@op
@on_heads
def linear_divergence_mixture(heads: Heads, student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
    """(JSD, KL_STUDENT) (2, N) of this part of the vocabulary; 0 for ignored tokens."""
    log_p_s, log_p_t, _ = heads.log_probs(student_rows, teacher_rows)
    return stats.mixture_sums(log_p_s, log_p_t, heads.beta).where(heads.target != heads.ignore_index, 0.0)


@linear_divergence_mixture.fake
@on_heads
def _(heads, student_rows, teacher_rows):
    return _new_rows(heads, 2)


def _new_rows(heads: Heads, rows: int) -> Tensor:
    dtype = wide_dtype(torch.promote_types(heads.student.dtype, heads.teacher.dtype))
    return heads.target.new_empty((rows, heads.target.shape[0]), dtype=dtype)


@op
@on_heads
def linear_divergence_bwd(
    heads: Heads,
    student_rows: Tensor,  # (4, N), from merge_partials
    teacher_rows: Tensor,
    kl: Tensor,  # (N,): see `d_logits`
    d_divergence: Tensor | None,
    d_entropy: Tensor | None,
    d_logprob: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's (d_hidden, d_weight, d_bias) in its dtypes; a gradient that is not wanted is an empty tensor."""
    log_p, log_p_t, slope = heads.log_probs(student_rows, teacher_rows)
    student, target = heads.student, heads.target
    column = target - heads.start
    dx = stats.d_logits(log_p, log_p_t, column, student_rows, kl, heads.beta, d_divergence, d_entropy, d_logprob)
    dx = (dx * slope).masked_fill((target == heads.ignore_index)[:, None], 0.0)
    return head_gradients(
        dx, student.hidden, student.weight, student.bias, student.dtype, want_hidden, want_weight, want_bias
    )


@linear_divergence_bwd.fake
@on_heads
def _(heads, *rest):
    like = heads.student[:3]
    return tuple(torch.empty_like(x) if wanted else like[0].new_empty(0) for x, wanted in zip(like, rest[-3:]))


@linear_divergence_partial.backend("native")
@on_heads
def _(heads, *rest):
    return cpu.partial(heads, *rest) if cpu.takes(heads) else NotImplemented


@linear_divergence_mixture.backend("native")
@on_heads
def _(heads, *rest):
    return cpu.mixture(heads, *rest) if cpu.takes(heads) else NotImplemented


@linear_divergence_bwd.backend("native")
@on_heads
def _(heads, *rest):
    return cpu.backward(heads, *rest) if cpu.takes(heads) else NotImplemented


def _takes_triton(heads: Heads) -> bool:
    tensors = (*heads.student[:2], *heads.teacher[:2])
    return {x.dtype for x in tensors} | {heads.student.dtype, heads.teacher.dtype} <= {*KERNEL_DTYPES}


@linear_divergence_partial.backend("triton")  # kernels/linear_divergence.py
@on_heads
def _(heads, *rest):
    if not _takes_triton(heads):
        return NotImplemented
    from flashpo.kernels.linear_divergence import partial

    return partial(heads, *rest)


@linear_divergence_mixture.backend("triton")
@on_heads
def _(heads, *rest):
    if not _takes_triton(heads):
        return NotImplemented
    from flashpo.kernels.linear_divergence import mixture

    return mixture(heads, *rest)


@linear_divergence_bwd.backend("triton")
@on_heads
def _(heads, *rest):
    if not _takes_triton(heads):
        return NotImplemented
    from flashpo.kernels.linear_divergence import backward

    return backward(heads, *rest)


class LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        target: Tensor,
        options: tuple,  # the options of heads_of, from temperature to teacher_softcap
        ignore_index: int,
        beta: float,
        top1: bool,
        group: dist.ProcessGroup | None,
        gather: Callable[[], contextlib.AbstractContextManager] | None,
    ):
        ctx.set_materialize_grads(False)  # the entropy is often only logged, and then its gradient is None
        shards = 1 if group is None else dist.get_world_size(group)
        start = 0 if group is None else dist.get_rank(group) * student_weight.shape[0]
        vocab = shards * student_weight.shape[0]
        tensors = student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, target
        dtypes = compute_dtype(student_hidden), compute_dtype(teacher_hidden)
        options = *options, *dtypes, ignore_index, start, beta
        partial = linear_divergence_partial(*tensors, *options, vocab, top1)
        partials = partial[None] if group is None else gather_partials(partial, vocab, group)
        merged = stats.merge(partials, vocab, beta)
        student, teacher, divergence, _ = merged
        if divergence is None:
            sums = linear_divergence_mixture(*tensors, *options, student, teacher)
            if group is not None:
                dist.all_reduce(sums, group=group)
            divergence, kl = sums
        else:
            kl = divergence
        ctx.save_for_backward(*tensors, student, teacher, kl)
        ctx.options = options, group, gather
        results = stats.outputs_of(merged, divergence, target == ignore_index)
        ctx.mark_non_differentiable(*results[3:])
        return results

    @staticmethod
    @first_order
    def backward(ctx: Any, d_divergence: Tensor | None, d_entropy: Tensor | None, d_logprob: Tensor | None, *_):
        *tensors, student, teacher, kl = ctx.saved_tensors
        options, group, gather = ctx.options
        wanted = ctx.needs_input_grad[:3]
        with gather() if gather else contextlib.nullcontext():
            grads = linear_divergence_bwd(
                *tensors, *options, student, teacher, kl, d_divergence, d_entropy, d_logprob, *wanted
            )
        d_hidden, d_weight, d_bias = (grad if want else None for grad, want in zip(grads, wanted))
        if group is not None and d_hidden is not None:
            d_hidden = all_reduced(d_hidden, group)
        return d_hidden, d_weight, d_bias, *[None] * 10
